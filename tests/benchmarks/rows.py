"""The rows of the table: each function times one thing, ours and the plain way in turn, and checks that they agree."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import models
import naive
import numpy as np
import torch

import daamlib
from daamlib import metrics
from daamlib.attention.layers import KeyProjection, Layer
from daamlib.cityscapes import label_id
from daamlib.pipeline import cpu_threads
from daamlib.tokens.optimize import token_objective
from daamlib.widgets import explore


@dataclass(frozen=True)
class Row:
    """ours, theirs: seconds (or bytes) of each round. ratio: the median over the rounds, since both drift together.

    cost: the ratio is ours / theirs, at most `to_reach`; else it is theirs / ours, at least `to_reach`. None: nothing
    is asked.
    """

    what: str
    against: str
    ours: list[float]
    theirs: list[float]
    to_reach: float | None
    cost: bool = False
    note: str = ""
    unit: str = "s"

    @property
    def ratio(self) -> float:
        pairs = zip(self.ours, self.theirs, strict=True)
        return statistics.median(a / b if self.cost else b / a for a, b in pairs)

    @property
    def reached(self) -> bool | None:
        if self.to_reach is None:
            return None
        return self.ratio <= self.to_reach if self.cost else self.ratio >= self.to_reach


def in_turn(repeats: int, *functions: Callable, device: str, inner: int = 1) -> list[list[float]]:
    """Seconds of each function in each round, one after the other, after a first round that is not counted.

    Every other round goes backwards, so that a machine that grows slower favours none. inner: how often the first, the
    fast one, is called in a round; its time is divided by that.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for number, function in list(enumerate(functions))[:: (-1) ** turn]:
            calls = inner if number == 0 else 1
            _wait(device)
            started = time.perf_counter()
            for _ in range(calls):
                function()
            _wait(device)
            if turn:
                times[number].append((time.perf_counter() - started) / calls)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= tolerance:
        raise AssertionError(f"the two ways differ by {error:.1e} of the largest value: nothing to time")


# -- generation ------------------------------------------------------------------------------------------------------


def generation(model: models.Model, repeats: int, device: str) -> list[Row]:
    """The pipeline inside `trace`, and without. The seconds vary by more than is asked: many rounds."""

    def traced(store, self_attention=False):
        with daamlib.trace(model.pipe, store=store, self_attention=self_attention) as trace:
            images = model.generate()
        len(trace)
        return images

    plain = model.generate()
    if isinstance(plain, torch.Tensor) and not torch.equal(plain, traced("linear")):
        raise AssertionError("tracing changed the latents")
    rounds = (5 if model.shape == "bundled" else 2) * repeats
    queries, linear, both, mean, base = in_turn(
        rounds,
        lambda: traced("queries"),
        lambda: traced("linear"),
        lambda: traced("queries", self_attention=True),
        lambda: traced("linear", self_attention=True),
        model.generate,
        device=device,
    )
    guided = "guidance" if model.guidance > 1 else "no guidance"
    note = f"{model.batch} x {model.size} px, {model.steps} steps, {guided}"
    return [
        Row('generation, trace(store="linear")', "plain pipeline", linear, base, 1.03, cost=True, note=note),
        Row('generation, trace(store="queries")', "plain pipeline", queries, base, 1.05, cost=True, note=note),
        Row("the same with self_attention", "plain pipeline", both, base, 1.05, cost=True, note=note),
        Row('store="linear" with self_attention', "plain pipeline", mean, base, 1.05, cost=True, note=note),
    ]


def memory(model: models.Model, repeats: int, device: str) -> list[Row]:
    """Bytes a record keeps. One step of the queries is measured and counted 50 times: their buffer is as long."""
    size = model.size if model.shape == "bundled" else model.size // 2  # the ratio does not depend on it

    def kept(store, steps):
        with daamlib.trace(model.pipe, store=store) as trace:
            replace(model, batch=1).generate(steps, size)
        return trace[0]

    one, three = kept("linear", 1).nbytes, kept("linear", 3).nbytes
    if one != three:
        raise AssertionError(f"the sums take {one} bytes after one step and {three} after three")
    queries = 50 * 4 * sum(layer.queries.numel() for layer in kept("queries", 1).layers)
    note = f"{size} px, 50 steps; the same for 1 and 3 steps"
    return [Row('bytes, store="linear"', "queries in float32", [one], [queries], 25, note=note, unit="bytes")]


