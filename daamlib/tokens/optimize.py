"""Token optimisation: the text embedding whose heat maps fit given masks best (thesis, slides "Token optimisation").

    x-hat = argmin_x  1/n sum_j C(s LD_j(x) + b, G_j)  +  w |x - x_0|^2 / |x_0|^2      (images j = 1...n, masks G_j)

**LDAAM.** LD_j(x) = A_j x (`daamlib.attention.ldaam`), so the scale s is part of x, and with the binary cross-entropy,
or the softmax between classes, the problem is convex in (x, b): logistic regression of the masks' pixels on the rows of
A_j. Newton's method solves it to the precision of float64 in 10 to 30 iterations. The rows are so strongly correlated
that plain gradient descent on x needs thousands of steps.

**DAAM.** The softmax makes every token's map depend on the whole text, so the whole text is optimised (thesis: X-hat').
All steps, heads and images are one batch, cut to a memory budget and never looped over one by one. This problem is not
convex, and a line search turns a rounding in the seventh digit into another text within some tens of iterations.
Gradient descent whose step length is set by the iteration alone does not: NovoGrad.

**Other keys.** Keys with a bias make LD_j(x) = A_j x + o_j: the problem stays convex. Keys that are normalised make it
LD_j(x) = sum_i r_i(x) (A_ji x + o_ji), which is not: NovoGrad again. In a model that projects its text embeddings
before its attentions read them (PixArt, Sana), x is a projected one, and no prompt can be made of it.

Masks of any size are resized to the record's `grid` by nearest neighbour (the pixel under each cell's centre).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.ldaam import LinearMap
from ..attention.record import MAX_BYTES, AttentionRecord
from .inputs import made_of, read_masks, require_records, select_part, start_text, start_tokens
from .objective import Objective, Rows, linear_maps, linear_rows, normed_maps, objective_of, softmax_maps
from .solvers import newton, novograd, token_of
from .token import OptimizedToken

ITERATIONS = {newton: 100, novograd: 80}
METHODS = ("ldaam", "daam")
LOSSES = ("bce", "cross_entropy", "dice")


@dataclass(frozen=True)
class Options:
    """Options of `optimize_token`, checked; see there."""

    method: str = "ldaam"
    word: str | Sequence[str] | None = None
    text: str | None = None
    loss: str = "bce"
    multiclass: bool = False
    background: bool = False
    iterations: int | None = None
    layers: Sequence[str] | None = None
    max_timestep: int | None = None
    weight_decay: float = 1e-5
    seed: int = 0
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if self.softmax and self.loss == "cross_entropy":
            raise ValueError('a softmax between classes needs calibrated maps: use loss="bce" or "dice"')
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be 0 or a positive number, got {self.weight_decay!r}")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations must be 1 or more, got {self.iterations!r}")

    @property
    def words(self) -> tuple[str, ...]:
        """Names of the classes."""
        return (self.word,) if isinstance(self.word, str) else tuple(self.word or ())

    @property
    def softmax(self) -> bool:
        """True if classes compete."""
        return self.multiclass or self.background


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

        car = daamlib.optimize_token(records, masks, word="car")
        car.probabilities(record)[0]  # (H, W)

    Args:
        records: n images; the fit runs where the first lies.
        masks: n, each (H, W) boolean, or (K, H, W) for K classes, with the image's ratio of height and width. An empty
            mask is a negative example; a class without any pixel, or that fills every image, is an error.
        method: "ldaam" fits a token for each class, from its word's embedding in `text` (default: the word alone) or,
            without a word, from random numbers. "daam" fits all embeddings of `text` (default: the first record's
            prompt) but padding; without a word it reads the one whose map follows the mask best.
        word: Name of each class, K of them. The tokens of a word are averaged.
        text: See `method`.
        loss: "bce", "dice" or the thesis' "cross_entropy", see `daamlib.tokens.objective`.
        multiclass: A softmax between the classes instead of a sigmoid each; pixels of no class are left out.
        background: A softmax with one class more, of those pixels (LDAAM: a token; DAAM: the start token).
        iterations: At most so many of Newton's method (default 100), or so many of NovoGrad (80).
        layers: Names of the layers to read (default: all), of other records, too.
        max_timestep: Largest timestep of the passes to read, of the training schedule (Stable Diffusion: 0 ... 999).
            Applied to other records, too; a record without such a pass uses its least noisy one.
        weight_decay: w in the formula above. `choose_settings` finds these three for LDAAM.
        seed: Seed of the random numbers.
        max_bytes: Largest size of the attention probabilities held at a time (DAAM, default 64 MiB), or of Newton's
            Hessian and its factor, 16 (K (d_text + 1))^2 bytes with a softmax (default 4 GiB).

    Returns:
        The token, on the CPU.

    Raises:
        TypeError: The records are no AttentionRecords.
        ValueError: Records, masks, words or options do not fit together, a result is not finite, or `max_bytes` is
            too small.
    """
    options = Options(
        method, word, text, loss, multiclass, background, iterations, layers, max_timestep, weight_decay, seed,
        max_bytes
    )  # fmt: skip
    return _fit(list(records), list(masks), options)


