"""What a label map says, and the label maps that optimised tokens read."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import assert_close
from small_sets import CAR, PERSON, token_for, traced
from torch.nn import functional as F

from daamlib.datasets import AnnotatorLabeller, TokenLabeller, label_map

IMAGE = np.zeros((16, 24, 3), np.uint8)
BOTH = "a car and a person"


@pytest.fixture(scope="module")
def record(sd1_pipe):
    return traced(sd1_pipe)


@pytest.fixture(scope="module")
def tokens(record):
    return [token_for(record, "car"), token_for(record, "person", seed=1)]


def enlarged(probabilities):
    return F.interpolate(probabilities[None], (16, 24), mode="bilinear", align_corners=False)[0]


def test_a_label_map_by_hand():
    car = [[0.9, 0.6, 0.59, 0.4, 0.39, 0.7, 0.5]]
    person = [[0.1, 0.5, 0.2, 0.1, 0.38, 0.7, 0.55]]
    ids = label_map(np.array([car, person]), [CAR, PERSON], 0.6, 0.4)
    assert ids.tolist() == [[CAR, CAR, 255, 255, 0, CAR, 255]]  # the first of equals
    assert ids.dtype == np.uint8
    ids = label_map(torch.tensor([car, person]), [CAR, PERSON], (0.95, 0.5), (0.6, 0.5))
    assert ids.tolist() == [[255, 255, 0, 0, 0, 255, PERSON]]
    ids = label_map(np.array([car]), [CAR], 0.5, 0.5)
    assert ids.tolist() == [[CAR, CAR, CAR, 0, 0, CAR, CAR]]
    assert label_map(np.zeros((0, 2, 3)), []).tolist() == [[0, 0, 0]] * 2


def test_a_class_that_is_not_named_is_ignored_where_it_may_be():
    car = [[0.9, 0.9, 0.5, 0.1, 0.1, 0.1]]
    person = [[0.1, 0.95, 0.9, 0.9, 0.4, 0.39]]
    ids = label_map(np.array([car, person]), [CAR, PERSON], named=[True, False])
    assert ids.tolist() == [[CAR, CAR, 255, 255, 255, 0]]
    ids = label_map(np.array([car, person]), [CAR, PERSON], 0.95, (0.6, 0.9), named=[False, False])
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
def test_what_is_no_label_map(arguments, message):
    with pytest.raises(ValueError, match=message):
        label_map(*arguments)


def test_probabilities_are_the_tokens_own(tokens, record):
    probabilities = enlarged(torch.cat([token.probabilities(record) for token in tokens]))
    found = TokenLabeller(tuple(tokens), 0.7, 0.5)(IMAGE, record, BOTH)
    assert np.array_equal(found, label_map(probabilities, [CAR, PERSON], 0.7, 0.5))
    assert {*np.unique(found)} == {0, CAR, PERSON, 255}


def test_only_the_classes_of_the_prompt(tokens, record):
    labeller = TokenLabeller(tuple(tokens))
    probabilities = enlarged(torch.cat([token.probabilities(record) for token in tokens]))
    for prompt, named in (("a car, red", [1, 0]), ("a scar and cars", [1, 0]), ("Person", [0, 1]), ("", [0, 0])):
        found = labeller(IMAGE, record, prompt)
        assert np.array_equal(found, label_map(probabilities, [CAR, PERSON], named=np.array(named, bool)))
        assert {*np.unique(found)} == {0, 255, *[CAR] * named[0], *[PERSON] * named[1]}
    everything = TokenLabeller(tuple(tokens), named_only=False)(IMAGE, record, "a tree")
    assert np.array_equal(everything, labeller(IMAGE, record, BOTH))


def test_a_joint_token_is_read_by_its_softmax(record):
    token = token_for(record, "car", "person", "background", joint=True)
    scale, bias = (torch.tensor(n, device=record.device).view(-1, 1, 1) for n in (token.scale, token.bias))
    logits = scale * token.maps(record).values + bias
    assert_close(token.probabilities(record), logits.softmax(dim=0))
    every = enlarged(logits.softmax(0))[:2]
    assert np.array_equal(TokenLabeller((token,))(IMAGE, record, BOTH), label_map(every, [CAR, PERSON]))
    # of what the prompt names; the person, where it may be, is ignored
    car = enlarged(logits[[0, 2]].softmax(0))[:1]
    expected = label_map(torch.cat([car, every[1:]]), [CAR, PERSON], named=[True, False])
    found = TokenLabeller((token,))(IMAGE, record, "a car")
    assert np.array_equal(found, expected)
    assert (found == 255).sum() > (label_map(car, [CAR]) == 255).sum()
    expected = label_map(every, [CAR, PERSON], named=[False, False])
    assert np.array_equal(TokenLabeller((token,))(IMAGE, record, "a tree"), expected)


def test_maps_of_more_steps_are_scaled_to_the_tokens(tokens, record):
    """Sums over the steps: twice the steps is twice the map, and the same label map."""
    layers = tuple(dataclasses.replace(layer, query_sum=2 * layer.query_sum) for layer in record.layers)
    twice = dataclasses.replace(record, layers=layers, timesteps=record.timesteps * 2)
    for passes in ([2], [1, 3]):
        token = dataclasses.replace(tokens[0], info={**tokens[0].info, "passes": passes})
        labeller = TokenLabeller((token,))
        assert np.array_equal(labeller(IMAGE, twice, BOTH), labeller(IMAGE, record, BOTH))
    old = dataclasses.replace(tokens[0], info={"fingerprint": tokens[0].info["fingerprint"]})  # does not say how many
    assert not np.array_equal(TokenLabeller((old,))(IMAGE, twice, BOTH), labeller(IMAGE, record, BOTH))


def test_daam_tokens_read_the_queries(sd1_pipe, tokens):
    record = traced(sd1_pipe, store="queries")
    embedding = record.text_embeddings("a car", padding=False).values
    token = dataclasses.replace(token_for(record, "car"), embedding=embedding, method="daam", rows=((2,),))
    maps = token.maps(record).values
    scale = float(2 / maps.std())
    token = dataclasses.replace(token, scale=(scale,), bias=(float(-scale * maps.mean()),))
    assert TokenLabeller((token, tokens[1])).store == "queries"
    assert TokenLabeller((tokens[1],)).store == "linear"
    found = TokenLabeller((token,), named_only=False)(IMAGE, record, "")
    assert np.array_equal(found, label_map(enlarged(token.probabilities(record)), [CAR]))


def test_labellers_that_cannot_be(record, tokens):
    car = tokens[0]
    for tokens_, options, message in (
        ((), {}, "no class"),
        ((token_for(record, "cat"),), {}, "cat"),
        ((token_for(record, "token"),), {}, "Cityscapes"),
        ((car, car), {}, "two tokens"),
        ((token_for(record, "background"),), {}, "no class"),
        ((token_for(record, "car", loss="cross_entropy"),), {}, "scale"),
        ((token_for(record, "car", "person", joint=True),), {}, "background=True"),
        ((car,), {"threshold": {"person": 0.6}}, "threshold"),
        ((car,), {"ignore_from": 0.7}, "ignore_from"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenLabeller(tokens_, **options)
    with pytest.raises(TypeError, match="record"):
        TokenLabeller((car,))(IMAGE, None, "a car")


def test_the_settings_are_jsons_own_types(tokens):
    settings = TokenLabeller(tuple(tokens), {"car": 0.6, "person": 0.5}).settings
    assert json.loads(json.dumps(settings)) == settings
    other = dataclasses.replace(tokens[0], bias=(0.0,))
    assert TokenLabeller((other,)).settings["tokens"][0]["sha256"] != settings["tokens"][0]["sha256"]


def test_an_annotator_sees_one_image():
    def network(images):
        assert images.shape == (1, 16, 24, 3)
        return np.full((1, 16, 24), CAR, np.uint8)

    labeller = AnnotatorLabeller(network)
    assert (labeller(IMAGE, None, "") == CAR).all() and labeller(IMAGE, None, "").shape == (16, 24)
