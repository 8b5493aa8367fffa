"""Token optimisation finds the minimum, for every method, loss and option, and says what is wrong with bad input."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_close
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch.nn import functional as F

import daamlib
from daamlib import OptimizedToken, optimize_token
from daamlib.attention.heatmaps import upsample
from daamlib.io import save_tensors
from daamlib.tokens import solvers
from daamlib.tokens.objective import linear_maps, loss_of, softmax_maps
from daamlib.tokens.optimize import token_objective
from daamlib.tokens.solvers import newton

PROMPT = "a car and a tree"


def blobs(n, size=(32, 48), classes=1):
    """(n, classes, H, W) discs that do not touch."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: size[0], : size[1]]
    masks = np.zeros((n, classes, *size), bool)
    for i in range(n):
        for k in range(classes):
            x = rng.uniform(k + 0.4, k + 0.6) * size[1] / classes
            y, radius = rng.uniform(0.4, 0.6) * size[0], 0.25 * min(size[0], size[1] / classes)
            masks[i, k] = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return masks


@pytest.fixture(scope="module")
def records(sd1_pipe):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(3)]
    return [
        daamlib.trace_image(sd1_pipe, image, prompt=PROMPT, timesteps=(100, 400), seed=i)
        for i, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def masks():
    return list(blobs(3)[:, 0])


def at_grid(masks, size=(16, 24)):
    """The masks by nearest neighbour: every second pixel of every second row, from the one right of the centre."""
    return torch.stack([torch.from_numpy(mask[..., 1::2, 1::2]) for mask in masks]).reshape(len(masks), -1, *size)


def bce_objective(records, targets, x, bias, start, decay):
    """The formula of daamlib.tokens.optimize, image by image; the scale is part of x."""
    maps = torch.stack([record.linear_map().weight.cpu().double() @ x for record in records])
    value = F.binary_cross_entropy_with_logits(maps + bias, targets.double())
    return value + decay * (x - start).square().sum() / start.square().sum()


@pytest.mark.parametrize("word", ["car", None])
def test_ldaam_reaches_the_minimum_that_scipy_finds(records, masks, word):
    token = optimize_token(records, masks, word=word, weight_decay=0.03)
    assert token.embedding.shape == (1, 24)
    assert token.words == ((word or "token"),)
    assert token.gradient_norm < 1e-5
    # in the formula the token holds the scale: x-hat / unit of ours, whose start is x_0 / unit
    scale, targets = token.scale[0], at_grid(masks)[:, 0]
    if word:
        start = records[0].encode("car").values[1:2].cpu().double()
    else:
        start = optimize_token(records, masks, weight_decay=1e9).embedding.double()  # stays where it started
    start = scale * start[0]

    def function(parameters):
        x = torch.tensor(parameters, requires_grad=True)
        value = bce_objective(records, targets, x[:-1], x[-1], start, 0.03)
        value.backward()
        return value.item(), x.grad.numpy()

    first = np.append(start.numpy(), -1.0)
    found = minimize(function, first, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000})
    assert token.losses[-1] == pytest.approx(found.fun, rel=1e-5)
    assert_close(scale * token.embedding[0].double(), torch.tensor(found.x[:-1]), 1e-3)
    assert token.bias[0] == pytest.approx(found.x[-1], rel=1e-3)


def test_ldaam_is_convex_every_start_and_descent_ends_in_one_map(records, masks):
    """Without weight decay the minimum does not know where it started; with three images it is not unique in x."""
    ends = [optimize_token(records, masks, seed=seed, weight_decay=1e-9).losses[-1] for seed in (0, 1, 2)]
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-3)
    quick = optimize_token(records, masks, word="car", weight_decay=0.1)
    objective = token_objective(records, masks, word="car", weight_decay=0.1)
    x, bias = objective.start.clone().requires_grad_(), objective.first_bias.requires_grad_()
    rate = 0.5 * objective.start.square().sum() / objective.start.numel()
    descent = torch.optim.SGD([{"params": [x], "lr": rate.item()}, {"params": [bias], "lr": 1.0}])
    for _ in range(5_000):
        descent.zero_grad()
        value = objective(x, bias)
        value.backward()
        descent.step()
    assert value.item() == pytest.approx(quick.losses[-1], rel=1e-4)
    assert value.item() >= quick.losses[-1] - 1e-12
    assert len(quick.losses) < 30


