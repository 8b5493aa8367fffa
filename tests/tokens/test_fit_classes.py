"""Tokens of all classes at once: known answers, what they read, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import assert_close

import daamlib
from daamlib import OptimizedToken, fit_classes, label_map
from daamlib.attention.heatmaps import upsample
from daamlib.attention.layers import KeyProjection, Layer
from daamlib.datasets import TokenLabeller
from daamlib.tokens import classes
from daamlib.tokens.classes import RARE, WEIGHT_DECAYS
from daamlib.tokens.label_maps import token_probabilities

GRID = 8, 12
ROAD, CAR, SKY = 7, 26, 23
UP, DOWN = "up_blocks.1.good", "down_blocks.0.bad"


@pytest.fixture(scope="module")
def template(sd1_pipe):
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    return daamlib.trace_image(sd1_pipe, image, timesteps=(100, 900))


def made(template, seed, noise=0.3):
    """A record whose up layer shows three classes, each in a channel, in both of its passes; and the label map."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full(GRID, ROAD)
    labels[: 2 + int(torch.randint(0, 3, (), generator=generator))] = SKY
    labels[5:7, int(torch.randint(0, 6, (), generator=generator)) :][:, :5] = CAR
    device, d_text = template.device, template.d_text
    queries = noise * torch.randn(2, GRID[0] * GRID[1], d_text, generator=generator)
    for channel, number in enumerate((ROAD, CAR, SKY)):
        queries[..., channel] += (labels == number).flatten().float()
    queries += torch.randn(d_text, generator=generator)  # of the whole image, which says nothing of its places
    keys = KeyProjection(torch.eye(d_text).to(device))
    other = torch.randn(2, GRID[0] * GRID[1], d_text, generator=generator)
    layers = tuple(Layer(name, GRID, 1, 1.0, keys, queries=q.to(device)) for name, q in ((DOWN, other), (UP, queries)))
    return dataclasses.replace(template, layers=layers), labels.numpy().astype(np.uint8)


@pytest.fixture(scope="module")
def annotated(template):
    pairs = [made(template, seed) for seed in range(4)]
    return [record for record, _ in pairs], [labels for _, labels in pairs]


@pytest.fixture(scope="module")
def tokens(annotated):
    return fit_classes(*annotated)


def test_they_label_an_image_that_they_have_not_seen(tokens, template):
    assert tokens.words == ("road", "sky", "car") and tokens.info["layers"] == [UP]
    record, labels = made(template, 77)
    found = label_map(record, tokens, iterations=0, margin=0.0)
    assert (found == labels).mean() > 0.95
    assert {*np.unique(label_map(record, tokens, iterations=0, margin=0.9))} >= {255}
    assert 0 not in label_map(record, tokens, size=(50, 75), iterations=0)  # there is no background


def test_the_fit_is_the_minimum(annotated):
    """Of sum over the cells of the shares' cross-entropy, and a ridge on standardised features: against float64."""
    records, labels = annotated
    token = fit_classes(records, labels, weight_decays=[0.01])
    queries = [record.layers[1].queries.double().cpu().mean(dim=0) for record in records]
    features = torch.cat([each - each.mean(dim=0) for each in queries])
    unit = features.std(dim=0)
    truth = torch.tensor(np.stack(labels)).flatten()
    targets = torch.stack([truth == number for number in (ROAD, SKY, CAR)], dim=1).double()
    theta = (token.embedding.double() * unit).requires_grad_()
    bias = torch.tensor(token.bias).double() + RARE * targets.mean(dim=0).log()
    bias.requires_grad_()
    loss = -(targets * (features / unit @ theta.T + bias).log_softmax(dim=1)).sum(dim=1).mean()
    loss = loss + 0.01 * theta.square().sum()
    assert_close(torch.tensor(token.losses[-1]), loss.detach().float(), 1e-4)
    for gradient in torch.autograd.grad(loss, (theta, bias)):
        assert gradient.abs().max() < 1e-3


def test_pixels_to_be_ignored_change_nothing(annotated):
    """A label that is wrong is no label where it says 255."""
    records, labels = annotated
    holes = [np.where(np.arange(12) < 3, 255, ids).astype(np.uint8) for ids in labels]
    wrong = [np.where(np.arange(12) < 3, CAR, ids).astype(np.uint8) for ids in labels]
    plain, ignoring, misled = (
        fit_classes(records, each, weight_decays=[0.01]).probabilities(records[0]).argmax(dim=0).cpu()
        for each in (labels, holes, wrong)
    )
    assert (plain == ignoring).float().mean() > 0.95 > (plain == misled).float().mean()


