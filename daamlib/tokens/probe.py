"""Probe tokens: free vectors in the attention's output space of a joint model, fitted to masks.

    v-hat = argmin_v  1/n sum_j C(P_j(v) + b, G_j)  +  w |v - v_0|^2 / |v_0|^2      (images j = 1...n, masks G_j)

P_j(v) = A_j v is exactly linear in v (`JointRecord.probe_map`), so that with the binary cross-entropy, or the softmax
between classes, the problem is convex in (v, b): the same as LDAAM's in `optimize`, by the same Newton's method. v has
the channels of all blocks, many more than there are pixels. Its minimum lies in the span of A's rows, where the start
v_0 does, too: with the eigenvectors of A A^T = U S U^T, v = Q z with the orthonormal Q = A^T U S^-1/2 changes neither
term, A v = U S^1/2 z, and z has only as many unknowns as there are pixels. A A^T is summed over groups of blocks, so
that A, 29 GB for five images of Flux.1 at 1024 px, is never held as a whole.

A probe token reads images and cannot be typed into a prompt: no text is known that leads to it in all blocks at once.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float

from ..attention.joint.record import JointRecord, chosen_layers
from ..pipeline import denoiser_of
from .inputs import made_of, read_masks
from .objective import Objective, linear_maps, loss_of, pass_factors, pixel_weights
from .optimize import BACKGROUND
from .solvers import newton, solved
from .token import OptimizedToken

MAX_BYTES = 2**33
SMALLEST = 1e-14  # eigenvalue that is no rounding of float32, as a part of the largest


@torch.inference_mode(False)  # it differentiates, whatever mode it is called in
def optimize_probe(
    records: Iterable[JointRecord],
    masks: Iterable,
    *,
    word: str | Sequence[str] | None = None,
    multiclass: bool = False,
    background: bool = False,
    layers: Sequence[str] | None = None,
    weight_decay: float = 1e-5,
    iterations: int = 100,
    max_bytes: int = MAX_BYTES,
) -> OptimizedToken:
    """Fit a probe token to the masks of a few images of one joint model, to read its other images with.

    Convex, by Newton's method; it starts from the covariance of the image's vectors with the mask.

    Args:
        records: n images of one model, with their pipeline: their vectors are made anew.
        masks: n, as for `optimize_token`.
        word: the name of each class, K of them.
        multiclass: a softmax between the classes instead of a sigmoid each; pixels of no class are left out.
        background: a softmax with one class more, of those pixels.
        layers: names of the attentions to read, by default all (`JointRecord.layer_names`).
        weight_decay: w in the formula above.
        iterations: at most so many.
        max_bytes: held at a time. If the images' vectors do not fit, the passes are re-run for a few blocks at a time.

    Returns:
        The token, of the method "probe": `maps`, `probabilities`, `save` and `load` are those of any other; it reads
        `JointRecord`s, with their pipeline. Its embedding is (K, blocks * channels).

    Raises:
        TypeError: something else than JointRecords was given.
        ValueError: records of several models or without a pipeline, or masks, options or `max_bytes` that do not fit.
    """
    started = time.perf_counter()
    if iterations < 1 or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"expected iterations >= 1 and weight_decay >= 0, got {iterations!r} and {weight_decay!r}")
    records, multiclass = list(records), multiclass or background
    names = (word,) if isinstance(word, str) else tuple(word or ())
    outside = BACKGROUND if background else None
    grids, words = read_masks(records, list(masks), names, multiclass=multiclass, background=outside, kind=JointRecord)
    matrix, channels_of = _reduced(records, chosen_layers(records[0], layers), len(words), multiclass, max_bytes)
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
        loss=loss_of("bce", targets, weights, sizes, multiclass=multiclass),
        start=start,
        targets=targets,
        weights=weights,
        matrix=matrix,
        offset=offset,
        unit=first.std(dim=1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny),
        centre=None,
        weight_decay=weight_decay,
        multiclass=multiclass,
        words=words,
        rows=tuple((k,) for k in range(len(words))),
    )
    fit = solved(objective, newton(objective, iterations))
    return OptimizedToken(
        embedding=channels_of(fit.embedding).float().cpu(),
        method="probe",
        **fit.fields,
        seconds=time.perf_counter() - started,
        info={
            **made_of(records),
            "passes": [len(record.timesteps) for record in records],  # whose sum a map is
            "word": list(names) or None,
            "loss": "bce",
            "multiclass": multiclass,
            "optimizer": "newton",
            "iterations": iterations,
            "layers": None if layers is None else list(layers),
            "weight_decay": weight_decay,
        },
    )


def _reduced(
    records: Sequence[JointRecord], layers: Sequence[str], classes: int, multiclass: bool, max_bytes: int
) -> tuple[Float[torch.Tensor, "P r"], Callable[[torch.Tensor], torch.Tensor]]:
    """A Q, and the function z -> Q z of (K, r) vectors; Q = 1 where there are no more channels than pixels."""
    pixels, width = sum(record.grid[0] * record.grid[1] for record in records), denoiser_of(records[0].pipe).inner_dim
    rank = min(pixels, len(layers) * width)
    hessian = (classes * (rank + 1)) ** 2 if multiclass else classes * (rank + 1) ** 2
    needed = 8 * (3 * pixels * rank + 3 * hessian)  # Newton's method, with its copies
    if needed > max_bytes:
        raise ValueError(
            f"a probe of {classes} classes over {pixels} pixels of {len(layers)} layers takes "
            f"{needed / 2**30:.2g} GiB, max_bytes allows {max_bytes / 2**30:.2g}: give fewer or smaller images, fewer "
            "classes, or raise max_bytes"
        )
    if len(layers) * width <= pixels:
        return _rows(records, layers), lambda z: z
    at_once = max(1, (max_bytes - 16 * pixels**2) // (20 * pixels * width))  # float32, float64, and their product
    parts = [layers[start : start + at_once] for start in range(0, len(layers), at_once)]
    whole = _rows(records, layers) if len(parts) == 1 else None
    gram = torch.zeros(pixels, pixels, dtype=torch.float64, device=_device(records))
    for part in parts:
        rows = _rows(records, part) if whole is None else whole
        gram.addmm_(rows, rows.T)
    if not gram.isfinite().all():
        raise ValueError("the images' vectors hold NaN or infinite values: look at the images that made them")
    values, vectors = torch.linalg.eigh(gram)
    kept = values > SMALLEST * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]

    def channels_of(z: torch.Tensor) -> torch.Tensor:
        pixels = vectors @ (z / roots).T  # (P, K)
        return torch.cat([(_rows(records, part) if whole is None else whole).T @ pixels for part in parts]).T

    return vectors * roots, channels_of


def _rows(records: Sequence[JointRecord], layers: Sequence[str]) -> Float[torch.Tensor, "P channels"]:
    """A of every image, a pixel a row, in float64."""
    device = _device(records)
    weights = [record.probe_map(layers).weight.to(device).double().flatten(0, 1) for record in records]
    return torch.cat([factor * weight for factor, weight in zip(pass_factors(records), weights, strict=True)])


def _device(records: Sequence[JointRecord]) -> torch.device:
    """Where the records lie; the CPU for those on an Apple GPU, which has no float64."""
    return torch.device("cpu") if records[0].device.type == "mps" else records[0].device
