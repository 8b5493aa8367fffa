"""Token optimisation: the text embedding whose heat maps fit given masks best (thesis, slides "Token optimisation").

    x-hat = argmin_x  1/n sum_j C(s LD_j(x) + b, G_j)  +  w |x - x_0|^2 / |x_0|^2      (images j = 1...n, masks G_j)

**LDAAM.** LD_j(x) = A_j x (`daamlib.attention.ldaam`), so the scale s is part of x, and with the binary cross-entropy,
or the softmax between classes, the problem is convex in (x, b): logistic regression of the masks' pixels on the rows of
A_j. Newton's method solves it to the precision of float64 in 10 to 30 iterations. The rows are so strongly correlated
that plain gradient descent on x needs thousands of steps.

**DAAM.** The softmax makes every token's map depend on the whole text, so the whole text is optimised (thesis: X-hat').
All steps, heads and images are one batch, cut to a memory budget and never looped over one by one. This problem is not
convex, and a line search turns a rounding in the seventh digit into another text within some tens of iterations.
Gradient descent whose step length is set by the iteration alone forgets it: NovoGrad.

**Other keys.** Keys with a bias make LD_j(x) = A_j x + o_j: the problem stays convex. Keys that are normalised make it
LD_j(x) = sum_i r_i(x) (A_ji x + o_ji), which is not: NovoGrad again. In a model that projects its text embeddings
before its attentions read them, x is a projected one.
"""

import time
from collections.abc import Iterable, Sequence

import torch

from ..attention.ldaam import LinearMap
from ..attention.record import MAX_BYTES, AttentionRecord
from .inputs import Rows, made_of, read_masks, select_part, start_text, start_tokens
from .objective import Objective, linear_maps, linear_rows, loss_of, normed_maps, pixel_weights, softmax_maps
from .solvers import newton, novograd, solved
from .token import OptimizedToken

BACKGROUND = "background"  # the name of the class of what no mask covers
ITERATIONS = {newton: 100, novograd: 80}


@torch.inference_mode(False)  # it differentiates, whatever mode it is called in
def optimize_token(
    records: Iterable[AttentionRecord],
    masks: Iterable,
    *,
    method: str = "ldaam",
    word: str | Sequence[str] | None = None,
    text: str | None = None,
    loss: str = "bce",
    multiclass: bool = False,
    background: bool = False,
    iterations: int | None = None,
    layers: Sequence[str] | None = None,
    max_timestep: int | None = None,
    weight_decay: float = 1e-5,
    seed: int = 0,
    max_bytes: int | None = None,
) -> OptimizedToken:
    """Fit text embeddings to the masks of a few images of one model, to read its other images with.

    Newton's method where the problem is convex (LDAAM with "bce", of keys that are not normalised), else NovoGrad.

    The token reads images. No prompt can be made of it where the model projects its text embeddings before attention
    reads them (PixArt, Sana): the token is such a projected embedding.

    Args:
        records: n images of one model; the fit runs where the first lies.
        masks: n, each (H, W) boolean, or (K, H, W) for K classes at once, of any size: they are resized to the record's
            `grid` by nearest neighbour (the pixel under each cell's centre), with the image's ratio of height and
            width. An image without a class (an empty mask)
            is a negative example; a class without any pixel, or that fills every image, is an error.
        method: "ldaam" fits one token of d_text numbers a class. It starts from the word's own embedding in `text`
            (default: the word alone), or without a word from random numbers of `seed`. "daam" fits all embeddings of
            `text` (default: the first record's prompt), start and end token included, padding not; the maps are those
            of the words in it, or without a word of the one whose plain map follows the mask best.
        word: The name of each class, K of them. The tokens of a word are averaged.
        text: See `method`.
        loss: "bce", the binary cross-entropy of sigmoid(scale * map + bias), both learned; "dice", the soft Dice loss
            of the same; "cross_entropy", the thesis': the binary cross-entropy of the map scaled to its own [0, 1].
        multiclass: A softmax between the classes instead of a sigmoid each (not with "cross_entropy"); pixels of no
            class are left out.
        background: A softmax with one class more, of those pixels (LDAAM: a token of its own; DAAM: the start token).
        iterations: At most so many of Newton's method, which ends sooner (default 100), or so many of NovoGrad (80).
        layers: Names of the layers to read, by default all. The token reads other records likewise.
        max_timestep: Read only the passes with a timestep up to this one (of the training schedule, 0 ... 999 for
            Stable Diffusion), the less noisy ones. Other records likewise; one without such a pass by its least noisy.
        weight_decay: w in the formula above. `choose_settings` finds these three for LDAAM.
        seed: Of the random start.
        max_bytes: Of attention probabilities held at a time (DAAM, by default 64 MiB), or of Newton's Hessian and its
            factor, 16 (K (d_text + 1))^2 bytes for K classes with a softmax (by default 4 GiB): more is refused.

    Returns:
        The token, on the CPU.

    Raises:
        TypeError: Something else than records was given.
        ValueError: Records of several models, masks that do not fit them, an unknown option, a word that is not in the
            text, an unknown layer, DAAM of records made with `store="linear"`, maps or a result that are not finite,
            or more memory than `max_bytes`.
    """
    started = time.perf_counter()
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations!r}")
    records = list(records)
    reading = [select_part(record, layers, max_timestep) for record in records]
    objective = token_objective(
        reading, masks, method=method, word=word, text=text, loss=loss, multiclass=multiclass, background=background,
        weight_decay=weight_decay, seed=seed, max_bytes=max_bytes or MAX_BYTES
    )  # fmt: skip
    solve = newton if objective.centre is None and loss == "bce" else novograd
    iterations = iterations or ITERATIONS[solve]
    limits = {} if solve is novograd or max_bytes is None else {"max_bytes": max_bytes}
    fit = solved(objective, solve(objective, iterations, **limits))
    return OptimizedToken(
        embedding=fit.embedding.float().cpu(),
        method=method,
        **fit.fields,
        seconds=time.perf_counter() - started,
        info={
            **made_of(records),
            "passes": [len(record.timesteps) for record in reading],  # whose sum a map is
            "text": text,
            "word": [word] if isinstance(word, str) else list(word or ()) or None,
            "loss": loss,
            "multiclass": objective.multiclass,
            "optimizer": solve.__name__,
            "iterations": iterations,
            "layers": None if layers is None else list(layers),
            "max_timestep": max_timestep,
            "weight_decay": weight_decay,
            "seed": seed,
        },
    )


