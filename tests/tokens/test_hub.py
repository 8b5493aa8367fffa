"""Tokens pushed to a hub and fetched again, in a process of its own that takes a server of ours for the hub."""

import os
import subprocess
import sys

import pytest
import torch
from hub import hub
from huggingface_hub import ModelCard

from daamlib import OptimizedToken

PUSH = """
from daamlib import OptimizedToken
token = OptimizedToken.load("token.safetensors")
print(token.push_to_hub("somebody/car-token"))
OptimizedToken.from_pretrained("somebody/car-token").save("fetched.safetensors")
try:
    OptimizedToken.from_pretrained("somebody/no-token")
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_a_token_comes_back_from_the_hub_as_it_was_pushed(tmp_path):
    fit = {"losses": (0.5, 0.25), "gradient_norm": 1e-9, "seconds": 0.1, "info": {"model": "urban-tiny", "seed": 0}}
    token = OptimizedToken(torch.arange(8.0).view(1, 8), "ldaam", ("car",), ((0,),), (1.5,), (-0.5,), **fit)
    token.save(tmp_path / "token.safetensors")
    with hub() as server:
        hosts = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        hosts |= {"HF_TOKEN": "hf_of_the_test", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-c", PUSH]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | hosts, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        url, error = done.stdout.split()
        assert url.startswith(f"{server.address}/somebody/car-token/commit/")
        assert error == "RepositoryNotFoundError"
        files = server.repos["somebody/car-token"]
    assert files.keys() == {"README.md", "token.safetensors"}
    fetched = OptimizedToken.load(tmp_path / "fetched.safetensors")
    assert torch.equal(fetched.embedding, token.embedding)
    assert (fetched.words, fetched.rows, fetched.scale, fetched.bias) == (("car",), ((0,),), (1.5,), (-0.5,))
    assert (fetched.losses, fetched.info) == ((0.5, 0.25), {"model": "urban-tiny", "seed": 0})
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "daamlib"
    assert "somebody/car-token" in card.text
