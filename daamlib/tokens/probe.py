"""Probe tokens: free vectors in the attention's output space of a joint model, fitted to masks.

    v-hat = argmin_v  1/n sum_j C(P_j(v) + b, G_j)  +  w |v - v_0|^2 / |v_0|^2      (images j = 1...n, masks G_j)

P_j(v) = A_j v is exactly linear in v (`JointRecord.probe_map`), so that with the binary cross-entropy, or the softmax
between classes, the problem is convex in (v, b): the same as LDAAM's in `optimize`, by the same Newton's method. v has
the channels of all blocks, many more than there are pixels. Its minimum lies in the span of A's rows, where the start
v_0 does, too: v = Q z with Q from the QR decomposition of A^T changes neither term, and z has only as many unknowns as
there are pixels.

A probe token reads images and cannot be typed into a prompt: no text is known that leads to it in all blocks at once.
"""

import time
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float

from ..attention.joint.record import JointRecord
from .inputs import made_of, read_masks
from .objective import Objective, linear_maps, loss_of, pass_factors, pixel_weights
from .optimize import BACKGROUND
from .solvers import newton, solved
from .token import OptimizedToken


@torch.inference_mode(False)  # it differentiates, whatever mode it is called in
def optimize_probe(
    records: Iterable[JointRecord],
    masks: Iterable,
    *,
    word: str | Sequence[str] | None = None,
    joint: bool = False,
    background: bool = False,
    layers: Sequence[str] | None = None,
    weight_decay: float = 1e-5,
    iterations: int = 100,
) -> OptimizedToken:
    """Fit a probe token to the masks of a few images of one joint model, to read its other images with.

    Convex, by Newton's method; it starts from the covariance of the image's vectors with the mask.

    Args:
        records: n images of one model, with their pipeline: their vectors are made anew.
        masks: n, as for `optimize_token`.
        word: the name of each class, K of them.
        joint: a softmax between the classes instead of a sigmoid each; pixels of no class are left out.
        background: a softmax with one class more, of those pixels.
        layers: names of the attentions to read, by default all (`JointRecord.layer_names`).
        weight_decay: w in the formula above.
        iterations: at most so many.

    Returns:
        The token, of the method "probe": `maps`, `probabilities`, `save` and `load` are those of any other; it reads
        `JointRecord`s, with their pipeline. Its embedding is (K, blocks * channels).

    Raises:
        TypeError: something else than JointRecords was given.
        ValueError: records of several models or without a pipeline, or masks or options that do not fit.
    """
    started = time.perf_counter()
    if iterations < 1 or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"expected iterations >= 1 and weight_decay >= 0, got {iterations!r} and {weight_decay!r}")
    records, joint = list(records), joint or background
    names = (word,) if isinstance(word, str) else tuple(word or ())
    outside = BACKGROUND if background else None
    grids, words = read_masks(records, list(masks), names, joint=joint, background=outside, kind=JointRecord)
    full = _rows(records, layers)
    basis, _ = torch.linalg.qr(full.T)  # (blocks * channels, r)
    matrix = full @ basis
    sizes = [grid[0].numel() for grid in grids]
    targets = torch.cat([grid.flatten(1) for grid in grids], dim=1).to(matrix)
    weights = pixel_weights(sizes).to(matrix)
    start = (targets - targets.mean(dim=1, keepdim=True)) @ (matrix - matrix.mean(dim=0)) / len(matrix)
    offset = matrix.new_zeros(len(matrix))
    maps = linear_maps(matrix, offset)
    first = maps(start)
    if not first.isfinite().all():
        raise ValueError("the images' vectors hold NaN or infinite values: look at the images that made them")
    objective = Objective(
        maps=maps,
        loss=loss_of("bce", targets, weights, sizes, joint=joint),
        start=start,
        targets=targets,
        weights=weights,
        matrix=matrix,
        offset=offset,
        unit=first.std(dim=1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny),
        centre=None,
        weight_decay=weight_decay,
        joint=joint,
        words=words,
        rows=tuple((k,) for k in range(len(words))),
    )
    fit = solved(objective, newton(objective, iterations))
    return OptimizedToken(
        embedding=(fit.embedding @ basis.T).float().cpu(),
        method="probe",
        **fit.fields,
        seconds=time.perf_counter() - started,
        info={
            **made_of(records),
            "passes": [len(record.timesteps) for record in records],  # whose sum a map is
            "word": list(names) or None,
            "loss": "bce",
            "joint": joint,
            "optimizer": "newton",
            "iterations": iterations,
            "layers": None if layers is None else list(layers),
            "weight_decay": weight_decay,
        },
    )


def _rows(records: Sequence[JointRecord], layers: Sequence[str] | None) -> Float[torch.Tensor, "P channels"]:
    """A of every image, a pixel a row, in float64, which Apple's GPUs have not: there on the CPU."""
    device = torch.device("cpu") if records[0].device.type == "mps" else records[0].device
    weights = [record.probe_map(layers).weight.to(device).double().flatten(0, 1) for record in records]
    return torch.cat([factor * weight for factor, weight in zip(pass_factors(records), weights, strict=True)])