def token_objective(
    records: Iterable[AttentionRecord],
    masks: Iterable,
    *,
    method: str = "ldaam",
    word: str | Sequence[str] | None = None,
    text: str | None = None,
    loss: str = "bce",
    multiclass: bool = False,
    background: bool = False,
    weight_decay: float = 1e-5,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Objective:
    """What `optimize_token` minimises, with its start, to be minimised otherwise.

    Arguments and errors are those of `optimize_token`. LDAAM computes in float64, DAAM in float32.
    """
    for name, value, known in (
        ("method", method, ("ldaam", "daam")),
        ("loss", loss, ("bce", "cross_entropy", "dice")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    multiclass = multiclass or background
    if multiclass and loss == "cross_entropy":
        raise ValueError('a softmax between classes needs calibrated maps: use loss="bce" or "dice"')
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be 0 or a positive number, got {weight_decay!r}")
    names = (word,) if isinstance(word, str) else tuple(word or ())
    records = list(records)
    outside = BACKGROUND if background else None
    grids, words = read_masks(records, list(masks), names, multiclass=multiclass, background=outside)
    if method == "ldaam":
        rows: Rows = tuple((k,) for k in range(len(words)))
        start = start_tokens(records[0], names, text, len(words), seed).to(records[0].device)
    else:
        start, rows = start_text(records, grids, names, text, background)
    matrix, offset = linear_rows(records, start)
    linear = method == "ldaam" and isinstance(records[0].linear_map(), LinearMap)
    if linear:
        start, maps = start.to(matrix), linear_maps(matrix, offset)
    elif method == "ldaam":
        maps = normed_maps(records)
    else:
        maps = softmax_maps(records, rows, max_bytes)
    with torch.no_grad():
        first = maps(start)
    sizes = [grid[0].numel() for grid in grids]
    for record, part in zip(records, first.split(sizes, dim=1), strict=True):
        record.finite(part)
    targets = torch.cat([grid.flatten(1) for grid in grids], dim=1).to(first)
    weights = pixel_weights(sizes).to(first)
    return Objective(
        maps=maps,
        loss=loss_of(loss, targets, weights, sizes, multiclass=multiclass),
        start=start,
        targets=targets,
        weights=weights,
        matrix=matrix,
        offset=offset,
        unit=first.std(dim=1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny),
        centre=None if linear else first.mean(dim=1, keepdim=True),
        weight_decay=weight_decay,
        multiclass=multiclass,
        words=words,
        rows=rows,
    )