@pytest.mark.parametrize("options", [{}, {"multiclass": True}, {"background": True}], ids=str)
@pytest.mark.parametrize("weight_decay", [1e-2, 1e-5, 1e-8])
def test_a_convex_fit_ends_at_the_minimum_whatever_the_order_of_the_pixels(records, options, weight_decay):
    """One image, which can be fitted without an error: only the weight decay keeps the token finite."""
    masks = blobs(1, classes=2)
    options = {"word": ("car", "tree"), "weight_decay": weight_decay, **options}
    token = optimize_token(records[:1], list(masks), **options)
    assert token.gradient_norm < 1e-9
    assert len(token.losses) < 60

    objective = token_objective(records[:1], list(masks), **options)
    order = torch.randperm(len(objective.matrix), generator=torch.Generator().manual_seed(0))
    matrix, targets, weights = objective.matrix[order], objective.targets[:, order], objective.weights[order]
    loss = loss_of("bce", targets, weights, [len(order)], multiclass=objective.multiclass)
    mixed = replace(
        objective,
        maps=linear_maps(matrix, objective.offset),
        loss=loss,
        targets=targets,
        weights=weights,
        matrix=matrix,
    )
    x, bias, scale, losses = newton(mixed, 100)
    assert_close(x.float(), token.embedding, 1e-6)
    assert losses[0] == pytest.approx(token.losses[0], rel=1e-12)
    expected = bias - scale / mixed.unit * mixed.centre_of(mixed.maps(x))
    assert token.bias == pytest.approx(expected.flatten().tolist(), rel=1e-6)


@pytest.mark.parametrize("weight_decay", [1e-2, 1e-5, 1e-8])
def test_steps_by_conjugate_gradients_end_at_the_same_minimum(records, weight_decay, monkeypatch):
    """What a fit of many unknowns does, whose Hessian is computed of some of the pixels."""
    masks = list(blobs(3, classes=2))
    objective = token_objective(records, masks, word=("car", "tree"), weight_decay=weight_decay)
    exact = objective(*newton(objective, 100)[:2])
    seen = []
    by_gradients = solvers.conjugate_gradients
    monkeypatch.setattr(solvers, "EXACT", 0)
    monkeypatch.setattr(solvers, "conjugate_gradients", lambda *of: seen.append(1) or by_gradients(*of))
    x, bias, _, losses = newton(objective, 100)
    assert len(seen) == len(losses) < 60
    assert objective(x, bias).item() == pytest.approx(exact.item(), rel=1e-9)


def test_a_fit_that_starts_at_its_minimum_stays(records, monkeypatch):
    objective = token_objective(records, list(blobs(3)), word="car", weight_decay=1e-2)
    monkeypatch.setattr(solvers, "EXACT", 0)
    end = newton(objective, 100)
    again = newton(objective, 100, first=end[:2])
    assert len(again[3]) == 1 and again[0].isfinite().all()
    assert_close(again[0], end[0], 1e-6)


@pytest.mark.parametrize("method", ["ldaam", "daam"])
@pytest.mark.parametrize("loss", ["bce", "cross_entropy", "dice"])
def test_every_loss_falls(records, masks, method, loss):
    options = {"method": method, "loss": loss, "word": "car", "iterations": 20}
    token = optimize_token(records, masks, **options)
    assert min(token.losses) < 0.98 * token.losses[0]
    assert all(map(math.isfinite, token.losses))
    convex = method == "ldaam" and loss == "bce"
    assert token.info["loss"] == loss and token.info["optimizer"] == ("newton" if convex else "novograd")
    again = optimize_token(records, masks, **options)
    assert torch.equal(token.embedding, again.embedding) and token.losses == again.losses


