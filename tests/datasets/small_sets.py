"""What the tests of datasets share."""

import numpy as np
import torch

import daamlib
from daamlib import OptimizedToken

PROMPTS = ["a car", "a tree", "a car and a tree", "a tree and a car", "a tree, a car"]
OPTIONS = {"steps": 2, "size": (16, 24), "keep_steps": 1, "seed": 3}
CAR, PERSON, TREE = 26, 24, 21


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bright(image, record, prompt):
    """A labeller that reads no record: car where the red is bright, trees elsewhere."""
    assert record is None
    return np.where(image[..., 0] > 128, np.uint8(CAR), np.uint8(TREE))


bright.store = None


def traced(pipe, prompt="a car and a person", store="linear"):
    with daamlib.trace(pipe, store=store, self_attention=True) as trace:
        generator = torch.Generator().manual_seed(0)
        pipe(prompt, num_inference_steps=2, height=16, width=24, generator=generator, output_type="latent")
    return trace[0]


def token_for(record, *words, seed=0, **info):
    """A token of random embeddings whose logits have mean 0 and deviation 2 in this record."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(len(words), record.d_text, generator=generator)
    maps = record.ldaam_from(embedding).values.flatten(1)
    scale = 2 / maps.std(dim=1)
    bias = -scale * maps.mean(dim=1)
    rows = tuple((row,) for row in range(len(words)))
    info = {"fingerprint": dict(record.fingerprint.layers), "passes": [len(record.timesteps)]} | info
    return OptimizedToken(
        embedding, "ldaam", words, rows, tuple(scale.tolist()), tuple(bias.tolist()), (0.5,), 0.0, 0.0, info
    )