def test_small_label_maps_and_shares(annotated):
    """A cell that two classes share counts for both; label maps may have any size of the image's ratio."""
    records, labels = annotated
    large = [np.kron(ids, np.ones((4, 4), np.uint8)) for ids in labels]
    one, other = (fit_classes(records, each, weight_decays=[0.01]) for each in (labels, large))
    assert torch.equal(one.embedding, other.embedding)


def test_the_weight_decay_is_chosen_by_the_images_left_out(annotated):
    records, labels = annotated
    assert fit_classes(records, labels, weight_decays=(1e6, 0.01)).info["weight_decay"] == 0.01
    assert fit_classes(records[:1], labels[:1]).info["weight_decay"] in WEIGHT_DECAYS  # by its quarters


def test_they_are_saved_and_read_by_a_labeller(tokens, template, tmp_path):
    tokens.save(tmp_path / "street.safetensors")
    loaded = OptimizedToken.load(tmp_path / "street.safetensors")
    record, _ = made(template, 78)
    assert torch.equal(loaded.probabilities(record), tokens.probabilities(record))
    assert_close(loaded.probabilities(record).sum(dim=0), torch.ones(GRID, device=record.device))
    assert torch.equal(token_probabilities(record, [loaded], iterations=0).values, tokens.probabilities(record))
    labeller = TokenLabeller((loaded,), threshold=0.7, ignore_from=0.0, named_only=False, iterations=0)
    found = labeller(np.zeros((32, 48, 3), np.uint8), record, "a car")
    best = upsample(tokens.probabilities(record), (32, 48)).max(dim=0).values
    assert np.array_equal(found == 255, (best < 0.7).cpu().numpy()) and 0 not in found
    assert labeller.store == "linear" and labeller.class_list.name == "Cityscapes"
    with pytest.raises(ValueError, match="use TokenLabeller.of"):
        TokenLabeller((loaded,))
    with pytest.raises(ValueError, match="give no others"):
        label_map(record, [loaded, dataclasses.replace(loaded, words=("a", "b", "c"))])


def test_classes_of_any_list(annotated):
    records, labels = annotated
    ids = {"background": 0, "thing": 1}
    token = fit_classes(records, [(each == CAR).astype(int) for each in labels], ids)
    assert token.words == ("background", "thing")
    found = label_map(records[0], token, iterations=0, margin=0.0)
    assert {*np.unique(found)} == {0, 1} and ((found == 1) == (labels[0] == CAR)).mean() > 0.95


WRONG = {
    "no records": (lambda r, m: ([], [], {}), "0 label maps"),
    "one map": (lambda r, m: (r, m[:1], {}), "1 label maps for 4"),
    "floats": (lambda r, m: (r, [ids.astype(float) for ids in m], {}), "integers"),
    "masks": (lambda r, m: (r, [ids == CAR for ids in m], {}), "integers"),
    "ratio": (lambda r, m: (r, [ids[:, :8] for ids in m], {}), "ratio"),
    "one class": (lambda r, m: (r, [np.full_like(ids, CAR) for ids in m], {}), "1 class"),
    "an unknown id": (lambda r, m: (r, [np.where(ids == CAR, 99, ids) for ids in m], {}), "99"),
    "decay": (lambda r, m: (r, m, {"weight_decays": [0.0]}), "positive"),
    "layers": (lambda r, m: (r, m, {"layers": ["mid"]}), "no layers"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(annotated, make, message):
    records, labels, options = make(*annotated)
    with pytest.raises(ValueError, match=message):
        fit_classes(records, labels, **options)


def test_a_record_of_a_model_without_tokens_of_its_classes(template):
    with pytest.raises(ValueError, match="fit_classes"):
        label_map(template, iterations=0)


def test_the_directions_of_many_features_are_those_of_the_largest_variance(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 90, generator=generator) * torch.logspace(0, -3, 90)
    monkeypatch.setattr(classes, "RANK", 20)
    exact = classes.principal_directions(features)
    monkeypatch.setattr(classes, "EXACT", 0)
    monkeypatch.setattr(classes, "SAMPLES", 400)  # all pixels, of which there are few
    found = classes.principal_directions(features)
    assert found.shape == exact.shape == (90, 20)
    assert_close(found @ found.T, exact @ exact.T, 1e-3)  # the space that they span
    assert torch.equal(found, classes.principal_directions(features))