@pytest.mark.parametrize("method, loss", [("ldaam", "bce"), ("ldaam", "dice"), ("daam", "bce"), ("daam", "dice")])
def test_roundings_of_the_queries_stay_roundings_in_the_maps(records, masks, method, loss):
    """Another processor rounds the queries otherwise, by about 1e-6 of them."""
    noise = torch.Generator().manual_seed(0)

    def rounded(layer):
        relative = 1e-6 * torch.randn(layer.queries.shape, generator=noise).to(layer.queries)
        return replace(layer, queries=layer.queries * (1 + relative))

    others = [replace(r, layers=tuple(rounded(layer) for layer in r.layers)) for r in records]
    fits = [optimize_token(given, masks, word="car", method=method, loss=loss) for given in (records, others)]
    for record in records:
        here, there = (fitted.maps(record)["car"] for fitted in fits)
        assert (here - there).abs().max() < 1e-2 * (here.max() - here.min())


def test_the_probabilities_are_what_was_fitted(records, masks):
    for method in ("ldaam", "daam"):
        token = optimize_token(records, masks, word="car", method=method, weight_decay=0.01)
        probabilities = torch.cat([token.probabilities(record, ["car"]) for record in records]).cpu().double()
        with pytest.raises(ValueError, match="tree"):
            token.probabilities(records[0], ["tree"])
        value = F.binary_cross_entropy(probabilities, at_grid(masks)[:, 0].double())
        start = records[0].encode(PROMPT).values if method == "daam" else records[0].encode("car").values[1:2]
        value += 0.01 * (token.embedding - start.cpu()).square().sum() / start.cpu().square().sum()
        assert token.losses[-1] == pytest.approx(value.item(), rel=1e-4), method


def test_dice_and_the_thesis_loss_are_their_formulas(records, masks):
    targets = at_grid(masks)[:, 0].float()
    token = optimize_token(records, masks, word="car", loss="dice", weight_decay=0, iterations=5)
    probabilities = torch.cat([token.probabilities(record).cpu() for record in records])
    both = (probabilities * targets).sum(dim=(1, 2))
    dice = 1 - ((2 * both + 1) / (probabilities.sum(dim=(1, 2)) + targets.sum(dim=(1, 2)) + 1)).mean()
    assert token.losses[-1] == pytest.approx(dice.item(), rel=1e-4)

    token = optimize_token(records, masks, word="car", loss="cross_entropy", weight_decay=0, iterations=5)
    scaled = torch.cat([token.maps(record).normalized().values.cpu() for record in records])
    value = F.binary_cross_entropy(scaled.clamp(1e-6, 1 - 1e-6), targets)
    assert token.losses[-1] == pytest.approx(value.item(), rel=1e-3)
    with pytest.raises(ValueError, match="scale"):
        token.probabilities(records[0])


def test_the_maps_of_daam_for_several_images_equal_those_of_each(records):
    embeddings = records[0].encode(PROMPT)
    rows = ((2,), (3, 4))
    maps = softmax_maps(records, rows, max_bytes=20_000)(embeddings.values)
    for number, record in enumerate(records):
        alone = record.daam_from(embeddings).values
        expected = torch.stack([alone[2], alone[3:5].mean(dim=0)]).flatten(1)
        assert_close(maps.view(2, 3, -1)[:, number], expected)


def test_images_of_several_sizes_and_step_counts_together(sd1_pipe, records, masks):
    other = np.random.default_rng(1).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    tall = daamlib.trace_image(sd1_pipe, other, prompt=PROMPT, timesteps=(100,))
    mixed, of_them = [records[0], tall, records[1]], [masks[0], masks[2].T, masks[1]]
    for method in ("ldaam", "daam"):
        token = optimize_token(mixed, of_them, word="car", method=method, weight_decay=0, iterations=30)
        assert token.losses[-1] < token.losses[0]
        probabilities = [token.probabilities(record)[0].cpu() for record in mixed]
        assert [tuple(probability.shape) for probability in probabilities] == [(16, 24), (24, 16), (16, 24)]
        targets = [torch.from_numpy(mask[1::2, 1::2]).float() for mask in of_them]
        value = np.mean([F.binary_cross_entropy(c, t).item() for c, t in zip(probabilities, targets, strict=True)])
        assert value == pytest.approx(token.losses[-1], rel=1e-4)


