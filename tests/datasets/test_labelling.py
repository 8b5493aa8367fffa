"""What a label map says, and the label maps that optimised tokens read."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import assert_close, generate
from small_sets import CAR, PERSON, token_for, traced
from torch.nn import functional as F

import daamlib
from daamlib.datasets import AnnotatorLabeller, TokenLabeller, WordLabeller
from daamlib.tokens.label_maps import assign_labels, label_map, token_probabilities
from daamlib_lab.urban.captions import STREET_WORDS

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


def read(record, tokens, iterations=0):
    """The probabilities of the tokens' classes, at the image's size."""
    return enlarged(token_probabilities(record, tokens, iterations=iterations).values[:-1]).clamp(0, 1)


def test_classes_compete_and_are_refined(tokens, record):
    found = TokenLabeller(tuple(tokens), 0.55, 0.4, iterations=0)(IMAGE, record, BOTH)
    assert np.array_equal(found, assign_labels(read(record, tokens), [CAR, PERSON], 0.55, 0.4))
    assert {*np.unique(found)} == {0, CAR, PERSON, 255}
    found = TokenLabeller(tuple(tokens), 0.55, 0.4)(IMAGE, record, BOTH)
    assert np.array_equal(found, assign_labels(read(record, tokens, 1), [CAR, PERSON], 0.55, 0.4))
    assert {*np.unique(found)} == {0, CAR, PERSON, 255}


def test_only_the_classes_of_the_prompt(tokens, record):
    labeller = TokenLabeller(tuple(tokens), 0.55, 0.4, iterations=0)
    for prompt, named in (("a car, red", [1, 0]), ("a scar and cars", [1, 0]), ("Person", [0, 1]), ("", [0, 0])):
        found = labeller(IMAGE, record, prompt)
        # what is named competes with the background alone; the other, where it may be, is ignored
        alone = torch.cat([read(record, [token]) for token in tokens])
        mask = torch.tensor(named, dtype=torch.bool, device=alone.device)[:, None, None]
        probabilities = torch.where(mask, alone, read(record, tokens))
        expected = assign_labels(probabilities, [CAR, PERSON], 0.55, 0.4, named=np.array(named, bool))
        assert np.array_equal(found, expected)
        assert {*np.unique(found)} == {0, 255, *[CAR] * named[0], *[PERSON] * named[1]}
    everything = TokenLabeller(tuple(tokens), 0.55, 0.4, named_only=False, iterations=0)(IMAGE, record, "a tree")
    assert np.array_equal(everything, labeller(IMAGE, record, BOTH))


def test_labels_follow_the_edges_of_the_image(tokens, record):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for labeller in (
        TokenLabeller(tuple(tokens), named_only=False),
        WordLabeller(STREET_WORDS, named_only=False, margin=0.0),
    ):
        edges = dataclasses.replace(labeller, edge_aware=True)
        assert edges.settings != labeller.settings
        if isinstance(labeller, TokenLabeller):
            expected = label_map(record, tokens, image=image, threshold=0.6, ignore_from=0.4, margin=0.0)
            assert np.array_equal(edges(image, record, ""), expected)
            assert not np.array_equal(labeller(image, record, ""), expected)


def test_a_joint_token_is_read_by_its_softmax(record):
    token = token_for(record, "car", "person", "background", multiclass=True)
    scale, bias = (torch.tensor(n, device=record.device).view(-1, 1, 1) for n in (token.scale, token.bias))
    logits = scale * token.maps(record).values + bias
    assert_close(token.probabilities(record), logits.softmax(dim=0))
    labeller = TokenLabeller((token,), iterations=0)
    every = enlarged(logits.softmax(0))[:2]
    assert np.array_equal(labeller(IMAGE, record, BOTH), assign_labels(every, [CAR, PERSON], 0.6, 0.4))
    # of what the prompt names; the person, where it may be, is ignored
    car = enlarged(logits[[0, 2]].softmax(0))[:1]
    expected = assign_labels(torch.cat([car, every[1:]]), [CAR, PERSON], 0.6, 0.4, named=[True, False])
    found = labeller(IMAGE, record, "a car")
    assert np.array_equal(found, expected)
    assert (found == 255).sum() > (assign_labels(car, [CAR], 0.6, 0.4) == 255).sum()
    expected = assign_labels(every, [CAR, PERSON], 0.6, 0.4, named=[False, False])
    assert np.array_equal(labeller(IMAGE, record, "a tree"), expected)


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
    late = dataclasses.replace(tokens[1], info={**tokens[1].info, "max_timestep": 500})
    assert TokenLabeller((late,)).store == "queries"
    assert TokenLabeller((late,)).self_attention and not TokenLabeller((late,), iterations=0).self_attention
    found = TokenLabeller((token,), named_only=False, iterations=0)(IMAGE, record, "")
    assert np.array_equal(found, assign_labels(enlarged(token.probabilities(record)), [CAR], 0.6, 0.4))


def test_labellers_that_cannot_be(record, tokens):
    car = tokens[0]
    for tokens_, options, message in (
        ((), {}, "no class"),
        ((token_for(record, "cat"), car), {}, "'cat' is no Cityscapes label"),
        ((token_for(record, "cat"),), {"ids": {"dog": 1}}, "cat"),
        ((token_for(record, "cat"),), {"ids": {"cat": 255}}, "255"),
        ((car,), {"iterations": -1}, "iterations"),
        ((car, car), {}, "two tokens"),
        ((token_for(record, "background"),), {}, "no class"),
        ((token_for(record, "car", loss="cross_entropy"),), {}, "scale"),
        ((token_for(record, "car", "person", multiclass=True),), {}, "background=True"),
        ((car,), {"threshold": {"person": 0.6}}, "threshold"),
        ((car,), {"ignore_from": 0.7}, "ignore_from"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenLabeller(tokens_, **options)
    with pytest.raises(TypeError, match="record"):
        TokenLabeller((car,))(IMAGE, None, "a car")


def test_tokens_of_all_classes_label_every_pixel(record, tokens):
    ids = np.full((16, 24), 7, np.uint8)
    ids[:, 12:] = CAR
    whole = daamlib.fit_classes([record], [ids], weight_decays=(0.01,))
    labeller = TokenLabeller.of([whole])
    assert (labeller.threshold, labeller.margin, labeller.named_only, labeller.edge_aware) == (0.0, 0.1, False, True)
    found = labeller(IMAGE, record, "a tree")
    assert np.array_equal(found, label_map(record, whole, image=IMAGE)) and {*np.unique(found)} <= {7, CAR, 255}
    sure = TokenLabeller.of([whole], margin=0.0)
    assert {*np.unique(sure(IMAGE, record, ""))} <= {7, CAR}
    assert sure.settings != labeller.settings and json.loads(json.dumps(labeller.settings)) == labeller.settings
    of_things = TokenLabeller.of(tokens)
    assert of_things.settings == TokenLabeller(tuple(tokens)).settings and "margin" not in of_things.settings
    with pytest.raises(ValueError, match=r"TokenLabeller\.of"):
        TokenLabeller((whole,))


def test_the_settings_are_jsons_own_types(tokens):
    settings = TokenLabeller(tuple(tokens), {"car": 0.6, "person": 0.5}).settings
    assert json.loads(json.dumps(settings)) == settings
    other = dataclasses.replace(tokens[0], bias=(0.0,))
    others = [other] + [
        dataclasses.replace(tokens[0], info={**tokens[0].info, **part})
        for part in ({"layers": ["up_blocks.1"]}, {"max_timestep": 300}, {"passes": [9]})
    ]
    hashes = {TokenLabeller((token,)).settings["tokens"][0]["sha256"] for token in others}
    assert len(hashes - {settings["tokens"][0]["sha256"]}) == len(others)


def test_words_are_read_without_a_mask(sd1_pipe):
    labeller = WordLabeller({"car": "car", "vegetation": "trees", "sky": "sky"}, margin=0.05)
    with daamlib.trace(sd1_pipe, store=labeller.store, texts=labeller.texts, self_attention=True) as trace:
        generate(sd1_pipe, height=16, width=24)
    words = dict(labeller.words)
    everything = label_map(trace[0], words, size=(16, 24), margin=0.05)
    assert np.array_equal(labeller(IMAGE, trace[0], "two cars"), everything) and CAR in everything
    assert np.array_equal(dataclasses.replace(labeller, named_only=False)(IMAGE, trace[0], "a road"), everything)
    surroundings = labeller(IMAGE, trace[0], "a road")  # no car, and what surrounds things always takes part
    assert np.array_equal(
        surroundings, label_map(trace[0], words, size=(16, 24), margin=0.05, names=["vegetation", "sky"])
    )
    assert {21, 23} <= {*np.unique(surroundings)} <= {21, 23, 255}
    by_word = WordLabeller({**words, "car": "taxi"}, margin=0.05)
    assert by_word.settings != dataclasses.replace(by_word, named_only=False).settings
    assert json.loads(json.dumps(labeller.settings)) == labeller.settings
    assert labeller.settings != WordLabeller(words).settings
    for options, message in (
        ({"words": {"cat": "cat", "car": "car"}}, "cat"),
        ({"words": {"car": "car"}}, "two"),
        ({"margin": 2}, "margin"),
    ):
        with pytest.raises(ValueError, match=message):
            WordLabeller(**({"words": STREET_WORDS} | options))
    with pytest.raises(TypeError, match="record"):
        labeller(IMAGE, None, "")


def test_an_annotator_sees_one_image():
    def network(images):
        assert images.shape == (1, 16, 24, 3)
        return np.full((1, 16, 24), CAR, np.uint8)

    labeller = AnnotatorLabeller(network)
    assert (labeller(IMAGE, None, "") == CAR).all() and labeller(IMAGE, None, "").shape == (16, 24)
