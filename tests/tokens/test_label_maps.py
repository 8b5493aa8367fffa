"""Label maps from words and from tokens, against what their docstrings say."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import assert_close, generate
from PIL import Image

import daamlib
from daamlib import label_map
from daamlib.attention.heatmaps import upsample
from daamlib.tokens.guided import guided_upsample
from daamlib.tokens.label_maps import (
    SHARPNESS,
    assign_labels,
    check_tokens,
    text_of,
    token_probabilities,
    word_probabilities,
)
from daamlib_lab.urban.captions import STREET_WORDS

CAR, PERSON, TREE = 26, 24, 21
WORDS = {"car": "car", "person": "a red person", "vegetation": "trees"}
THINGS = ("car", "bus", "tree", "sky", "cat", "dog")
PAIRS = [(color, thing) for color in ("red", "blue", "wet", "old") for thing in THINGS]


@pytest.fixture(scope="module")
def record(sd1_pipe):
    with daamlib.trace(sd1_pipe, self_attention=True) as trace:
        generate(sd1_pipe, "a car and a person")
    return trace[0]


def token_for(record, *words, seed=0, **options):
    """Fitted to where a random token's map is high."""
    random = torch.randn(len(words), record.d_text, generator=torch.Generator().manual_seed(seed))
    maps = record.ldaam_from(random.to(record.device)).values
    high = maps >= maps.flatten(1).quantile(0.8, dim=1)[:, None, None]
    masks = high & (high.cumsum(dim=0) == 1)  # each pixel of one class
    return daamlib.optimize_token([record], [masks], word=words, weight_decay=1e-2, **options)


@pytest.fixture(scope="module")
def tokens(record):
    return [token_for(record, "car"), token_for(record, "person", seed=1)]


def test_labels_by_hand():
    car = [[0.9, 0.6, 0.59, 0.4, 0.39, 0.7, 0.5]]
    person = [[0.1, 0.5, 0.2, 0.1, 0.38, 0.7, 0.55]]
    ids = assign_labels(np.array([car, person]), [CAR, PERSON], 0.6, 0.4)
    assert ids.tolist() == [[CAR, CAR, 255, 255, 0, CAR, 255]]  # the first of equals
    assert ids.dtype == np.uint8
    ids = assign_labels(torch.tensor([car, person]), [CAR, PERSON], (0.95, 0.5), (0.6, 0.5))
    assert ids.tolist() == [[255, 255, 0, 0, 0, 255, PERSON]]
    ids = assign_labels(np.array([car, person]), [CAR, PERSON])  # the most probable
    assert ids.tolist() == [[CAR, CAR, CAR, CAR, CAR, CAR, PERSON]]
    ids = assign_labels(np.array([car, person]), [CAR, PERSON], 0.5, 0.4, margin=0.075)
    assert ids.tolist() == [[CAR, CAR, CAR, 255, 0, 255, 255]]
    ids = assign_labels(np.array([car]), [CAR], 0.5, 0.5)
    assert ids.tolist() == [[CAR, CAR, CAR, 0, 0, CAR, CAR]]
    assert assign_labels(np.zeros((0, 2, 3)), []).tolist() == [[0, 0, 0]] * 2


def test_a_class_that_is_not_named_is_ignored_where_it_may_be():
    car = [[0.9, 0.9, 0.5, 0.1, 0.1, 0.1]]
    person = [[0.1, 0.95, 0.9, 0.9, 0.4, 0.39]]
    ids = assign_labels(np.array([car, person]), [CAR, PERSON], 0.6, 0.4, named=[True, False])
    assert ids.tolist() == [[CAR, CAR, 255, 255, 255, 0]]
    ids = assign_labels(np.array([car, person]), [CAR, PERSON], 0.95, (0.6, 0.9), named=[False, False])
    assert ids.tolist() == [[255, 255, 255, 255, 0, 0]]