# -- heat maps -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ldaam(model: models.Model, repeats: int, device: str) -> list[Row]:
    """One word's map from the collapsed tensor, against the loop, and against reading the tensor once."""
    (record,) = models.records(model, 1, 30)
    embedding = torch.randn(1, record.d_text, generator=torch.Generator().manual_seed(0)).to(device)
    started = time.perf_counter()
    linear = record.linear_map()
    _wait(device)
    collapse = time.perf_counter() - started
    _same(linear(embedding)[0], naive.ldaam(record, embedding[0]))
    ours, loop, once = in_turn(
        repeats,
        lambda: linear(embedding),
        lambda: naive.ldaam(record, embedding[0]),
        lambda: [linear.weight.sum() for _ in range(50)],
        device=device,
        inner=50,
    )
    once = [seconds / 50 for seconds in once]
    note = f"30 steps; to collapse, once an image: {collapse:.3f} s"
    megabytes = f"{linear.weight.nbytes / 1e6:.1f} MB"
    return [
        Row("LDAAM map of one word", "loop over steps, layers, heads", ours, loop, 500, note=note),
        Row("LDAAM map of one word", "one pass over the weights", ours, once, 3, cost=True, note=megabytes),
    ]


@torch.no_grad()
def daam(model: models.Model, repeats: int, device: str) -> list[Row]:
    """All maps of a text, on one thread."""
    (record,) = models.records(model, 1, 30)
    rows = []
    with cpu_threads(1):
        for tokens in (3, 77):
            text = torch.randn(tokens, record.d_text, generator=torch.Generator().manual_seed(0)).to(device)
            _same(record.daam_from(text).values, naive.daam(record, text))
            ours, loop = in_turn(
                repeats, lambda x=text: record.daam_from(x), lambda x=text: naive.daam(record, x), device=device
            )
            rows.append(
                Row(f"OV-DAAM maps, {tokens} tokens", "loop over steps and layers", ours, loop, 3,
                    note="30 steps, one thread")
            )  # fmt: skip
    return rows


@torch.no_grad()
def published(model: models.Model, repeats: int, device: str) -> list[Row]:
    """All maps of a text of 4 steps on one thread, against what the published OVAM does, and against products alone.

    The products of queries that lie head by head with the keys are a part of every exact way: how fast it can be.
    """
    (record,) = models.records(model, 1, 4)
    queries = naive.by_head(record)
    rows = []
    with cpu_threads(1):
        for tokens in (3, 10, 77):
            text = torch.randn(tokens, record.d_text, generator=torch.Generator().manual_seed(0)).to(device)
            _same(record.daam_from(text).values, naive.published_daam(record, queries, text))
            keys = [layer.keys(text) for layer in record.layers]
            ours, theirs, products = in_turn(
                3 * repeats,
                lambda x=text: record.daam_from(x),
                lambda x=text: naive.published_daam(record, queries, x),
                lambda k=keys: [
                    [of_layer @ of_step.mT for of_step in steps] for of_layer, steps in zip(k, queries, strict=True)
                ],
                device=device,
            )
            what, note = f"OV-DAAM maps, {tokens} tokens", "4 steps, one thread"
            rows.append(Row(what, "the operations of ovam", ours, theirs, 2, note=note))
            rows.append(Row(what, "products of queries and keys alone", ours, products, None, cost=True, note=note))
    return rows