@pytest.mark.parametrize("method", ["ldaam", "daam"])
def test_several_classes_with_a_softmax_between_them_and_a_background(records, method):
    masks = list(blobs(3, classes=2))
    options = {"word": ("car", "tree"), "method": method, "weight_decay": 0, "iterations": 80}
    apart = optimize_token(records, masks, **options)
    joint = optimize_token(records, masks, multiclass=True, **options)
    whole = optimize_token(records, masks, background=True, **options)
    assert apart.words == joint.words == ("car", "tree")
    assert whole.words == ("car", "tree", "background")
    count = {"ldaam": (2, 2, 3), "daam": (7, 7, 7)}[method]
    assert tuple(len(token.embedding) for token in (apart, joint, whole)) == count
    if method == "daam":
        assert whole.rows[2] == (0,)
    targets = at_grid(masks).float()

    def logits(token, record):
        scale, bias = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (token.scale, token.bias))
        return scale * token.maps(record).values.cpu() + bias

    everything = torch.cat([targets, 1 - targets.sum(dim=1, keepdim=True)], dim=1)
    for token, wanted in ((joint, targets), (whole, everything)):
        values = torch.stack([logits(token, record) for record in records])
        fit = -(wanted * values.log_softmax(dim=1)).sum(dim=1).mean()
        assert fit.item() == pytest.approx(token.losses[-1], rel=1e-3, abs=1e-6)
        assert token.losses[-1] < token.losses[0]
    found = torch.stack([logits(whole, record) for record in records]).argmax(dim=1)
    right = everything.argmax(dim=1)
    assert (found == right).float().mean() > (right == 2).float().mean()  # better than background everywhere


def test_each_class_alone_is_the_same_as_together_without_joint(records):
    masks = blobs(3, classes=2)
    together = optimize_token(records, list(masks), word=("car", "tree"), weight_decay=0)
    for k, word in enumerate(("car", "tree")):
        alone = optimize_token(records, list(masks[:, k]), word=word, weight_decay=0)
        for record in records:
            assert_close(together.probabilities(record)[k], alone.probabilities(record)[0], 2e-2)


def test_without_a_word_daam_takes_the_one_whose_map_follows_the_mask(records):
    maps = [record.daam_from(record.text_embeddings(padding=False)) for record in records]
    masks = [upsample((m["tree"] > m["tree"].median())[None].float(), (32, 48))[0] > 0.5 for m in maps]
    token = optimize_token(records, masks, method="daam", iterations=1)
    tree = next(word for word in records[0].prompt_embeddings.words if word.text == "tree")
    assert token.rows == (tuple(range(tree.start, tree.stop)),)


@pytest.mark.parametrize("method", ["ldaam", "daam"])
def test_a_map_that_starts_upside_down_is_not_left_so(records, method):
    """A negative scale would fit a dark hole where the class is; the map itself has to turn."""
    plain = [(r.ldaam("car") if method == "ldaam" else r.daam_from(r.encode(PROMPT)))["car"] for r in records]
    masks = [upsample((heat < heat.quantile(0.3))[None].float(), (32, 48))[0] > 0.5 for heat in plain]
    token = optimize_token(records, masks, word="car", method=method, iterations=100)
    assert token.scale[0] > 0
    targets = at_grid([mask.cpu().numpy() for mask in masks]).flatten()
    found = torch.cat([token.maps(record)["car"].flatten().cpu() for record in records])
    assert found[targets].mean() > found[~targets].mean()


def test_the_memory_budget_does_not_change_the_result(records, masks):
    options = {"method": "daam", "word": "car", "iterations": 5}
    small = optimize_token(records, masks, max_bytes=10_000, **options)
    large = optimize_token(records, masks, **options)
    assert_close(small.embedding, large.embedding, 1e-3)