def _fit(records: list[AttentionRecord], masks: list, options: Options) -> OptimizedToken:
    """The token of the formula above, by Newton's method where the problem is convex."""
    started, parts = time.perf_counter(), _parts(records, options)
    objective = _objective(parts, masks, options)
    solve = newton if objective.centre is None and options.loss == "bce" else novograd
    iterations = options.iterations or ITERATIONS[solve]
    limits = {} if solve is novograd or options.max_bytes is None else {"max_bytes": options.max_bytes}
    solution = solve(objective, iterations, **limits)
    more = {"text": options.text, "max_timestep": options.max_timestep, "seed": options.seed}
    info = info_of(records, parts, options, optimizer=solve.__name__, iterations=iterations, **more)
    return token_of(objective, solution, method=options.method, info=info, started=started)


def _parts(records: list[AttentionRecord], options: Options) -> list[AttentionRecord]:
    """The layers and passes of the records that the token reads."""
    require_records(records)
    return [select_part(record, options.layers, options.max_timestep) for record in records]


def info_of(records: list, parts: list, options: Options, **more: Any) -> dict[str, Any]:
    """Return the `info` of a token fitted to `parts` of these records."""
    return {
        **made_of(records),
        "passes": [len(record.timesteps) for record in parts],  # whose sum a map is
        "word": list(options.words) or None,
        "loss": options.loss,
        "multiclass": options.softmax,
        "layers": None if options.layers is None else list(options.layers),
        "weight_decay": options.weight_decay,
        **more,
    }


def token_objective(records: Iterable[AttentionRecord], masks: Iterable, **options: Any) -> Objective:
    """Return the function that `optimize_token` minimises, with its start, to be minimised otherwise.

        objective = daamlib.token_objective(records, masks, word="car", weight_decay=1e-3)
        objective(objective.start, objective.first_bias)

    Options and errors are those of `optimize_token`. LDAAM computes in float64, DAAM in float32.
    """
    checked = Options(**options)
    return _objective(_parts(list(records), checked), list(masks), checked)


def _objective(records: list[AttentionRecord], masks: list, options: Options) -> Objective:
    """The objective of all layers and passes of these records."""
    grids, words = read_masks(
        records, masks, options.words, multiclass=options.softmax, background=options.background, kind=AttentionRecord
    )
    if options.method == "ldaam":
        rows: Rows = tuple((k,) for k in range(len(words)))
        start = start_tokens(records[0], options.words, options.text, len(words), options.seed).to(records[0].device)
    else:
        start, rows = start_text(records, grids, options.words, options.text, options.background)
    collapsed = [record.linear_map() for record in records]
    of_keys = [each if isinstance(each, LinearMap) else each.near(start) for each in collapsed]
    matrix, offset = linear_rows(records, of_keys)
    linear = options.method == "ldaam" and isinstance(collapsed[0], LinearMap)
    if linear:
        start, maps = start.to(matrix), linear_maps(matrix, offset)
    elif options.method == "ldaam":
        maps = normed_maps(records)
    else:
        maps = softmax_maps(records, rows, options.max_bytes or MAX_BYTES)
    with torch.no_grad():
        first = maps(start)
    for record, part in zip(records, first.split([grid[0].numel() for grid in grids], dim=1), strict=True):
        record.finite(part)
    return objective_of(
        maps, first, grids, loss=options.loss, linear=linear, multiclass=options.softmax, start=start, matrix=matrix,
        offset=offset, weight_decay=options.weight_decay, words=words, rows=rows
    )  # fmt: skip
