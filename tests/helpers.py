"""What several tests share: one way to generate, and DAAM and LDAAM as their formulas say.

`naive_maps` works from explicit attention scores, slowly, and shares no code with daamlib.
"""

from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from beartype import BeartypeConf, beartype
from torch.nn import functional as F

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # whole numbers are taken for floats


def generate(pipe, prompt="a car and a tree", *, seed=0, **options):
    """Images, by default latents of 16 x 24: two steps with guidance. The same call makes the same images."""
    defaults = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    if "image" not in options:
        defaults |= {"height": 32, "width": 48}
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, **{**defaults, **options}, generator=generator).images


def assert_close(got, expected, tolerance=1e-5):
    """Equal to `tolerance` times the largest expected absolute value, wherever the two lie.

    Ten times that where one lies on a GPU, whose kernels add in other orders.
    """
    if {got.device.type, expected.device.type} != {"cpu"}:
        tolerance *= 10
    got, expected = got.cpu(), expected.cpu()
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the maximum"


class Capture:
    """An attention processor that keeps every pass: (batch, head, h*w, token) probabilities and scaled scores."""

    def __init__(self):
        self.queries, self.probabilities, self.scores = [], [], []  # queries are (batch, head, h*w, d_head)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(hidden_states))
        probabilities = attn.get_attention_scores(query, key, mask)
        self.queries.append(query.unflatten(0, (-1, attn.heads)))
        self.probabilities.append(probabilities.unflatten(0, (-1, attn.heads)))
        self.scores.append((attn.scale * query @ key.transpose(1, 2)).unflatten(0, (-1, attn.heads)))
        hidden_states = attn.batch_to_head_dim(probabilities @ value)
        return attn.to_out[1](attn.to_out[0](hidden_states))


@contextmanager
def capture(unet, names=None):
    """{module name: Capture} of these attentions; None: of every cross-attention but the middle block's."""
    before = unet.attn_processors
    if names is None:
        names = [name.removesuffix(".processor") for name in before if "attn2" in name and "mid_block" not in name]
    found = {name: Capture() for name in names}
    unet.set_attn_processor({**before, **{name + ".processor": capture for name, capture in found.items()}})
    try:
        yield found
    finally:
        unet.set_attn_processor(before)


def with_text(unet, captures, embeddings):
    """What would have been captured under (m, d_text) embeddings of another text, from the queries as they were."""
    found = {}
    for name, captured in captures.items():
        attn = unet.get_submodule(name)
        key = attn.head_to_batch_dim(attn.to_k(embeddings[None])).transpose(1, 2)
        scores = [attn.scale * query @ key for query in captured.queries]
        found[name] = SimpleNamespace(scores=scores, probabilities=[each.softmax(dim=-1) for each in scores])
    return found


def iou(one, other):
    """Of two boolean arrays, wherever they lie."""
    one, other = one.cpu(), other.cpu()
    return ((one & other).sum() / (one | other).sum()).item()


def naive_maps(captures, grids, image, *, kind="probabilities", mode="bilinear"):
    """(token, H, W) of one row of the U-Net's batch: every layer, step and head up-sampled by itself, then summed.

    grids: the (h, w) of the model's levels, the largest first; a layer's is the one that has as many positions.
    """
    by_size = {h * w: (h, w) for h, w in grids}
    sizes = {tensor.shape[2] for capture in captures.values() for tensor in getattr(capture, kind)}
    largest = by_size[max(sizes)]
    total = defaultdict(float)
    for name, captured in captures.items():
        for tensor in getattr(captured, kind):
            grid = by_size[tensor.shape[2]]
            maps = tensor[image].transpose(1, 2).unflatten(2, grid)  # (head, token, h, w)
            total[name] = total[name] + F.interpolate(maps, largest, mode=mode, align_corners=False).sum(dim=0)
    return sum(total.values())
