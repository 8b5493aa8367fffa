"""The annotator: ids and shapes, its loss and augmentation, refusals, and training that stops and continues."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from daamlib.cityscapes import BY_NAME
from daamlib_lab.urban.annotator import CLASSES, IDS, annotate, load_annotator
from daamlib_lab.urban.scenes import render
from training.annotator import augment, class_ious, main, new_annotator, segmentation_loss, to_channels
from training.data import render_scenes
from training.networks import new_vae


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = SegformerConfig(
        id2label=dict(enumerate(CLASSES)),
        depths=[1, 1],
        num_encoder_blocks=2,
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        sr_ratios=[8, 4],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
        initializer_range=1.0,
    )
    return SegformerForSemanticSegmentation(config).eval()


def images(count=2, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_the_classes_are_those_of_the_scenes_in_the_order_of_their_train_ids():
    seen = set()
    for seed in range(40):
        seen |= set(np.unique(render(seed, 64).labels).tolist())
    assert seen == set(IDS.tolist())
    train_ids = [BY_NAME[name].train_id for name in CLASSES]
    assert train_ids == sorted(train_ids) and IDS.dtype == np.uint8


def test_annotate_gives_cityscapes_ids_in_the_images_size(tiny):
    pixels = images()
    before = pixels.copy()
    maps = annotate(tiny, pixels)
    assert maps.shape == (2, 48, 64) and maps.dtype == np.uint8
    assert set(np.unique(maps)) <= set(IDS) and len(np.unique(maps)) > 1
    assert (pixels == before).all()
    # the same whatever the images come in, and one by one
    assert (annotate(tiny, [Image.fromarray(image) for image in pixels]) == maps).all()
    assert (annotate(tiny, pixels, batch=1) == maps).mean() > 0.99


def test_annotate_reads_the_ids_from_the_models_own_names(tiny):
    pixels = images(1)
    channels = to_channels(annotate(tiny, pixels))
    names = tiny.config.id2label
    try:
        tiny.config.id2label = dict(enumerate(reversed(CLASSES)))
        assert (annotate(tiny, pixels) == IDS[::-1][channels]).all()
    finally:
        tiny.config.id2label = names


def test_an_image_is_labelled_the_same_in_any_company():
    model = new_annotator().eval()
    alone = annotate(model, images(1, 64, 64))
    assert (annotate(model, images(3, 64, 64))[:1] == alone).mean() > 0.99


@pytest.mark.parametrize(
    "wrong, message",
    [
        (images()[0], r"\(48, 64, 3\).*leading axis"),
        (images().astype(np.float32), "float32"),
        (images()[..., :2], r"\(2, 48, 64, 2\)"),
        (images()[:0], r"\(0, 48, 64, 3\)"),
        (images(1, 16, 64), "at least 32 px"),
        ([], "at least one image"),
        ([Image.new("L", (64, 64))], r"a L image.*convert\('RGB'\)"),
        ([images()[0]], "ndarray"),
        ([Image.new("RGB", (64, 64)), Image.new("RGB", (64, 48))], r"\(64, 48\)"),
    ],
)
def test_wrong_images_are_refused(tiny, wrong, message):
    with pytest.raises(ValueError, match=message):
        annotate(tiny, wrong)


def test_a_model_in_training_mode_is_refused(tiny):
    tiny.train()
    try:
        with pytest.raises(ValueError, match="eval"):
            annotate(tiny, images())
    finally:
        tiny.eval()


def test_folders_without_an_annotator_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="no annotator in"):
        load_annotator(tmp_path)
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["0"] = "motorway"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="motorway"):
        load_annotator(tmp_path)


def test_to_channels():
    ids = np.array([[7, 26], [19, 23]], np.uint8)
    assert [CLASSES[c] for c in to_channels(ids).ravel()] == ["road", "car", "traffic light", "sky"]
    with pytest.raises(ValueError, match=r"\[0, 33\]"):
        to_channels(np.array([33, 7, 0], np.uint8))


def test_the_loss_is_cross_entropy_and_half_the_soft_dice():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 10, 8, 8), torch.randint(7, (2, 16, 16))  # the last three classes are absent
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    shares, truth = large.softmax(1), F.one_hot(targets, 10).movedim(-1, 1)
    common, total = (shares * truth).sum((0, 2, 3)), (shares + truth).sum((0, 2, 3))
    expected = F.cross_entropy(large, targets) + 0.5 * (1 - (2 * common + 1) / (total + 1)).mean()
    assert torch.allclose(segmentation_loss(logits, targets), expected)
    certain = 100.0 * F.one_hot(targets, 10).movedim(-1, 1).float()
    assert segmentation_loss(certain, targets) < 1e-4


def test_augmentation_flips_labels_with_their_image_and_keeps_its_input():
    pixels = torch.full((64, 3, 32, 32), -0.5)
    pixels[..., :16] = 0.5
    targets = (pixels[:, 0] > 0).long()
    before = pixels.clone(), targets.clone()
    torch.manual_seed(0)
    augmented, flipped = augment(pixels, targets)
    assert torch.equal(pixels, before[0]) and torch.equal(targets, before[1])
    assert augmented.shape == pixels.shape and flipped.dtype == torch.int64
    assert -1 <= augmented.min() and augmented.max() <= 1
    assert 0.25 < (flipped != targets).any((1, 2)).float().mean() < 0.75
    bright, dark = augmented.mean(1) * flipped, augmented.mean(1) * (1 - flipped)
    assert (bright.sum((1, 2)) > dark.sum((1, 2))).all()
    torch.manual_seed(0)
    assert torch.equal(augment(pixels, targets)[0], augmented)


def test_ious_are_those_of_torchmetrics():
    truth, found = torch.from_numpy(np.random.default_rng(0).integers(9, size=(2, 3, 32, 32)))
    found[0] = truth[0]
    counts = MulticlassConfusionMatrix(10)(found, truth).double()
    expected = MulticlassJaccardIndex(num_classes=10, average=None)(found, truth)
    ious = class_ious(counts)
    assert torch.allclose(ious[:9].float(), expected[:9]) and ious[9].isnan()  # the last class never occurs


def test_training_stops_continues_exports_and_is_evaluated(tmp_path, capsys):
    render_scenes(tmp_path / "scenes", 4, workers=1)
    common = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    small = [*common, "--scenes", "4", "--batch", "2"]
    main(["train", *small, "--samples", "4"])
    main(["train", *small, "--samples", "6"])
    state = torch.load(tmp_path / "annotator.pt", weights_only=True)
    assert state["samples"] == 6
    statistics = state["ema"]["decode_head.batch_norm.running_mean"]
    assert statistics.abs().sum() > 0  # the averaged network has statistics of its own
    main(["train", *small, "--samples", "100", "--minutes", "0"])
    assert torch.load(tmp_path / "annotator.pt", weights_only=True)["samples"] == 6
    new_vae().save_pretrained(tmp_path / "vae")
    main(["train", *small, "--samples", "8", "--vae", str(tmp_path / "vae")])
    state = torch.load(tmp_path / "annotator.pt", weights_only=True)
    assert state["samples"] == 8

    main(["export", *common])
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_size < 4e6
    model = load_annotator(tmp_path / "out")
    assert model.dtype == torch.float32 and not model.training
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), state["ema"][name].float(), rtol=1e-3, atol=1e-6), name

    capsys.readouterr()
    main(["evaluate", *common, "--images", "2"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 <= metrics["miou"] < 1 and metrics["scenes"] == 2 and metrics["first_seed"] == 10_000_000
    assert f"{metrics['miou']:.4f}" in capsys.readouterr().out