@torch.no_grad()
def refinement(model: models.Model, repeats: int, device: str) -> list[Row]:
    """Nine maps propagated along the self-attention, against its explicit matrices; and what is kept of it."""
    with daamlib.trace(model.pipe, self_attention=True) as queries:
        with daamlib.trace(model.pipe, store="linear", self_attention=True) as mean:
            replace(model, batch=1).generate()
    kept, averaged = queries[0].self_attention, mean[0].self_attention
    maps = torch.rand(9, *queries[0].grid, generator=torch.Generator().manual_seed(0)).to(device)
    named = daamlib.HeatMaps.unnamed(maps)
    expected = naive.refine(queries[0], maps)
    for record in (queries[0], mean[0]):
        _same(record.refine(named).values, expected, 1e-3)
    of_queries, of_mean, explicit = in_turn(
        repeats,
        lambda: queries[0].refine(named),
        lambda: mean[0].refine(named),
        lambda: naive.refine(queries[0], maps),
        device=device,
    )
    passes, positions, _ = kept.queries.shape
    matrices = kept.queries.element_size() * passes * kept.heads * positions**2
    note = f"{kept.grid[0]} x {kept.grid[1]} positions, {kept.heads} heads, {passes} layers and steps"
    return [
        Row(
            "9 maps refined by queries and keys",
            "explicit matrices of all heads",
            of_queries,
            explicit,
            None,
            note=note,
        ),
        Row("9 maps refined by the mean", "explicit matrices of all heads", of_mean, explicit, None, note=note),
        Row(
            "bytes, queries and keys", "matrices of all heads", [kept.nbytes], [matrices], None, note=note, unit="bytes"
        ),
        Row("bytes, mean", "matrices of all heads", [averaged.nbytes], [matrices], None, note=note, unit="bytes"),
    ]


def joint(model: models.Model, repeats: int, device: str) -> list[Row]:
    """A joint model: words that run along while it generates, and a text that is read later."""
    words = ["car", "tree", "road"]

    def traced():
        with daamlib.trace(model.pipe, words=words) as trace:
            images = model.generate()
        return images, trace[0]

    plain, (images, record) = model.generate(), traced()
    if not torch.equal(plain, images):
        raise AssertionError("tracing changed the latents")
    along, base = in_turn(repeats, traced, model.generate, device=device)
    later, step = in_turn(repeats, lambda: record.daam("a car and a sky"), model.generate, device=device)
    blocks = record.layer_names()
    vectors = 4 * 3 * len(blocks) * record.grid[0] * record.grid[1] * model.pipe.transformer.inner_dim
    read = min(model.steps, 4)
    note = f"{model.size} px, {model.steps} steps, of which {read} are read"
    return [
        Row(f"generation, trace(words={len(words)})", "plain pipeline", along, base, None, cost=True, note=note),
        Row("a text later, 5 words", "plain pipeline", later, step, None, cost=True, note=note),
        Row("bytes of the record", "q, k, outputs of a step in float32", [record.nbytes], [vectors], None, note=note,
            unit="bytes"),
    ]  # fmt: skip


# -- optimisation ----------------------------------------------------------------------------------------------------

NINE = ("road", "sidewalk", "building", "traffic light", "vegetation", "sky", "person", "rider", "car")
NAIVE_STEPS = 3  # of gradient descent that are run and timed; every step costs the same


