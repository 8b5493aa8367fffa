"""Token optimisation: the text embedding whose heat maps fit given masks best (thesis, slides "Token optimisation").

    x-hat = argmin_x  1/n sum_j C(s LD_j(x) + b, G_j)  +  w |x - x_0|^2 / |x_0|^2      (images j = 1...n, masks G_j)

**LDAAM.** LD_j(x) = A_j x (`daamlib.attention.ldaam`), so the scale s is part of x, and with the binary cross-entropy,
or the softmax between classes, the problem is convex in (x, b): logistic regression of the masks' pixels on the rows of
A_j. L-BFGS solves it in tens of evaluations. It works in the coordinates v = L^T (x - x_0), where L L^T is the
covariance of the rows plus the weight decay: the rows are so strongly correlated that plain SGD on x needs thousands of
steps.

**DAAM.** The softmax makes every token's map depend on the whole text, so the whole text is optimised (thesis: X-hat').
All steps, heads and images are one batch, cut to a memory budget and never looped over one by one. This problem is not
convex, and a line search such as that of L-BFGS turns a rounding in the seventh digit into another text within some
tens of iterations. Gradient descent whose step length is set by the iteration alone forgets it: NovoGrad (Ginsburg et
al. 2019, arXiv:1905.11286), in the same coordinates.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from ..attention.record import MAX_BYTES, AttentionRecord, require_same_model
from ..attention.text import find_word
from .objective import Problem, linear_problem, loss_of, softmax_problem
from .token import OptimizedToken

BACKGROUND = "background"
ITERATIONS = {"lbfgs": 300, "novograd": 80, "sgd": 1000}
# Found by trial on the bundled model, on other scenes than those of the notebooks
DAAM_LR = 0.3  # of SGD
STEP = 2.0  # of NovoGrad: the length of its first steps, in the coordinates v
DAMPING = 0.01  # of these coordinates for NovoGrad, as a part of the rows' mean variance


@torch.inference_mode(False)  # it differentiates, whatever mode it is called in
def optimize_token(
    records: Sequence[AttentionRecord],
    masks: Sequence,
    *,
    method: str = "ldaam",
    word: str | Sequence[str] | None = None,
    text: str | None = None,
    loss: str = "bce",
    joint: bool = False,
    background: bool = False,
    optimizer: str | None = None,
    iterations: int | None = None,
    lr: float | None = None,
    weight_decay: float = 1e-5,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> OptimizedToken:
    """Fit text embeddings to the masks of a few images of one model, to read its other images with.

    records: n of one model; the fit runs where the first lies. masks: n, each (H, W) boolean, or (K, H, W) for K
    classes at once, of any size: they are resized to the record's `grid` by nearest neighbour (the pixel under each
    cell's centre). An image without a class (an empty mask) is a negative example; a class without any pixel, or that
    fills every image, is an error.

    method: "ldaam" fits one token of d_text numbers a class. It starts from the word's own embedding in `text`
    (default: the word alone), or without a word from random numbers of `seed`. "daam" fits all embeddings of `text`
    (default: the first record's prompt), start and end token included, padding not; the maps are those of the words in
    it, or without a word of the one whose plain map follows the mask best.
    word: the name of each class, K of them. The tokens of a word are averaged.
    loss: "bce", the binary cross-entropy of sigmoid(scale * map + bias), both learned; "dice", the soft Dice loss of
    the same; "cross_entropy", the thesis': the binary cross-entropy of the map scaled to its own [0, 1].
    joint: a softmax between the classes instead of a sigmoid each (not with "cross_entropy"); pixels of no class are
    left out. background: a softmax with one class more, of those pixels (LDAAM: a token of its own; DAAM: the start
    token).
    optimizer: "lbfgs" (LDAAM only), "novograd", or the thesis' "sgd"; default L-BFGS where the problem is convex (LDAAM
    with "bce"), else NovoGrad. iterations: default 300 for L-BFGS, which may end sooner, 80 for NovoGrad, 1000 for SGD.
    lr: of SGD, on (x - x_0) / |x_0| * sqrt(d_text); default 1 / the largest curvature for LDAAM, 0.3 for DAAM.
    weight_decay: w in the formula above. max_bytes: of attention probabilities held at a time (DAAM).

    Raises TypeError or ValueError for records of several models, masks that do not fit them, an unknown option, a
    word that is not in the text, or DAAM of records made with `store="linear"`.
    """
    started = time.perf_counter()
    joint = joint or background
    records, names = list(records), (word,) if isinstance(word, str) else tuple(word or ())
    _check_options(method, loss, optimizer, joint, weight_decay, iterations)
    grids = _read_masks(records, list(masks), names, joint, background)
    if background:
        grids = [torch.cat([grid, ~grid.any(dim=0, keepdim=True)]) for grid in grids]
    if method == "ldaam":
        start = _start_tokens(records[0], names, text, len(grids[0]), seed)
        problem = linear_problem(records, grids)
    else:
        start, rows = _start_text(records, grids, names, text, background)
        problem = softmax_problem(records, grids, rows, max_bytes)
    optimizer = optimizer or ("lbfgs" if method == "ldaam" and loss == "bce" else "novograd")
    iterations = iterations or ITERATIONS[optimizer]
    fit = _Fit(problem, start, loss_of(problem, loss, joint=joint), weight_decay)
    solve = {"lbfgs": fit.lbfgs, "novograd": fit.novograd, "sgd": functools.partial(fit.sgd, lr=lr)}[optimizer]
    losses = solve(iterations)
    embedding, scale, bias, last, gradient = fit.result()
    if not names:
        names = tuple(f"class {k}" for k in range(len(grids[0]) - background)) if len(grids[0]) > 1 else ("token",)
    return OptimizedToken(
        embedding=embedding.float().cpu(),
        method=method,
        words=names + ((BACKGROUND,) if background else ()),
        rows=problem.rows,
        scale=tuple(scale.tolist()),
        bias=tuple(bias.tolist()),
        losses=(*losses, last),
        gradient_norm=gradient,
        seconds=time.perf_counter() - started,
        info={
            "model": str(getattr(records[0].pipe, "name_or_path", None)),  # it may be a Path
            "fingerprint": {name: list(numbers) for name, numbers in records[0].fingerprint.layers.items()},
            "prompts": [record.prompt for record in records],
            "passes": [len(record.timesteps) for record in records],  # whose sum a map is
            "text": text,
            "word": list(names) if word else None,
            "loss": loss,
            "joint": joint,
            "optimizer": optimizer,
            "iterations": iterations,
            "lr": lr,
            "weight_decay": weight_decay,
            "seed": seed,
        },
    )


class _Fit:
    """The parameters and their objective: embeddings start + v @ basis, and a scale and a bias for every class.

    Maps enter the losses standardised, (map - centre) / unit, so that one starting point suits every model.
    """

    def __init__(self, problem: Problem, start: torch.Tensor, loss: Callable, weight_decay: float):
        self.problem, self.loss = problem, loss
        self.start = start.detach().to(problem.targets)
        self.decay = weight_decay / self.start.square().sum()
        with torch.no_grad():
            maps = problem.maps(self.start)
            if not maps.isfinite().all():
                raise ValueError("the records' maps hold NaN or infinite values: look at the images that made them")
            self.unit = maps.std(dim=1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
            self.centre = maps.mean(dim=1, keepdim=True)
        frequency = problem.targets.mean(dim=1, keepdim=True)
        self.bias = torch.log(frequency / (1 - frequency)).requires_grad_()
        # Its logarithm: a negative scale would turn the map over, and where the class is would be dark. LDAAM is
        # linear in the embedding, which holds the scale already.
        self.log_scale = torch.zeros_like(self.bias).requires_grad_(not problem.linear)
        self.length = self.start.square().mean().sqrt()  # of one number of the start
        self.basis: torch.Tensor = self.length
        self.v = torch.zeros_like(self.start, requires_grad=True)

    def embedding(self) -> torch.Tensor:
        change = self.v @ self.basis if self.basis.ndim else self.v * self.basis
        return self.start + change

    def objective(self, embedding: torch.Tensor) -> torch.Tensor:
        maps = self.problem.maps(embedding)
        centre = self.centre
        if self.problem.linear:  # the mean map moves with the token; taken out, it does not fight the bias
            centre = maps.mean(dim=1, keepdim=True)
        logits = self.log_scale.exp() * (maps - centre) / self.unit + self.bias
        return self.loss(maps, logits) + self.decay * (embedding - self.start).square().sum()

    def curvature(self) -> torch.Tensor:
        """(d, d): an upper bound of the Hessian of the binary cross-entropy in one LDAAM token."""
        hessian = 0.25 * self.problem.covariance / self.unit.double().min() ** 2
        return hessian + 2 * self.decay * torch.eye(len(hessian)).to(hessian)

    def lbfgs(self, iterations: int) -> list[float]:
        curvature = self.curvature()
        jitter = 1e-10 * curvature.diagonal().mean()  # without weight decay the rows may not span the space
        self.basis = _whitening(curvature + jitter * torch.eye(len(curvature)).to(curvature)).to(self.start)
        losses: list[float] = []
        solver = torch.optim.LBFGS(
            [self.v, self.bias],
            max_iter=iterations,
            history_size=30,
            tolerance_grad=1e-9,
            tolerance_change=1e-13,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            solver.zero_grad()
            value = self.objective(self.embedding())
            value.backward()
            losses.append(value.item())
            return value

        solver.step(closure)
        return losses

    def scale_held(self, iterations: int) -> int:
        """For how many iterations the scale of DAAM is held.

        Of a map that starts upside down it would only fall to zero, where the embedding has no gradient any more.
        """
        return (iterations + 1) // 2 if self.log_scale.requires_grad else iterations

    def novograd(self, iterations: int) -> list[float]:
        """Momentum of gradients over a running mean of their length; the step warms up, and falls to zero at the end.

        Nothing in it branches on a value, so roundings stay roundings; there is no rate to find for a new model.
        """
        covariance = self.problem.covariance / self.problem.covariance.diagonal().mean()
        damped = covariance + DAMPING * torch.eye(len(covariance)).to(covariance)
        self.basis = self.length * _whitening(damped).to(self.start)
        parameters = [(self.v, STEP), (self.bias, 0.1)]
        if self.log_scale.requires_grad:
            parameters.append((self.log_scale, 0.1))
        momentum = [torch.zeros_like(parameter) for parameter, _ in parameters]
        square = [0.0] * len(parameters)
        losses, held = [], self.scale_held(iterations)
        for i in range(iterations):
            value = self.objective(self.embedding())
            moved = [parameter for parameter, _ in parameters]
            gradients = torch.autograd.grad(value, moved, materialize_grads=True)  # "cross_entropy" has no bias
            losses.append(value.item())
            done = (i + 1) / iterations
            fall = 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.3) / 0.7))
            rate = min(1.0, (i + 1) / max(8, iterations / 10), fall)
            for k, ((parameter, step), gradient) in enumerate(zip(parameters, gradients, strict=True)):
                square[k] = 0.95 * square[k] + 0.05 * gradient.square().sum()
                length = (square[k] / (1 - 0.95 ** (i + 1))).sqrt() + torch.finfo(gradient.dtype).tiny
                momentum[k] = 0.9 * momentum[k] + 0.1 * gradient / length
                if parameter is not self.log_scale or i >= held:
                    with torch.no_grad():
                        parameter -= step * rate * momentum[k] / (1 - 0.9 ** (i + 1))
        return losses

    def sgd(self, iterations: int, lr: float | None) -> list[float]:
        if lr is None:
            linear = self.problem.linear
            lr = 1 / (torch.linalg.eigvalsh(self.curvature())[-1] * self.length**2).item() if linear else DAAM_LR
        # the calibration acts on standardised maps, whose curvature is at most 1/4
        calibration = [self.bias] + [self.log_scale] * self.log_scale.requires_grad
        solver = torch.optim.SGD([{"params": [self.v], "lr": lr}, {"params": calibration, "lr": 1.0}])
        losses, held = [], self.scale_held(iterations)
        for i in range(iterations):
            solver.zero_grad()
            value = self.objective(self.embedding())
            value.backward()
            if i < held:
                self.log_scale.grad = None
            solver.step()
            losses.append(value.item())
        return losses

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
        """Embedding (m, d), scale (K,) and bias (K,) of the raw maps, last loss, gradient norm times |x_0|."""
        embedding = self.embedding().detach().requires_grad_()
        value = self.objective(embedding)
        (gradient,) = torch.autograd.grad(value, embedding)
        with torch.no_grad():
            centre = self.centre
            if self.problem.linear:
                centre = self.problem.maps(embedding).mean(dim=1, keepdim=True)
            scale = self.log_scale.exp() / self.unit
            bias = self.bias - scale * centre
        norm = (gradient.norm() * self.start.norm()).item()
        return embedding.detach(), scale.flatten(), bias.flatten(), value.item(), norm


def _whitening(metric: torch.Tensor) -> torch.Tensor:
    """L^-1 for the (d, d) metric L L^T: rows v @ L^-1 of round coordinates v."""
    return torch.linalg.inv(torch.linalg.cholesky(metric))


def _start_tokens(record: AttentionRecord, names: tuple, text: str | None, count: int, seed: int) -> torch.Tensor:
    """(count, d_text) float32 on the CPU: the embedding of each word (its tokens averaged); random without a word."""
    tokens = []
    for name in names:
        embeddings = record.encode(text or name)
        rows = find_word(name, embeddings.words, embeddings.tokens)
        tokens.append(embeddings.values[rows].float().mean(dim=0).cpu())
    prompt = record.prompt_embeddings.values.float().cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count - len(tokens), record.d_text, generator=generator).to(prompt) * prompt.std()
    return torch.cat([torch.stack(tokens), noise]) if tokens else noise


def _start_text(
    records: Sequence[AttentionRecord], grids: Sequence[torch.Tensor], names: tuple, text: str | None, background: bool
) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    """(m, d_text) embeddings of the text, and the rows of each class in it."""
    if records[0].layers[0].queries is None:
        raise ValueError('DAAM needs the queries of every step: trace with store="queries", or use method="ldaam"')
    embeddings = records[0].text_embeddings(text, padding=False)
    if names:
        rows = [tuple(find_word(name, embeddings.words, embeddings.tokens)) for name in names]
    elif embeddings.words:
        rows = _closest_words(records, grids, embeddings, len(grids[0]) - background)
    else:
        raise ValueError("DAAM needs a text with a word in it: give `text`, and the `word` in it")
    if background:
        rows.append((0,))
    return embeddings.values.float(), tuple(rows)


def _closest_words(records, grids, embeddings, count: int) -> list[tuple[int, ...]]:
    """For each class the rows of the word whose plain map correlates best with its masks."""
    words = [tuple(range(word.start, word.stop)) for word in embeddings.words]
    with torch.no_grad():
        problem = softmax_problem(records, grids, tuple(words), MAX_BYTES)
        maps = problem.maps(embeddings.values.float())
    fits = torch.corrcoef(torch.cat([problem.targets, maps]))[: len(grids[0]), len(grids[0]) :].nan_to_num(-1)
    return [words[i] for i in fits[:count].argmax(dim=1).tolist()]


def _check_options(method, loss, optimizer, joint, weight_decay, iterations) -> None:
    choices = {
        "method": (method, ("ldaam", "daam")),
        "loss": (loss, ("bce", "cross_entropy", "dice")),
        "optimizer": (optimizer or "novograd", tuple(ITERATIONS)),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if method == "daam" and optimizer == "lbfgs":
        raise ValueError('L-BFGS fits LDAAM only: DAAM\'s result would depend on roundings; use optimizer="novograd"')
    if joint and loss == "cross_entropy":
        raise ValueError('a softmax between classes needs calibrated maps: use loss="bce" or "dice"')
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be 0 or a positive number, got {weight_decay!r}")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations!r}")


def _read_masks(records: list, masks: list, names: tuple, joint: bool, background: bool) -> list[torch.Tensor]:
    """The masks as (K, h, w) booleans on their record's grid, all on the first record's device."""
    if not records:
        raise ValueError("no training images: give one or more records, each with its mask")
    strange = next((record for record in records if not isinstance(record, AttentionRecord)), None)
    if strange is not None:
        raise TypeError(f"records must be AttentionRecords, got {type(strange).__name__}")
    if len(masks) != len(records):
        raise ValueError(f"{len(masks)} masks for {len(records)} records: give one mask for each record")
    require_same_model(records)
    pairs = enumerate(zip(masks, records, strict=True))
    grids = [_resized(mask, record, number).to(records[0].device) for number, (mask, record) in pairs]
    counts = {len(grid) for grid in grids}
    if len(counts) > 1 or (names and counts != {len(names)}):
        wanted = f"{len(names)} words {list(names)}" if names else "one number of classes in all images"
        raise ValueError(f"the masks have {sorted(counts)} classes, expected {wanted}")
    together = torch.cat([grid.flatten(1) for grid in grids], dim=1)
    for k, pixels in enumerate(together):
        if pixels.all() or not pixels.any():
            kind = "fill every image" if pixels.all() else "are all empty"
            raise ValueError(
                f"the masks of {names[k] if names else f'class {k}'} {kind} at the maps' sizes "
                f"{sorted({record.grid for record in records})}: there is nothing to tell apart"
            )
    if joint and not background and len(together) == 1:
        raise ValueError("a softmax needs two classes or more: give masks of several, or background=True")
    if joint and (together.sum(dim=0) > 1).any():
        raise ValueError("masks overlap: a softmax between classes gives each pixel to one class")
    return grids


def _resized(mask, record: AttentionRecord, number: int) -> torch.Tensor:
    mask = torch.as_tensor(np.array(mask) if not isinstance(mask, torch.Tensor) else mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask {number} is {mask.dtype}, expected boolean: compare first, as labels == id")
    if mask.ndim not in (2, 3) or not mask.numel():
        raise ValueError(f"mask {number} has shape {tuple(mask.shape)}, expected (H, W) or (K, H, W)")
    mask = mask[None] if mask.ndim == 2 else mask
    return F.interpolate(mask[None].float(), record.grid, mode="nearest-exact")[0].bool()
