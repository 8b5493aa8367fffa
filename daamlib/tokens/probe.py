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
from .inputs import read_masks
from .objective import device_of, linear_maps, linear_rows, objective_of, pixels_of
from .optimize import Options, info_of
from .solvers import newton, token_of
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

        token = daamlib.optimize_probe(records, masks, word="car")
        token.probabilities(record)[0]  # (H, W)

    Args:
        records: n images of one model, with their pipeline: their vectors are computed again.
        masks: n, as for `optimize_token`.
        word: name of each class, K of them.
        multiclass: a softmax between the classes instead of a sigmoid each; pixels of no class are left out.
        background: a softmax with one class more, of those pixels.
        layers: names of the attentions to read, by default all (`JointRecord.layer_names`).
        weight_decay: w in the formula above.
        iterations: at most so many.
        max_bytes: largest memory. If the images' vectors do not fit, the passes are re-run for a few blocks at a time.

    Returns:
        The token, of the method "probe", which reads `JointRecord`s; its embedding is (K, blocks * channels).

    Raises:
        TypeError: the records are no JointRecords.
        ValueError: records of several models or without a pipeline, or masks, options or `max_bytes` that do not fit.
    """
    options = Options(
        word=word, multiclass=multiclass, background=background, iterations=iterations, layers=layers,
        weight_decay=weight_decay, max_bytes=max_bytes
    )  # fmt: skip
    return _fit(list(records), list(masks), options, iterations, max_bytes)


def _fit(records: list[JointRecord], masks: list, options: Options, iterations: int, max_bytes: int) -> OptimizedToken:
    """The token of the formula above; it starts from the covariance of the image's vectors with the mask."""
    started, softmax = time.perf_counter(), options.softmax
    grids, words = read_masks(
        records, masks, options.words, multiclass=softmax, background=options.background, kind=JointRecord
    )
    matrix, channels_of = _reduced(records, chosen_layers(records[0], options.layers), len(words), softmax, max_bytes)
    targets, offset = pixels_of(grids).to(matrix), matrix.new_zeros(len(matrix))
    start = (targets - targets.mean(dim=1, keepdim=True)) @ (matrix - matrix.mean(dim=0)) / len(matrix)
    maps = linear_maps(matrix, offset)
    objective = objective_of(
        maps, _finite(maps(start)), grids, loss="bce", linear=True, multiclass=softmax, start=start, matrix=matrix,
        offset=offset, weight_decay=options.weight_decay, words=words, rows=tuple((k,) for k in range(len(words)))
    )  # fmt: skip
    info = info_of(records, records, options, optimizer="newton", iterations=iterations)
    solution = newton(objective, iterations)
    return token_of(objective, solution, method="probe", info=info, started=started, channels_of=channels_of)


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not values.isfinite().all():
        raise ValueError("the images' vectors hold NaN or infinite values: look at the images that made them")
    return values


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

    def rows(part: Sequence[str]) -> torch.Tensor:
        return linear_rows(records, (record.probe_map(part) for record in records))[0]

    if len(layers) * width <= pixels:
        return rows(layers), lambda z: z
    at_once = max(1, (max_bytes - 16 * pixels**2) // (20 * pixels * width))  # float32, float64, and their product
    parts = [layers[start : start + at_once] for start in range(0, len(layers), at_once)]
    whole = rows(layers) if len(parts) == 1 else None
    gram = torch.zeros(pixels, pixels, dtype=torch.float64, device=device_of(records))
    for part in parts:
        of_part = rows(part) if whole is None else whole
        gram.addmm_(of_part, of_part.T)
    values, vectors = torch.linalg.eigh(_finite(gram))
    large = values > SMALLEST * values[-1]
    roots, vectors = values[large].sqrt(), vectors[:, large]

    def channels_of(z: torch.Tensor) -> torch.Tensor:
        pixels = vectors @ (z / roots).T  # (P, K)
        return torch.cat([(rows(part) if whole is None else whole).T @ pixels for part in parts]).T

    return vectors * roots, channels_of