WRONG_MAPS = {
    "one map": ((np.zeros((2, 3)), [CAR]), "shape"),
    "two ids": ((np.zeros((1, 2, 3)), [CAR, PERSON]), "shape"),
    "logits": ((np.full((1, 2, 3), 1.5), [CAR]), "probabilities"),
    "nan": ((np.full((1, 2, 3), np.nan), [CAR]), "NaN"),
    "the wrong way round": ((np.zeros((1, 2, 3)), [CAR], 0.4, 0.6), "threshold"),
    "percent": ((np.zeros((1, 2, 3)), [CAR], 60, 40), "threshold"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_MAPS.values(), ids=WRONG_MAPS)
def test_what_is_no_assign_labels(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign_labels(*arguments)


def test_words_compete(record):
    assert text_of(WORDS) == "a car, a red person, trees"
    words = {"car": "car", "person": "person", "vegetation": "trees"}
    maps = record.daam(text_of(words))
    refined = record.refine(maps)
    found = word_probabilities(record, words)
    assert found.tokens == tuple(words)
    assert_close(found.values.sum(dim=0), torch.ones(record.grid, device=record.device))
    rows = torch.stack([refined[word].flatten() for word in words.values()])
    scores = SHARPNESS * (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True)
    expected = scores.exp() / scores.exp().sum(dim=0)
    assert_close(found["vegetation"].flatten(), expected[2], 1e-4)
    plain = word_probabilities(record, words, iterations=0)
    assert not torch.equal(plain.values, found.values)
    bare = dataclasses.replace(record, self_attention=None)
    assert torch.equal(word_probabilities(bare, words, iterations=0).values, plain.values)
    some = word_probabilities(record, words, ["vegetation", "car"])  # the same softmax without the person
    assert some.tokens == ("car", "vegetation")
    assert_close(some["car"].flatten(), expected[0] / (expected[0] + expected[2]), 1e-4)


def test_a_word_that_is_strong_everywhere_does_not_win_everywhere(record):
    """What words have in all of the image is no evidence for a place."""
    found = word_probabilities(record, STREET_WORDS).values
    winners = found.argmax(dim=0).unique()
    assert len(winners) > len(STREET_WORDS) / 2


def test_tokens_compete_with_each_other_and_the_background(record, tokens):
    one = token_probabilities(record, tokens[:1], iterations=0)
    assert one.tokens == ("car", "background")
    assert_close(one["car"], tokens[0].probabilities(record)[0])
    both = token_probabilities(record, tokens, iterations=0)
    odds = [token.logits(record)[0].exp() for token in tokens]
    assert_close(both["person"], odds[1] / (1 + odds[0] + odds[1]))
    refined, order = token_probabilities(record, tokens), record.refine(both).values.flatten(1)
    assert_close(refined.values.sum(dim=0), torch.ones(record.grid, device=record.device))
    placed = torch.zeros_like(order)
    for row, (ranking, values) in enumerate(zip(order, both.values.flatten(1), strict=True)):
        for pixel, value in zip(ranking.argsort().tolist(), sorted(values.tolist()), strict=True):
            placed[row, pixel] = value
    assert_close(refined.values.flatten(1), placed / placed.sum(dim=0), 1e-4)
    assert token_probabilities(record, tokens, ["person"]).tokens == ("person", "background")


def test_a_token_with_a_background_keeps_its_probabilities(record):
    token = token_for(record, "car", "person", background=True)
    found = token_probabilities(record, [token], iterations=0)
    assert found.tokens == ("car", "person", "background")
    assert_close(found.values, token.probabilities(record))


def test_refining_one_token_moves_its_probabilities_and_changes_none(record, tokens):
    before, after = (token_probabilities(record, tokens[:1], iterations=i)["car"] for i in (0, 1))
    assert not torch.equal(before, after)
    assert_close(before.flatten().sort().values, after.flatten().sort().values, 1e-4)


@pytest.mark.parametrize("iterations", [0, 1])
def test_label_maps_of_tokens(record, tokens, iterations):
    maps = token_probabilities(record, tokens, iterations=iterations)
    first, second = maps.values.topk(2, dim=0).values
    margin = float((first - second).median())  # those of random weights are small
    expected = torch.tensor([CAR, PERSON, 0], device=record.device)[maps.values.argmax(dim=0)]
    expected[first - second < margin] = 255
    found = label_map(record, tokens, margin=margin, iterations=iterations)
    assert found.dtype == np.uint8 and np.array_equal(found, expected.cpu().numpy())
    assert {0, 255} <= {*np.unique(found)}


def test_what_label_maps_of_tokens_may_hold(record, tokens):
    plain = {"iterations": 0, "margin": 0}
    assert label_map(record, tokens, size=(50, 75), **plain).shape == (50, 75)
    assert {*np.unique(label_map(record, tokens, **plain))} == {0, CAR, PERSON}
    assert {*np.unique(label_map(record, tokens, names=["car"], **plain))} == {0, CAR}
    assert {*np.unique(label_map(record, tokens, ids={"car": 1, "person": 2}, **plain))} == {0, 1, 2}
    threshold, lower = {"car": 0.6, "person": 0.5}, {"person": 0.3, "car": 0.4}
    found = label_map(record, tokens, threshold=threshold, ignore_from=lower, **plain)
    values = token_probabilities(record, tokens, iterations=0).values[:2]
    assert np.array_equal(found, assign_labels(values, [CAR, PERSON], (0.6, 0.5), (0.4, 0.3)))
    # a class may be found below the background's probability, if its threshold says so
    low = label_map(record, tokens, threshold=0.2, ignore_from=0.2, **plain)
    assert (low > 0).sum() > (label_map(record, tokens, **plain) > 0).sum()


def test_label_maps_of_words(record):
    found = label_map(record, STREET_WORDS, margin=0)
    expected = word_probabilities(record, STREET_WORDS).values.argmax(dim=0)
    assert {*np.unique(found)} <= {26, 24, 19, 25, 11, 7, 8, 23, 21}
    order = [26, 24, 19, 25, 11, 7, 8, 23, 21]
    assert np.array_equal(found, np.array(order, np.uint8)[expected.cpu().numpy()])
    assert (label_map(record, STREET_WORDS, margin=0.2) == 255).any()
    assert {*np.unique(label_map(record, STREET_WORDS, margin=0, names=["sky", "road"]))} == {23, 7}
    assert (label_map(record, STREET_WORDS, names=[]) == 255).all()


def test_label_maps_follow_the_edges_of_their_image(record, tokens):
    """Of an image without edges they are nearly the smooth ones, where there is an edge they change at it."""
    size = (8 * record.grid[0], 8 * record.grid[1])
    halves = np.zeros((*size, 3), np.uint8)
    halves[:, size[1] // 2 + 3 :] = (200, 90, 40)  # between two cells of the maps
    maps = torch.zeros(2, *record.grid, device=record.device)
    maps[0, :, : record.grid[1] // 2] = 1
    maps[1] = 1 - maps[0]
    plain, guided = upsample(maps, size), guided_upsample(maps, halves)
    assert_close(guided.sum(dim=0), torch.ones(size, device=record.device), 1e-4)
    edge = size[1] // 2 + 3
    steps = [(found[0, :, edge - 1] - found[0, :, edge]).abs().min() for found in (plain, guided)]
    assert steps[1] > 0.5 > 0.2 > steps[0]
    constant = guided_upsample(torch.full((1, *record.grid), 0.3, device=record.device), halves)
    assert_close(constant, torch.full((1, *size), 0.3, device=record.device), 1e-4)
    even = guided_upsample(maps, np.full_like(halves, 7), radius=1)
    assert (even - plain).abs().max() < 0.1  # a mean over a few pixels
    found = label_map(record, tokens, image=halves, margin=0)
    expected = guided_upsample(token_probabilities(record, tokens).values, halves).argmax(dim=0)
    assert np.array_equal(found, np.array([CAR, PERSON, 0], np.uint8)[expected.cpu().numpy()])
    for options in ({"image": halves, "size": (3, 3)}, {"image": halves[..., 0]}, {"image": halves.astype(float)}):
        with pytest.raises(ValueError, match="size|image"):
            label_map(record, tokens, **options)


def test_what_cannot_be_read(record, tokens):
    bare = dataclasses.replace(record, self_attention=None)
    with pytest.raises(ValueError, match="self_attention"):
        label_map(bare, STREET_WORDS)
    assert label_map(bare, STREET_WORDS, iterations=0).shape == record.grid
    for classes, message in (
        ({"car": "car"}, "two"),
        ({"cat": "cat", "car": "car"}, "cat"),
        ([], "no class"),
        ([tokens[0], tokens[0]], "two tokens"),
        ([token_for(record, "car", "person", multiclass=True)], "background=True"),
    ):
        with pytest.raises(ValueError, match=message):
            label_map(record, classes)
    assert check_tokens(tokens) == ("car", "person")
    for options, message in (
        ({"names": ["Car"]}, "names has Car, the classes are car, person"),
        ({"names": "bus"}, "names has bus"),
        ({"ids": {"car": 300, "person": 1}}, "ids of classes are 0 ... 254"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            label_map(record, tokens, **options)
    with pytest.raises(TypeError, match="expected optimised tokens, or words as {class: word}, got 'car'"):
        label_map(record, ["car", "sky"])


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("bus", "a bus"), ("glass", "a glass"), ("iris", "an iris"), ("lens", "a lens"), ("cars", "cars"),
        ("glasses", "glasses"), ("Bus", "a Bus"), ("elephant", "an elephant"), ("unicycle", "a unicycle"),
        ("the sea", "the sea"), ("an apple", "an apple"), ("traffic light", "a traffic light"),
    ],
)  # fmt: skip
def test_the_article_of_a_word(word, phrase):
    assert text_of({"class": word, "sky": "sky"}) == f"{phrase}, a sky"


def scores_of(record, rows, embeddings):
    """What `word_probabilities` is, without propagation: a softmax over the standardised mean maps of these rows."""
    maps = record.daam_from(embeddings).values
    values = torch.stack([maps[of_word].mean(dim=0) for of_word in rows])
    deviation = values.std(dim=(1, 2), keepdim=True)
    return (SHARPNESS * (values - values.mean(dim=(1, 2), keepdim=True)) / deviation).softmax(dim=0)


def test_a_word_inside_of_another_classs_phrase_is_its_own_alone(record):
    words = {"rider": "person on a car", "person": "person", "car": "car"}
    found = word_probabilities(record, words, iterations=0)
    embeddings = record.encode(text_of(words), padding=True)
    tokens = record.pipe.tokenizer.tokenize("a person on a car, a person, a car")
    person = tokens.index("person</w>") if "person</w>" in tokens else None
    length = len(record.pipe.tokenizer.tokenize("person"))
    comma, last = tokens.index(",</w>"), len(tokens)
    first = 2 if person is None else 1 + person  # after the start token and "a"
    rows = [range(first, comma + 1), range(comma + 3, comma + 3 + length), [last]]
    assert [embeddings.tokens[row] for row in rows[1]] == [
        token.removesuffix("</w>") for token in record.pipe.tokenizer.tokenize("person")
    ]
    assert embeddings.tokens[last] == "car"
    assert_close(found.values, scores_of(record, [list(each) for each in rows], embeddings), 1e-4)


def test_more_classes_than_one_text_holds(record):
    """All words compete in one softmax, in texts that stand side by side as the parts of a long prompt do."""
    words = {f"class {i}": f"{color} {thing}" for i, (color, thing) in enumerate(PAIRS)}
    with pytest.raises(ValueError, match="the text encoder reads 77"):
        record.daam(text_of(words))
    found = word_probabilities(record, words, iterations=0)
    assert found.tokens == tuple(words) and len(words) == 24
    names = list(words)
    parts = [names[:6], names[6:12], names[12:]]  # the first half has 89 tokens, the second 76
    texts = [record.encode(text_of({name: words[name] for name in part}), padding=True) for part in parts]
    rows = []
    for number, (part, text) in enumerate(zip(parts, texts, strict=True)):
        for name in part:
            pairs = list(zip(text.words, text.words[1:], strict=False))
            ((first, second),) = [(a, b) for a, b in pairs if f"{a.text} {b.text}" == words[name]]
            rows.append([77 * number + row for row in range(first.start, second.stop)])
    expected = scores_of(record, rows, torch.cat([text.values for text in texts]))
    assert_close(found.values, expected, 1e-4)
    ids = {name: number for number, name in enumerate(words)}
    assert label_map(record, words, ids=ids, margin=0).max() < 24
    with pytest.raises(ValueError, match="shorten it"):
        word_probabilities(record, {"a": "car " * 90, "b": "car"})


def test_a_picture_of_another_ratio_is_refused(record, tokens):
    with pytest.raises(ValueError, match="the image is 64 x 64, the image's maps are 16 x 24"):
        label_map(record, tokens, image=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="the image is 64 x 64, the image's maps are 16 x 24"):
        label_map(record, tokens, size=(64, 64))
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    by_pillow = label_map(record, tokens, image=Image.fromarray(picture))
    assert np.array_equal(by_pillow, label_map(record, tokens, image=picture))
