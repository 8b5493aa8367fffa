"""The tiny pipelines of `tiny` as fixtures.

The session fixtures are shared by all tests, which must leave them as they are; `fresh` builds new ones. All lie on the
`--device` that pytest is given; "pretended-cuda" takes the CPU for a GPU, see `placement`.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import gc
import logging

import pytest
import torch
from jaxtyping import install_import_hook
from placement import Pretended
from tiny import build, prepare_device

# The shapes that these modules' annotations name are checked wherever the tests call them; others take bad input, and
# say by themselves what is wrong with it
FORMULAE = tuple(f"daamlib.attention.{name}" for name in ("daam", "joint.maps", "self_attention", "softmax"))
TOKENS = [
    f"daamlib.tokens.{name}" for name in ("choose", "inputs", "objective", "optimize", "probe", "solvers", "token")
]
CHECKED = ("daamlib.metrics", "daamlib_lab.experiments", *TOKENS, *FORMULAE)
install_import_hook(CHECKED, "helpers.checked")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests put their pipelines and tensors: cpu, cuda, mps, or pretended-cuda (placement.py)",
    )


def pytest_configure(config):
    name = config.getoption("--device")
    if name.startswith("pretended-"):
        mode = Pretended(name.removeprefix("pretended-"))
        mode.__enter__()
        config.add_cleanup(lambda: mode.__exit__(None, None, None))
    elif name != "cpu":
        prepare_device(name)
    torch.set_num_threads(1)  # more cost more than they give on such small tensors
    # it advises on batch sizes and the like, through warnings that would be errors here
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # a million objects of the imported libraries, which each collection would look through again


@pytest.fixture(autouse=True)
def threads():
    """A test leaves PyTorch on one thread: with more, all later tests of its process are many times as slow."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1


@pytest.fixture(scope="session")
def device(pytestconfig):
    """Of `--device`, as tensors name it."""
    return torch.empty(0, device=pytestconfig.getoption("--device").removeprefix("pretended-")).device


@pytest.fixture(scope="session")
def sd1_pipe(device):
    return build("sd1", device)


@pytest.fixture(scope="session")
def sd2_pipe(device):
    return build("sd2", device)


@pytest.fixture(scope="session")
def sdxl_pipe(device):
    return build("sdxl", device)


ROWS = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}  # of docs/supported.md


@pytest.fixture(params=[pytest.param(key, marks=pytest.mark.supports(family=name)) for key, name in ROWS.items()])
def pipe(request):
    """Each family in turn; read-only."""
    return request.getfixturevalue(f"{request.param}_pipe")


@pytest.fixture
def fresh(device):
    """A function of a family's name, "sd1", that builds a pipeline of this test alone, which may change it."""
    return functools.partial(build, device=device)
