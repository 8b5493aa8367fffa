"""The dataset that the repository holds is what its model and its annotator make."""

import functools

import numpy as np
import pytest
import torch

import daamlib
from daamlib import datasets
from daamlib.cityscapes import BY_NAME
from daamlib.datasets.generation import draw
from daamlib_lab.urban.annotator import annotate, load_annotator
from daamlib_lab.urban.scenes import KINDS
from training import sample


@pytest.fixture(scope="module")
def dataset():
    return datasets.load(sample.FOLDER)


def test_it_holds_images_labels_and_prompts_of_every_class(dataset):
    assert len(dataset) == 24
    assert dataset.settings["prompts"] == datasets.urban_prompts(24)
    for name in KINDS:
        assert len(dataset.with_class(name)) >= 3
    image, labels = dataset.image(0), dataset.labels(0)
    assert image.mode == "RGB" and labels.shape == image.size[::-1] == (128, 128)
    assert sum(path.stat().st_size for path in sample.FOLDER.rglob("*")) < 4e6


def test_its_labels_are_the_annotators(dataset):
    images = np.stack([np.asarray(dataset.image(i)) for i in range(len(dataset))])
    stored = np.stack([dataset.labels(i) for i in range(len(dataset))])
    assert (annotate(load_annotator(), images) == stored).mean() > 0.999  # not 1: another machine may round otherwise


def test_its_images_are_the_bundled_models(dataset):
    pipe = daamlib.load_pipeline(device="cpu", dtype=torch.float32)
    assert datasets.weight_hash(pipe) == dataset.settings["weights"]
    [image], [record] = draw(pipe, [dataset.manifest.prompt[5]], [int(dataset.manifest.seed[5])], dataset.settings)
    assert record is None
    # single pixels differ by a level where another machine rounds otherwise
    assert np.abs(np.asarray(image, float) - np.asarray(dataset.image(5), float)).mean() < 0.5


def test_the_overlay_is_a_mixture_of_image_and_colours(dataset):
    image, labels = dataset.image(0), dataset.labels(0)
    assert (sample.overlay(image, labels, opacity=0) == np.asarray(image)).all()
    coloured = sample.overlay(image, labels, opacity=1)
    for i in np.unique(labels):
        color = next(label.color for label in BY_NAME.values() if label.id == i)
        assert (coloured[labels == i] == color).all()
    half = sample.overlay(image, labels, opacity=0.5).astype(int)
    assert np.abs(2 * half - np.asarray(image, int) - coloured).max() <= 1


def test_the_sheet_shows_every_image_twice(dataset):
    sheet = np.asarray(sample.sheet(dataset, columns=5))
    assert sheet.shape == (5 * 256, 5 * 128, 3)
    assert (sheet[256:384, 128:256] == np.asarray(dataset.image(6))).all()
    assert (sheet[384:512, 128:256] == sample.overlay(dataset.image(6), dataset.labels(6))).all()
    assert (sheet[4 * 256 :, 4 * 128 :] == 255).all()


def test_the_command_makes_such_a_dataset(fresh, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_pipeline", functools.partial(fresh, "sd1"))
    monkeypatch.setattr("sys.argv", ["sample", "--out", str(tmp_path / "made"), "--images", "4"])
    sample.main()
    made = datasets.load(tmp_path / "made")
    assert len(made) == 4 and (tmp_path / "made" / "overlays.png").is_file()
    assert made.settings["labels"] == ["daamlib_lab.urban.annotator.annotate"]
    assert "rider         named in 2 prompts, found in" in capsys.readouterr().out