def optimisation(model: models.Model, repeats: int, device: str) -> list[Row]:
    """One LDAAM token on 5 images, to the loss that 1000 steps of gradient descent reach.

    The same descent, of the same losses, runs twice: from the stored queries in every step, as published code does
    (some steps are timed and count for 1000), and once on the collapsed tensors, which gives the loss to reach.
    """
    decay = 1e-5
    records = models.records(model, 5, 30)
    other = torch.randn(3, records[0].d_text, generator=torch.Generator().manual_seed(1)).to(device)
    masks = []
    for record in records:  # where a word's softmax map is strong: no token's linear map fits it
        heat = record.daam_from(other).values[1]
        masks.append(heat > heat.quantile(0.85))
    x, lr, unit = _descent(records, decay)

    def fit(**options):
        fresh = [replace(record) for record in records]  # nothing is collapsed yet
        return daamlib.optimize_token(fresh, masks, weight_decay=decay, **options)

    def slow(count):
        return naive.sgd(records, masks, x.float(), steps=count, lr=lr, unit=unit, decay=decay)

    started = time.perf_counter()
    losses = _collapsed_descent([replace(record) for record in records], masks, decay, lr)
    collapsed = time.perf_counter() - started
    _same(torch.tensor(slow(NAIVE_STEPS)), torch.tensor(losses[:NAIVE_STEPS]), 1e-3)
    goal = losses[-1]
    iterations = next(count for count in range(1, 101) if fit(iterations=count).losses[-1] <= goal)
    ours, loop = in_turn(repeats, lambda: fit(iterations=iterations), lambda: slow(NAIVE_STEPS), device=device)
    loop = [seconds * 1000 / NAIVE_STEPS for seconds in loop]
    what = "one LDAAM token on 5 images"
    note = f"30 steps an image; loss {goal:.4f}, {iterations} iterations of Newton's method"
    return [
        Row(what, "1000 steps of SGD from the queries", ours, loop, 300, note=note),
        Row(what, "1000 steps of SGD on collapsed maps", ours, [collapsed] * repeats, None, note=note),
    ]


def _collapsed_descent(records, masks, decay: float, lr: float) -> list[float]:
    """The losses of 1000 steps of plain gradient descent on the collapsed tensors; lr: of x, that of the bias is 1."""
    objective = token_objective(records, masks, weight_decay=decay)
    x, bias = objective.start.clone().requires_grad_(), objective.first_bias.requires_grad_()
    descent, losses = torch.optim.SGD([{"params": [x], "lr": lr}, {"params": [bias], "lr": 1.0}]), []
    for _ in range(1000):
        descent.zero_grad()
        loss = objective(x, bias)
        loss.backward()
        descent.step()
        losses.append(loss.item())
    return losses


def _descent(records, decay: float) -> tuple[torch.Tensor, float, float]:
    """The start that `optimize_token` takes without a word, the largest stable step, and the unit of the maps."""
    prompt = records[0].prompt_embeddings.values.float()
    x = (torch.randn(1, records[0].d_text, generator=torch.Generator().manual_seed(0)).to(prompt) * prompt.std())[0]
    x = x.double()
    matrix = torch.cat([replace(record).linear_map().weight.flatten(0, 1) for record in records]).double()
    unit = (matrix @ x).std()
    matrix -= matrix.mean(dim=0)
    curvature = torch.linalg.eigvalsh(matrix.T @ matrix)[-1] / (4 * len(matrix) * unit**2)
    return x, 1 / (curvature + 2 * decay / x.square().sum()).item(), unit.item()


# -- metrics and datasets --------------------------------------------------------------------------------------------


