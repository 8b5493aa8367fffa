"""Small datasets for the tests of this room."""

import pytest
from small_sets import OPTIONS, PROMPTS, bright

from daamlib import datasets


@pytest.fixture(scope="session", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="session")
def whole(sd1_pipe, tmp_path_factory):
    """An uninterrupted run; read-only."""
    return datasets.generate(sd1_pipe, PROMPTS, tmp_path_factory.mktemp("whole") / "set", labeller=bright, **OPTIONS)


@pytest.fixture
def generated(sd1_pipe, tmp_path):
    """A dataset without labels or records, of this test alone."""
    return datasets.generate(sd1_pipe, PROMPTS[:3], tmp_path / "set", steps=1, size=(16, 24))