def test_nothing_given_is_changed(records, masks):
    record, mask = records[0], masks[0].copy()
    before = [layer.queries.clone() for layer in record.layers], record.linear_map().weight.clone()
    optimize_token(records, masks, word="car", iterations=3)
    optimize_token(records, masks, word="car", method="daam", iterations=3)
    assert (masks[0] == mask).all()
    assert torch.equal(record.linear_map().weight, before[1])
    for layer, queries in zip(record.layers, before[0], strict=True):
        assert torch.equal(layer.queries, queries) and not layer.queries.requires_grad


def test_an_image_without_the_class_is_a_negative_example(records, masks):
    token = optimize_token(records, [masks[0], np.zeros_like(masks[1]), masks[2]], word="car")
    assert token.probabilities(records[1]).mean() < token.probabilities(records[0]).mean()


def test_linear_records_are_enough_for_ldaam(sd1_pipe, masks):
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
    with daamlib.trace(sd1_pipe, store="linear") as trace:
        sd1_pipe([PROMPT] * 3, generator=torch.Generator().manual_seed(0), **options)
    assert optimize_token(list(trace), masks, word="car").gradient_norm < 1e-5
    with pytest.raises(ValueError, match="queries"):
        optimize_token(list(trace), masks, word="car", method="daam")


def test_a_token_survives_the_disk(records, masks, tmp_path):
    for method in ("ldaam", "daam"):
        token = optimize_token(records, masks, word="car", method=method, iterations=4)
        token.save(tmp_path / "car.safetensors")
        loaded = OptimizedToken.load(tmp_path / "car.safetensors")
        assert list(tmp_path.iterdir()) == [tmp_path / "car.safetensors"]
        assert torch.equal(loaded.embedding, token.embedding)
        for name in ("method", "words", "rows", "scale", "bias", "losses", "gradient_norm", "seconds", "info"):
            assert getattr(loaded, name) == getattr(token, name), name
        assert torch.equal(loaded.maps(records[2])["car"], token.maps(records[2])["car"])
        assert loaded.info["prompts"] == [PROMPT] * 3


def test_a_model_loaded_from_a_path_object(records, masks, tmp_path):
    named = [replace(record, pipe=SimpleNamespace(name_or_path=Path("some/folder"))) for record in records]
    token = optimize_token(named, masks, iterations=1)
    token.save(tmp_path / "car.safetensors")
    assert OptimizedToken.load(tmp_path / "car.safetensors").info["model"] == "some/folder"


def test_a_file_that_is_no_token(records, masks, tmp_path):
    path = tmp_path / "token.safetensors"
    with pytest.raises(FileNotFoundError, match="token"):
        OptimizedToken.load(path)
    records[0].save(path)
    with pytest.raises(ValueError, match="format"):
        OptimizedToken.load(path)
    token = optimize_token(records, masks, word="car", iterations=2)
    header = {part.name: getattr(token, part.name) for part in fields(token) if part.name != "embedding"}
    old = json.dumps({"format": "daamlib-token-1", **header})
    save_file({"embedding": token.embedding}, path, metadata={"daamlib": old})
    with pytest.raises(ValueError, match="daamlib-token-1"):
        OptimizedToken.load(path)
    for changed, word in (
        ({"rows": [[5]]}, "rows"),
        ({"scale": []}, "embedding"),
        ({"words": None}, "damaged"),
        ({"strange": 1}, "strange"),
    ):
        save_tensors(path, {"embedding": token.embedding}, header | changed, "daamlib-token-3")
        with pytest.raises(ValueError, match=word):
            OptimizedToken.load(path)
    save_tensors(path, {}, header, "daamlib-token-3")
    with pytest.raises(ValueError, match="embedding"):
        OptimizedToken.load(path)


def test_shapes_that_are_annotated_are_checked_in_tests():
    with pytest.raises(TypeError, match="embedding"):
        OptimizedToken(torch.zeros(3), "ldaam", ("car",), ((0,),), (1.0,), (0.0,), (), 0.0, 0.0)


