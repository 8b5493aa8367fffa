"""The stored run: its summary on numbers that are known, and that a run which was stopped resumes."""

import json

import numpy as np
import pandas as pd
import pytest

from daamlib_lab.experiments import stored

KEYS = [(name, k, False) for name, k in (("DAAM", 0), ("LDAAM", 0), ("DAAM", 5), ("LDAAM", 5))]


def draw(seed, levels, *, n=30, luck=0.0):
    """A draw in which each method has the IoU `levels` at every threshold, and all images move together."""
    rng = np.random.default_rng(seed)
    found = {}
    for word in stored.CLASSES:
        numbers = sorted(rng.permutation(n)[:20].tolist())
        hard = np.linspace(-0.1, 0.1, n)[numbers, None]
        for key, level in zip(KEYS, levels, strict=True):
            found[*key, word] = numbers, np.full((20, 101), level + luck * (key[1] > 0), np.float32) + hard, 50
    return found


def row(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.iloc[0]


def test_a_difference_is_judged_on_the_same_images_and_draws():
    made = stored.summarise([draw(seed, (0.5, 0.4, 0.7, 0.6)) for seed in range(3)], resamples=50)
    for metric in ("max_miou", "auc"):
        of = row(made["differences"], what="LDAAM - DAAM, words", metric=metric)
        assert [of.value, of.low, of.high] == pytest.approx([-10, -10, -10], abs=1e-3) and of.draws == 3
    words = row(made["results"], method="DAAM", train_images=0, metric="max_miou", **{"class": "all"})
    assert words.low < words.value < words.high and words.value == pytest.approx(50, abs=2)
    assert set(made["curves"].threshold) == set(stored.LEVELS)


def test_the_interval_holds_the_luck_of_the_training_images():
    wide, narrow = (
        stored.summarise([draw(0, (0.5, 0.4, 0.7, 0.6), luck=luck) for luck in lucks], resamples=200)["results"]
        for lucks in ((-0.2, 0, 0.2), (0, 0, 0))
    )
    for k, factor in ((0, 1.001), (5, 3)):
        a, b = (row(of, method="LDAAM", train_images=k, metric="auc", **{"class": "all"}) for of in (wide, narrow))
        assert (a.high - a.low > factor * (b.high - b.low)) == (k > 0)
    assert a.highest_draw - a.lowest_draw == pytest.approx(40, abs=0.01)


def test_the_threshold_of_the_training_images_is_used():
    of = draw(0, (0.5, 0.5, 0.5, 0.5))
    for key, (numbers, iou, _) in of.items():
        iou[:, 7] -= 0.2
        of[key] = numbers, iou, 7
    made = stored.summarise([of], resamples=20)["results"]
    values = made[(made["class"] == "car") & (made.method == "DAAM")].set_index(["train_images", "metric"]).value
    assert values[0, "max_miou"] - values[0, "miou_at_train_threshold"] == pytest.approx(20, abs=1e-3)


def test_each_image_is_stored_once_a_draw():
    draws = [draw(seed, (0.5, 0.4, 0.7, 0.6)) for seed in range(2)]
    names, table = stored.by_image(draws)
    assert names[0] == "DAAM|0|False|car" and table.shape == (16, 2, 30) and table.dtype == np.uint8
    assert ((table == 255).sum(axis=2) == 10).all()
    numbers, iou, _ = draws[1]["LDAAM", 5, False, "rider"]
    mine = table[names.index("LDAAM|5|False|rider"), 1, numbers] / 200
    np.testing.assert_allclose(mine, iou[:, 0], atol=0.0026)


class Images:
    """A data set of which the run asks the shares of the classes alone."""

    def with_class(self, word):
        return [0, 1]

    def mask(self, i, word):
        return np.array([[True, False]])


def test_a_run_that_was_stopped_resumes_and_writes_the_tables(tmp_path, monkeypatch):
    made = []

    def one_draw(examples, seed, *, losses):
        made.append((examples, seed, losses))
        return draw(seed, (0.5, 0.4, 0.7, 0.6))

    monkeypatch.setattr(stored.daamlib, "load_pipeline", lambda **_: None)
    monkeypatch.setattr(stored, "dataset_of", lambda *_: Images())
    monkeypatch.setattr(stored, "load_examples", lambda *_, timesteps, in_memory: timesteps)
    monkeypatch.setattr(stored, "one_draw", one_draw)
    (tmp_path / "out").mkdir()
    arguments = ["--folder", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--losses", "1"]
    stored.main([*arguments, "--draws", "1", "--sets", "rendered"])
    stored.main([*arguments, "--draws", "2"])
    assert made == [(stored.TIMESTEPS, 0, True), (stored.TIMESTEPS, 1, False), (None, 0, True), (None, 1, False)]
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert facts["draws"] == {"rendered": 2, "generated": 2}
    assert facts["floor"]["generated"]["car"] == 50 and facts["images"]["rendered"]["rider"] == 2
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(results.ground_truth) == {"rendered", "generated"} and results.low.le(results.high).all()
    assert len(np.load(tmp_path / "out" / "iou.npz")) == 4