def miou(model: models.Model, repeats: int, device: str) -> list[Row]:
    """200 maps and 100 thresholds, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    side = model.size // 4 if model.shape == "bundled" else model.size // 8
    maps = torch.rand(200, side // 4, side // 4, generator=generator)
    maps = torch.nn.functional.interpolate(maps[None], (side, side), mode="bicubic")[0]
    masks = torch.nn.functional.interpolate(maps[None], (model.size, model.size), mode="bilinear")[0] > 0.6
    levels = [i / 99 for i in range(100)]
    ours, loop = (metrics.miou_curve(maps, masks, thresholds=levels)[1], naive.miou_curve(maps, masks, levels))
    _same(torch.as_tensor(ours), torch.tensor(loop, dtype=torch.float64))
    ours, loop = in_turn(
        repeats,
        lambda: metrics.miou_curve(maps, masks, thresholds=levels),
        lambda: naive.miou_curve(maps, masks, levels),
        device=device,
    )
    note = f"maps of {side} x {side}, masks of {model.size} x {model.size}"
    return [Row("mIoU curve, 200 maps, 100 thresholds", "loop over maps and thresholds", ours, loop, 50, note=note)]


def batches(model: models.Model, repeats: int, device: str) -> list[Row]:
    """8 images at once, and one after the other; 10 steps."""
    count = 8
    if model.shape != "bundled" and device == "cpu":
        return []  # minutes; the bundled model answers it
    single, all_at_once = replace(model, batch=1), replace(model, batch=count)
    together, alone = in_turn(
        repeats,
        lambda: all_at_once.generate(10),
        lambda: [single.generate(10) for _ in range(count)],
        device=device,
    )
    rate = [count / statistics.median(seconds) for seconds in (together, alone)]
    note = f"{rate[0]:.2f} images/s at once, {rate[1]:.2f} one by one; 10 steps"
    return [Row(f"generation, {count} images in a batch", "one by one", together, alone, None, note=note)]


# -- label maps ----------------------------------------------------------------------------------------------------


def street(model: models.Model, repeats: int, device: str) -> list[Row]:
    """All nine classes of the street from one annotated image, and its label map, against seconds that users wait."""
    with daamlib.trace(model.pipe, self_attention=True) as trace:
        replace(model, batch=1).generate()
    record, generator = trace[0], np.random.default_rng(0)
    ids = np.array([label_id(name) for name in NINE])[np.indices(record.grid).sum(axis=0) // 4 % len(NINE)]
    image = generator.integers(256, size=(model.size, model.size, 3), dtype=np.uint8)
    tokens = daamlib.fit_classes([record], [ids])
    fit, read = in_turn(
        repeats,
        lambda: daamlib.fit_classes([record], [ids]),
        lambda: daamlib.label_map(record, tokens, image=image),
        device=device,
    )
    note = f"nine classes, {model.size} px, {model.steps} steps"
    return [
        Row("all classes fitted on an image", "30 s", fit, [30.0] * repeats, 1, cost=True, note=note),
        Row("label map along edges", "0.15 s", read, [0.15] * repeats, 1, cost=True, note=note),
    ]


# -- waiting ---------------------------------------------------------------------------------------------------------


def waits(model: models.Model, repeats: int, device: str) -> list[Row]:
    """What a person at a notebook waits for, against a number of seconds that is felt as none."""
    if model.shape != "bundled":
        return []
    with daamlib.trace(model.pipe) as trace:
        (image,) = replace(model, batch=1).generate()
    explorer, words = explore(trace[0], image), itertools.cycle(("tree", "car", "building", "road", "person"))
    queries = [torch.randn(64 * 64, 128, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    layers = [Layer("attn2", (64, 64), 8, 1.0, KeyProjection(torch.eye(128)), query_sum=query) for query in queries]
    records = [replace(trace[0], layers=(layer,)) for layer in layers]
    masks = [query[:, :2].sum(dim=1).view(64, 64) > 1 for query in queries]
    maps, truth = torch.rand(200, 32, 32), torch.rand(200, model.size, model.size) > 0.6
    tasks = {
        "explorer, LDAAM of another word": (0.1, lambda: explorer.change(word=next(words))),
        "LDAAM token, 5 images, maps of 64 x 64": (0.5, lambda: daamlib.optimize_token(records, masks)),
        "200 maps, 101 thresholds": (1.0, lambda: metrics.threshold_counts(maps, truth.numpy())),
    }
    rows = []
    for what, (limit, task) in tasks.items():
        (seconds,) = in_turn(max(repeats, 5), task, device=device)
        rows.append(Row(what, f"{limit} s", seconds, [limit] * len(seconds), 1, cost=True))
    return rows


ROWS = {
    "joint": joint,
    "generation": generation,
    "memory": memory,
    "ldaam": ldaam,
    "daam": daam,
    "published": published,
    "refinement": refinement,
    "optimisation": optimisation,
    "miou": miou,
    "batches": batches,
    "street": street,
    "waits": waits,
}
OF_TRANSFORMERS = ("generation", "memory", "ldaam", "daam", "refinement")


def fits(name: str, shape: str) -> bool:
    """Whether a row is measured of a model: joint models have rows of their own, and transformers no further ones."""
    if shape == "pixart_sigma":
        return name in OF_TRANSFORMERS
    return (name == "joint") == (shape in models.JOINT)