def test_a_token_of_another_model(records, masks, fresh):
    token = optimize_token(records, masks, word="car", iterations=2)
    other = fresh("sd1")
    with torch.no_grad():
        for name, weight in other.unet.named_parameters():
            if name.endswith("attn2.to_k.weight"):
                weight.mul_(1.5)
    image = np.zeros((32, 48, 3), np.uint8)
    record = daamlib.trace_image(other, image, timesteps=(100,))
    with pytest.raises(ValueError, match="model"):
        token.maps(record)
    with pytest.raises(ValueError, match="key"):
        optimize_token([records[0], record], masks[:2], word="car")


EMPTY, FULL = np.zeros((32, 48), bool), np.ones((32, 48), bool)
BAD = {
    "no images": (lambda r, m: ([], [], {}), ValueError, "images"),
    "no record": (lambda r, m: ([1, 2, 3], m, {}), TypeError, "AttentionRecord"),
    "fewer masks": (lambda r, m: (r, m[:2], {}), ValueError, "2 masks"),
    "all empty": (lambda r, m: (r, [EMPTY] * 3, {"word": "car"}), ValueError, "empty"),
    "all full": (lambda r, m: (r, [FULL] * 3, {}), ValueError, "fill"),
    "not boolean": (lambda r, m: (r, [m[0].astype(np.uint8), *m[1:]], {}), ValueError, "uint8"),
    "NaN": (lambda r, m: (r, [np.full((32, 48), np.nan), *m[1:]], {}), ValueError, "float64"),
    "a line": (lambda r, m: (r, [m[0][0], *m[1:]], {}), ValueError, "shape"),
    "classes": (lambda r, m: (r, m, {"word": ("car", "tree")}), ValueError, "classes"),
    "unequal": (lambda r, m: (r, [np.stack([m[0], m[0]]), *m[1:]], {}), ValueError, "classes"),
    "method": (lambda r, m: (r, m, {"method": "ovam"}), ValueError, "method"),
    "loss": (lambda r, m: (r, m, {"loss": "mse"}), ValueError, "loss"),
    "no background": (
        lambda r, m: (r, [np.stack([x, ~x]) for x in m], {"background": True}),
        ValueError,
        "background",
    ),
    "no background of DAAM": (
        lambda r, m: (r, [np.stack([x, ~x]) for x in m], {"background": True, "method": "daam"}),
        ValueError,
        "background",
    ),
    "not finite": (lambda r, m: (r, m, {"weight_decay": 1.7e308}), ValueError, "finite"),
    "not finite of DAAM": (lambda r, m: (r, m, {"weight_decay": 1e300, "method": "daam"}), ValueError, "finite"),
    "decay": (lambda r, m: (r, m, {"weight_decay": -1}), ValueError, "weight_decay"),
    "iterations": (lambda r, m: (r, m, {"iterations": 0}), ValueError, "iterations"),
    "joint": (lambda r, m: (r, m, {"loss": "cross_entropy", "multiclass": True}), ValueError, "calibrated"),
    "joint of one": (lambda r, m: (r, m, {"multiclass": True}), ValueError, "two"),
    "no such word": (
        lambda r, m: (r, m, {"word": "bus", "method": "daam"}),
        ValueError,
        "bus",
    ),
    "overlap": (
        lambda r, m: (r, [np.stack([x, x]) for x in m], {"multiclass": True}),
        ValueError,
        "overlap",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(records, masks, case):
    arguments, error, message = BAD[case]
    given, of_them, options = arguments(records, masks)
    with pytest.raises(error, match=message):
        optimize_token(given, of_them, **options)


def test_maps_that_are_not_numbers(records, masks):
    layer = records[0].layers[0]
    broken = replace(layer, queries=layer.queries * float("nan"))
    record = replace(records[0], layers=(broken, *records[0].layers[1:]))
    for method in ("ldaam", "daam"):
        with pytest.raises(ValueError, match="NaN"):
            optimize_token([record, *records[1:]], masks, word="car", method=method)


def passes_twice(record):
    """The record of twice as many passes, which are the same ones again: its maps are twice as high."""
    layers = [replace(layer, queries=torch.cat([layer.queries] * 2)) for layer in record.layers]
    return replace(record, layers=tuple(layers), timesteps=record.timesteps * 2)


@pytest.mark.parametrize("options", [{}, {"method": "daam", "text": PROMPT}, {"loss": "dice"}], ids=str)
def test_images_of_other_numbers_of_passes_weigh_the_same(records, masks, options):
    """The sum over twice the passes says no more of an image: probabilities are those of equal numbers."""
    one, twice = records[0], passes_twice(records[0])
    assert_close(twice.ldaam("car").values, 2 * one.ldaam("car").values)
    alone = optimize_token([one, one], [masks[0]] * 2, word="car", **options)
    mixed = optimize_token([one, twice], [masks[0]] * 2, word="car", **options)
    expected = alone.probabilities(one)
    for token in (alone, mixed):
        for record in (one, twice):
            assert_close(token.probabilities(record), expected, 2e-3)
    assert mixed.info["passes"] == [2, 4]


@pytest.mark.parametrize("shape", [(48, 48), (48, 32), (16, 48), (32, 47 * 3)])
def test_a_mask_of_another_ratio_is_refused(records, masks, shape):
    with pytest.raises(
        ValueError, match=rf"mask 1 is {shape[0]} x {shape[1]}, the image's maps are 16 x 24.*stretched"
    ):
        optimize_token(records[:2], [masks[0], np.eye(*shape) > 0], word="car")


@pytest.mark.parametrize("shape", [(32, 48), (375, 563), (333, 500), (16, 24), (2, 3), (62, 94)])
def test_a_mask_of_the_images_ratio_up_to_rounding(records, masks, shape):
    mask = np.zeros(shape, bool)
    mask[: -(-shape[0] // 2)] = True
    assert optimize_token(records[:1], [mask], iterations=1).words == ("token",)


def test_layers_that_are_unknown_are_named(records, masks):
    good = records[0].layer_names()[0]
    for method in ("ldaam", "daam"):
        with pytest.raises(ValueError, match=rf"no layers \['typo'\]: it has \['{good}'"):
            optimize_token(records, masks, word="car", layers=[good, "typo"], method=method)


def test_newton_of_too_many_classes_is_refused_with_the_number(records):
    several = list(blobs(3, classes=2))
    options = {"word": ("car", "tree"), "background": True}
    bytes_needed = 2 * 8 * (3 * 25) ** 2  # the Hessian of three classes of 24 numbers and a bias, and its factor
    with pytest.raises(ValueError, match=r"3 classes of 25 unknowns each needs 0\.0 GB.*multiclass=False"):
        optimize_token(records, several, max_bytes=bytes_needed - 1, **options)
    fit, usual = (optimize_token(records, several, **options, **more) for more in ({"max_bytes": bytes_needed}, {}))
    assert torch.equal(fit.embedding, usual.embedding)
    apart = {"word": ("car", "tree"), "max_bytes": 2 * 8 * 2 * 25**2}  # a Hessian a class
    assert optimize_token(records, several, **apart).words == ("car", "tree")
    with pytest.raises(ValueError, match="2 classes of 25 unknowns"):
        optimize_token(records, several, **apart | {"max_bytes": apart["max_bytes"] - 1})


def test_a_hessian_that_no_machine_should_hold(records):
    """19 classes at SDXL's width: 12 GB, and its factor as much."""
    columns = np.arange(24) == np.arange(19)[:, None, None]  # a class a column
    small = token_objective(records[:1], [np.broadcast_to(columns, (19, 16, 24))], multiclass=True)
    objective = replace(small, start=torch.zeros(19, 2048), matrix=torch.zeros(len(small.matrix), 2048))
    with pytest.raises(ValueError, match=r"19 classes of 2049 unknowns each needs 24\.2 GB, max_bytes allows 4\.3"):
        newton(objective, 1)


def test_noise_levels_are_not_negative(records, masks):
    with pytest.raises(ValueError, match="max_timestep must be 0 or more, got -5"):
        optimize_token(records, masks, word="car", max_timestep=-5)
