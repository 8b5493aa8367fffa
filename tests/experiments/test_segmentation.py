"""Segmentation: reading the exported folder, what 255 means, training that repeats and learns, and its IoU."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from daamlib.datasets import export
from daamlib_lab.experiments.segmentation import (
    Labelled,
    augment,
    evaluate,
    ious,
    new_network,
    predict,
    read,
    segmentation_loss,
    train,
)
from daamlib_lab.urban.dataset import render_dataset

CLASSES = ("background", "left", "right")


def squares(n=6, side=32, seed=0):
    """Noise with a bright red square (class 1) and a bright blue one (class 2)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, side, side, 3), np.uint8)
    targets = np.zeros((n, side, side), np.uint8)
    for image, target in zip(images, targets, strict=True):
        for number, channel, left in ((1, 0, 0), (2, 2, side // 2)):
            y, x = rng.integers(0, side - 14), left + rng.integers(0, side // 2 - 12)
            image[y : y + 12, x : x + 12, channel] = 250
            target[y : y + 12, x : x + 12] = number
    return Labelled(images, targets, CLASSES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two rendered scenes as a Cityscapes-style folder; read-only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        folder = tmp_path_factory.mktemp("scenes")
        scenes = render_dataset(folder / "set", 2)
        return scenes, export.cityscapes(scenes, folder / "out", split="val", classes=("car", "person"))


# -- reading -----------------------------------------------------------------------------------------------------


def test_read_gives_what_was_exported(exported):
    scenes, folder = exported
    data = read(folder, split="val")
    assert data.classes == ("background", "car", "person") and len(data) == 2
    assert data.images.dtype == data.targets.dtype == np.uint8
    for i in range(2):
        assert np.array_equal(data.images[i], np.asarray(scenes.image(i)))
        assert np.array_equal(data.targets[i], scenes.mask(i, "car") + 2 * scenes.mask(i, "person"))


def test_a_smaller_side_averages_images_and_picks_labels(exported):
    _, folder = exported
    whole, small = read(folder, split="val"), read(folder, split="val", side=64)
    assert small.images.shape == (2, 64, 64, 3)
    means = whole.images.reshape(2, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(small.images - means).max() <= 1
    assert np.array_equal(small.targets, whole.targets[:, 1::2, 1::2])


def test_what_is_no_exported_folder_is_refused(exported, tmp_path):
    _, folder = exported
    with pytest.raises(FileNotFoundError, match="classes.json"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="leftImg8bit"):
        read(folder, split="train")
    with pytest.raises(ValueError, match="256"):
        read(folder, split="val", side=256)


def test_values_without_a_name_and_images_of_several_sizes_are_refused(tmp_path):
    pictures, maps = tmp_path / "leftImg8bit" / "train" / "a", tmp_path / "gtFine" / "train" / "a"
    pictures.mkdir(parents=True)
    maps.mkdir(parents=True)
    (tmp_path / "classes.json").write_text(json.dumps({"0": "background", "1": "car", "255": "ignored"}))

    def write(name, size, value):
        Image.new("RGB", size).save(pictures / f"a_{name}_leftImg8bit.png")
        Image.new("L", size, value).save(maps / f"a_{name}_gtFine_labelTrainIds.png")

    write("1", (40, 32), 255)
    assert read(tmp_path).targets.shape == (1, 32, 40) and read(tmp_path).classes == ("background", "car")
    write("1", (40, 32), 2)
    with pytest.raises(ValueError, match="values"):
        read(tmp_path)
    write("1", (40, 32), 1)
    write("2", (32, 32), 1)
    with pytest.raises(ValueError, match="sizes"):
        read(tmp_path)
    assert read(tmp_path, side=32).targets.shape == (2, 32, 32)


def test_sets_are_taken_from_and_added():
    data = squares(4)
    both = data.take([2, 0]) + squares(3, seed=1)
    assert len(both) == 5 and np.array_equal(both.images[1], data.images[0])
    with pytest.raises(ValueError, match="same"):
        data + Labelled(data.images, data.targets, ("background", "car", "person"))
    with pytest.raises(ValueError, match="same"):
        data + squares(2, side=40)


# -- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_weighted_cross_entropy_and_dice():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 16, 16))
    weights = torch.tensor([1.0, 3, 3])
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    shares, truth = large.softmax(1), F.one_hot(targets, 3).movedim(-1, 1)
    dice = 1 - (2 * (shares * truth).sum((0, 2, 3)) + 1) / ((shares + truth).sum((0, 2, 3)) + 1)
    assert torch.allclose(
        segmentation_loss(logits, targets, weights), F.cross_entropy(large, targets, weights) + dice.mean()
    )


def test_uncertain_pixels_have_no_say():
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(1, 3, 16, 16), torch.randint(3, (1, 16, 16)), torch.ones(3)
    targets[:, :8] = 255
    changed = logits.clone()
    changed[:, :, :8] += 5 * torch.randn(1, 3, 8, 16)
    assert torch.equal(segmentation_loss(logits, targets, weights), segmentation_loss(changed, targets, weights))
    assert not torch.equal(segmentation_loss(logits, targets, weights), segmentation_loss(-logits, targets, weights))
    nothing = logits.requires_grad_()
    segmentation_loss(nothing, torch.full_like(targets, 255), weights).backward()
    assert not nothing.grad.any()


def test_augmentation_flips_labels_with_their_image_and_repeats():
    targets = torch.zeros(64, 32, 32, dtype=torch.long)
    targets[..., :10] = 1
    targets[:, 20] = 255
    pixels = targets.eq(1)[:, None].expand(-1, 3, -1, -1).float() - 0.5
    before = pixels.clone(), targets.clone()
    got, flipped = augment(pixels, targets, torch.Generator().manual_seed(0))
    assert torch.equal(pixels, before[0]) and torch.equal(targets, before[1])
    assert 0.25 < (flipped != targets).any(dim=2).any(dim=1).float().mean() < 0.75
    assert set(flipped.unique().tolist()) == {0, 1, 255}
    inside, outside = (got.mean(1) * (flipped == number) for number in (1, 0))
    assert (inside.amax((1, 2)) > outside.amax((1, 2))).all()
    assert torch.equal(augment(pixels, targets, torch.Generator().manual_seed(0))[0], got)


# -- training and test -------------------------------------------------------------------------------------------


def test_training_learns_and_does_not_learn_from_uncertain_pixels():
    data = squares(8)
    model = train(data, steps=40, seed=0)
    test = squares(4, seed=1)
    learned = evaluate(model, test)
    assert set(learned) == {*CLASSES, "mean"} and learned["mean"] > 60
    # the same squares marked uncertain: nothing says that they are anything but background
    hidden = Labelled(data.images, np.where(data.targets > 0, 255, 0).astype(np.uint8), CLASSES)
    assert evaluate(train(hidden, steps=40, seed=0), test)["mean"] < learned["mean"] - 30


def test_the_same_seed_trains_the_same_network_on_any_number_of_threads():
    data, before, state = squares(3), torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        first = train(data, steps=2, batch=2, seed=1).state_dict()
        torch.set_num_threads(2)
        second = train(data, steps=2, batch=2, seed=1).state_dict()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator was not drawn from
    other = train(data, steps=2, batch=2, seed=2).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_early_stopping_returns_the_weights_of_the_best_check(monkeypatch):
    checked, scores = [], iter([10.0, 50.0, 20.0])

    def score(model, data):
        assert not model.training and len(data) == 2
        checked.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"mean": next(scores)}

    monkeypatch.setattr("daamlib_lab.experiments.segmentation.evaluate", score)
    options = {"steps": 10, "batch": 1, "validation": squares(2, seed=1)}
    monkeypatch.setattr("daamlib_lab.experiments.segmentation.EVERY", 4)
    state = train(squares(3), **options).state_dict()
    assert len(checked) == 3  # after 4, 8 and 10 steps
    assert all(torch.equal(state[name], checked[1][name]) for name in state)
    assert any(not torch.equal(state[name], checked[2][name]) for name in state)


def test_a_class_weighs_more_than_the_background_alone(monkeypatch):
    seen = []

    def loss(logits, targets, weights):
        seen.append(weights.tolist())
        return logits.sum()

    monkeypatch.setattr("daamlib_lab.experiments.segmentation.segmentation_loss", loss)
    for classes in (CLASSES, ("road", "left", "right")):
        train(Labelled(squares(2).images, squares(2).targets, classes), steps=1, batch=1)
    assert seen == [[1, 3, 3], [3, 3, 3]]


def test_the_iou_is_of_pooled_pixels_without_uncertain_ones():
    data = squares(3)
    model = new_network(CLASSES).eval()
    found = predict(model, data.images)
    targets = found.copy()
    targets[0, :, :16] = (targets[0, :, :16] + 1) % 3  # half of one image is wrong
    targets[1, 0, :3] = [0, 1, 2]  # every class occurs
    targets[2] = 255
    got = evaluate(model, Labelled(data.images, targets, CLASSES))
    for number, name in enumerate(CLASSES):
        both = ((found == number) & (targets == number)).sum()
        either = (((found == number) | (targets == number)) & (targets != 255)).sum()
        assert got[name] == pytest.approx(100 * both / either, abs=1e-3)
    assert got["mean"] == pytest.approx(np.mean([got[name] for name in CLASSES]), abs=1e-3)


def test_a_test_of_nothing_is_refused():
    data, model = squares(2), new_network(CLASSES).eval()
    with pytest.raises(ValueError, match="classes"):
        evaluate(model, Labelled(data.images, data.targets, ("background", "car", "person")))
    with pytest.raises(ValueError, match="right"):
        evaluate(model, Labelled(data.images, np.minimum(data.targets, 1), CLASSES))
    with pytest.raises(ValueError, match="32"):
        ious(data.targets[:1], data)
    with pytest.raises(ValueError, match="eval"):
        predict(new_network(CLASSES).train(), data.images)


@pytest.mark.parametrize(
    "data, options, message",
    [
        (squares(1), {"steps": 0}, "1 or more"),
        (squares(1).take([]), {}, "1 or more"),
        (squares(1, side=30), {}, "32 px"),
        (Labelled(squares(1).images, np.full((1, 32, 32), 255, np.uint8), CLASSES), {}, "255"),
    ],
)
def test_training_on_nothing_is_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        train(data, **options)
