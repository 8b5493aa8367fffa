"""Heat maps of a record, against the sums their formulas say."""

import dataclasses

import pytest
import torch
from helpers import assert_close, capture, generate, naive_maps
from torch.nn import functional as F

import daamlib
from daamlib.attention.layers import KeyProjection, Layer
from daamlib.attention.ldaam import collapse

PROMPT = "a car and a bicycle, at night"
GRIDS = [(16, 24), (8, 12)]  # of the tiny U-Nets' levels


@pytest.fixture(scope="module")
def records(sd1_pipe, sd2_pipe, sdxl_pipe):
    """{family: (record, the naive captures of the same passes)}: two prompts under guidance, the second's record."""
    made = {}
    for family, pipe in {"sd1": sd1_pipe, "sd2": sd2_pipe, "sdxl": sdxl_pipe}.items():
        with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
            generate(pipe, ["a tree", PROMPT], num_inference_steps=3)
        made[family] = trace[1], captures
    return made


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def made(request, records):
    return records[request.param]


@pytest.fixture
def record(records):
    """Of SD 1's family."""
    return records["sd1"][0]


@pytest.fixture
def linear_record(record):
    """The same as made with `store="linear"`."""
    layers = [dataclasses.replace(layer, queries=None, query_sum=layer.summed_queries()) for layer in record.layers]
    return dataclasses.replace(record, layers=tuple(layers))


def random_embeddings(record, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, record.d_text, generator=generator, dtype=torch.float64).to(dtype).to(record.device)


# -- correctness ---------------------------------------------------------------------------------------------------


def test_daam_equals_the_naive_sum_of_attention_probabilities(made):
    record, captures = made
    expected = naive_maps(captures, GRIDS, image=3)  # rows: two unconditional, two conditional
    maps = record.daam()
    assert_close(maps.values, expected[: len(maps)], 1e-5)
    assert maps.values.dtype == torch.float32
    assert len(maps) < len(expected)  # padding rows are cut off


def test_ldaam_equals_the_naive_sum_of_scaled_scores(made):
    record, captures = made
    expected = naive_maps(captures, GRIDS, image=3, kind="scores")
    maps = record.ldaam()
    assert_close(maps.values, expected[: len(maps)], 1e-4)
    assert maps.values.dtype == torch.float32


def test_maps_of_any_text_equal_attention_to_it(made):
    """OV-DAAM, from the keys and queries of every layer, one head at a time."""
    record, _ = made
    embeddings = record.encode("a traffic light")
    for maps, activate in (
        (record.daam("a traffic light", padding=False), lambda scores: scores.softmax(dim=-1)),
        (record.ldaam("a traffic light"), lambda scores: scores),
    ):
        expected = torch.zeros_like(maps.values)
        for layer in record.layers:
            d_head = len(layer.key_weight) // layer.heads
            for queries in layer.queries:
                for q, w in zip(queries.split(d_head, dim=1), layer.key_weight.split(d_head), strict=True):
                    scores = q @ (embeddings.values @ w.T).T * d_head**-0.5
                    grid = activate(scores).T.unflatten(1, layer.grid)
                    expected += F.interpolate(grid[None], record.grid, mode="bilinear", align_corners=False)[0]
        assert_close(maps.values, expected, 1e-5)
        assert maps.tokens == embeddings.tokens


def test_the_softmax_runs_over_the_padding_if_asked(record):
    padded, alone = record.daam("a tree"), record.daam("a tree", padding=False)
    assert padded.tokens == alone.tokens == ("<|startoftext|>", "a", "tree", "<|endoftext|>")
    assert_close(alone.values.sum(dim=0), torch.full((16, 24), float(record.summands)))
    assert (padded.values.sum(dim=0) < 0.5 * record.summands).all()
    assert_close(record.daam_from(record.encode("a tree", padding=True)).values[:4], padded.values)
    assert_close(record.daam(PROMPT).values, record.daam().values)


def test_words_of_a_record(record):
    maps = record.daam()
    assert_close(maps["bicycle"], maps.values[5:12].mean(dim=0), 1e-6)
    assert maps.tokens[5:12] == tuple("bicycle")
    with pytest.raises(ValueError, match="its tokens are .*'car'.* record.daam"):
        maps["sidewalk"]
    assert record.daam("sidewalk")["sidewalk"].shape == record.ldaam("sidewalk")["sidewalk"].shape == (16, 24)


def test_an_empty_text_has_the_maps_of_start_and_end(record):
    assert record.daam("").tokens == record.ldaam("").tokens == ("<|startoftext|>", "<|endoftext|>")
    with pytest.raises(ValueError, match="not in the text"):
        record.daam("")["car"]


# -- embeddings ----------------------------------------------------------------------------------------------------


def test_the_linear_map_is_ldaam_and_is_computed_once(record, monkeypatch):
    record, calls = dataclasses.replace(record), []
    monkeypatch.setattr("daamlib.attention.record.collapse", lambda *args: calls.append(1) or collapse(*args))
    linear = record.linear_map()
    assert linear.shape == linear.weight.shape == (16, 24, record.d_text)
    assert linear.weight.dtype == torch.float32
    assert torch.equal(record.linear_map().weight, linear.weight)
    assert calls == [1]
    embeddings = record.encode("a tree")
    assert torch.equal(linear(embeddings), record.ldaam("a tree").values)
    assert torch.equal(record.ldaam_from(embeddings.values).values, linear(embeddings.values))


def test_bare_embeddings_get_numbers_for_names(record):
    maps = record.daam_from(random_embeddings(record))
    assert maps.tokens == ("0", "1", "2")
    assert torch.equal(maps[1], maps.values[1])


def test_float64_embeddings_are_computed_in_float64(record):
    embeddings = random_embeddings(record, dtype=torch.float64)
    for method in (record.daam_from, record.ldaam_from):
        assert method(embeddings).values.dtype == torch.float64
        assert_close(method(embeddings.float()).values.double(), method(embeddings).values, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_computed_in_float32(record, dtype):
    embeddings = random_embeddings(record, dtype=dtype)
    for method in (record.daam_from, record.ldaam_from):
        assert torch.equal(method(embeddings).values, method(embeddings.float()).values)


@pytest.mark.parametrize("max_bytes", [1, 1000, 20_000, 2**40])
def test_the_budget_does_not_change_the_maps(record, max_bytes):
    embeddings = random_embeddings(record)
    expected = record.daam_from(embeddings).values
    assert_close(record.daam_from(embeddings, max_bytes=max_bytes).values, expected, 1e-6)


@pytest.mark.parametrize("max_bytes", [5000, 2**26])  # in pieces, and at once
def test_gradients_of_each_entry_agree_with_finite_differences(record, max_bytes):
    first = next(layer for layer in record.layers if layer.grid == (8, 12))
    part = record.select(steps=[0, 2], layers=lambda layer: layer is first)
    weights = torch.randn(2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(record.device)
    embeddings = random_embeddings(part, count=2, dtype=torch.float64).requires_grad_()

    def loss(values):
        return (part.daam_from(values, max_bytes=max_bytes).values * weights).sum()

    assert torch.autograd.gradcheck(loss, embeddings)


@pytest.mark.parametrize("method", ["daam_from", "ldaam_from"])
def test_gradients_agree_with_finite_differences(made, method):
    record = made[0]
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(3, *record.grid, dtype=torch.float64, generator=generator).to(record.device)
    embeddings = random_embeddings(record, dtype=torch.float64).requires_grad_()

    def loss(values):
        return (getattr(record, method)(values).values * weights).sum()

    assert torch.autograd.gradcheck(loss, embeddings, fast_mode=True)  # along random directions


def test_gradients_in_float32_reach_a_leaf_and_only_if_asked(record):
    embeddings = random_embeddings(record).requires_grad_()
    record.daam_from(embeddings).values[1].mean().backward()
    assert embeddings.grad.abs().sum() > 0
    with torch.no_grad():
        assert not record.daam_from(embeddings).values.requires_grad
    assert not record.daam().values.requires_grad


def test_trap_in_place_edits_of_the_callers_arrays(record):
    embeddings = random_embeddings(record)
    before = embeddings.clone()
    queries = [layer.queries.clone() for layer in record.layers]
    record.daam_from(embeddings)
    record.ldaam_from(embeddings)
    record.daam().normalized()
    record.daam().values.zero_()
    record.ldaam().values.zero_()
    assert torch.equal(embeddings, before)
    assert all(torch.equal(layer.queries, kept) for layer, kept in zip(record.layers, queries, strict=True))
    assert record.daam().values.abs().sum() > 0
    assert record.ldaam().values.abs().sum() > 0


@pytest.mark.parametrize("method", ["daam_from", "ldaam_from"])
def test_wrong_embeddings(record, method):
    evaluate = getattr(record, method)
    with pytest.raises(ValueError, match=r"shape \(m, 24\) for this model, got \(3, 25\)"):
        evaluate(torch.zeros(3, 25))
    with pytest.raises(ValueError, match=r"got \(24,\)"):
        evaluate(torch.zeros(24))
    with pytest.raises(TypeError, match=r"got a tensor of torch.int64"):
        evaluate(torch.zeros(3, 24, dtype=torch.long))
    with pytest.raises(TypeError, match="got list"):
        evaluate([[0.0] * 24])
    with pytest.raises(TypeError, match="got str"):
        evaluate("a car")


@pytest.mark.parametrize("text", [3, ["a car"]])
def test_wrong_texts(record, text):
    for method in (record.daam, record.ldaam, record.encode):
        with pytest.raises(TypeError, match="text must be a string"):
            method(text)


def test_a_text_over_the_context_length(record):
    for method in (record.daam, record.ldaam, record.encode):
        with pytest.raises(ValueError, match="has 82 tokens .* reads 77: shorten it by 5 tokens"):
            method("car " * 80)


# -- records of sums, parts, models --------------------------------------------------------------------------------


def test_a_linear_record_has_ldaam_and_no_daam(record, linear_record):
    assert_close(linear_record.ldaam("a tree").values, record.ldaam("a tree").values, 1e-6)
    assert_close(linear_record.linear_map().weight, record.linear_map().weight, 1e-6)
    for evaluate in (
        lambda: linear_record.daam(),
        lambda: linear_record.daam("a tree"),
        lambda: linear_record.daam_from(random_embeddings(record)),
    ):
        with pytest.raises(ValueError, match='store="queries", or use ldaam'):
            evaluate()
    with pytest.raises(ValueError, match="steps cannot be taken apart"):
        linear_record.select(steps=[0])
    heads = [linear_record.select(heads=[head]).ldaam().values for head in range(4)]
    assert_close(sum(heads), record.ldaam().values)


def test_a_collapsed_record_has_ldaam_alone(record, linear_record):
    small = linear_record.collapsed()
    assert small.grid == record.grid and small.device == record.device
    assert small.nbytes == small.linear_map().weight.nbytes == 4 * 16 * 24 * record.d_text
    assert_close(small.ldaam("a tree").values, record.ldaam("a tree").values, 1e-6)
    assert torch.equal(small.to("cpu").linear_map().weight, linear_record.linear_map().weight.cpu())
    assert small.collapsed().nbytes == small.nbytes
    daamlib.require_same_model([record, small])
    for evaluate in (small.daam, lambda: small.daam("a tree"), lambda: small.daam_from(random_embeddings(record))):
        with pytest.raises(ValueError, match='or collapsed.*: trace with store="queries", or use ldaam'):
            evaluate()
    for part in ({"layers": lambda layer: True}, {"steps": [0]}, {"heads": [0]}):
        with pytest.raises(ValueError, match="was collapsed to one map"):
            small.select(**part)
    assert linear_record.layers[0].query_sum is not None  # as it was


def test_the_token_of_collapsed_records_is_that_of_the_whole(record):
    mask = record.ldaam("a tree")["tree"] > 0
    token, of_map = (daamlib.optimize_token([one], [mask], word="tree") for one in (record, record.collapsed()))
    assert torch.equal(of_map.embedding, token.embedding)
    assert torch.equal(token.maps(record.collapsed()).values, token.maps(record).values)
    with pytest.raises(ValueError, match="was collapsed to one map"):
        daamlib.optimize_token([record.collapsed()], [mask], layers=[record.layers[0].name])


def test_the_parts_add_up_to_the_whole(record):
    for maps in ("daam", "ldaam"):
        whole = getattr(record, maps)().values
        steps = [getattr(record.select(steps=[step]), maps)().values for step in range(3)]
        heads = [getattr(record.select(heads=[head]), maps)().values for head in range(4)]
        assert_close(sum(steps), whole)
        assert_close(sum(heads), whole)
        layers = [getattr(record.select(layers=lambda a, b=b: a is b), maps)() for b in record.layers]
        assert_close(sum(layer.resize(16, 24).values for layer in layers), whole)


def test_select_keeps_what_was_asked_for(record):
    part = record.select(layers=lambda layer: layer.name.startswith("up"), steps=[2, 0], heads=[1, 3])
    assert [layer.name for layer in part.layers] == [
        layer.name for layer in record.layers if layer.name.startswith("up")
    ]
    assert part.timesteps == [record.timesteps[2], record.timesteps[0]]
    assert {layer.heads for layer in part.layers} == {2}
    assert part.grid == record.grid
    assert record.select(layers=lambda layer: layer.grid == (8, 12)).daam().values.shape[1:] == (8, 12)
    assert len(record.timesteps) == 3
    assert {layer.heads for layer in record.layers} == {4}


def test_select_with_nothing_left(record):
    for nothing in ({"layers": lambda layer: False}, {"steps": []}, {"heads": []}):
        with pytest.raises(ValueError, match="nothing is left of 3 steps and the layers .*attn2 \\(16, 24\\)"):
            record.select(**nothing)
    for missing in ({"steps": [3]}, {"heads": [4]}):
        with pytest.raises(IndexError):
            record.select(**missing)


def with_keys(record, change):
    """The record as another model's: `change` makes of each layer's key weights others."""
    layers = [dataclasses.replace(layer, to_k=KeyProjection(change(layer.key_weight))) for layer in record.layers]
    return dataclasses.replace(record, layers=tuple(layers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_records_of_one_model_are_of_one_model_in_any_precision(record, linear_record, dtype):
    daamlib.require_same_model([record])
    rounded = with_keys(record, lambda weight: weight.to(dtype))
    daamlib.require_same_model([record, linear_record, record.select(steps=[1]), rounded])


def test_records_of_other_models_are_told_apart(record, records):
    with pytest.raises(ValueError, match="record 1 and record 0 have other key weights in down_blocks.0"):
        daamlib.require_same_model([record, records["sd2"][0]])
    with pytest.raises(ValueError, match="record 2 and record 0 have other cross-attention layers"):
        daamlib.require_same_model([record, record, records["sdxl"][0]])


def rotated(weight):
    rotation, _ = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=torch.Generator().manual_seed(0)))
    return rotation.to(weight) @ weight


def tuned(weight):
    """A fine-tune: every weight moved by some percent of its size."""
    return weight * (1 + 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight))


@pytest.mark.parametrize("change", [rotated, tuned])
def test_what_the_norms_of_the_weights_hardly_show_is_seen(record, change):
    other = with_keys(record, change)
    for one, changed in zip(record.layers, other.layers, strict=True):
        assert abs(changed.key_weight.norm() - one.key_weight.norm()) < 0.01 * one.key_weight.norm()
    with pytest.raises(ValueError, match="other key weights"):
        daamlib.require_same_model([record, other])


def test_what_a_record_says_of_itself(record):
    assert record.prompt == PROMPT
    assert record.grid == (16, 24)
    assert record.d_text == 24
    assert record.branch == "conditional"
    assert len(record.timesteps) == 3
    assert len(record.layer_names()) == 6 and record.layer_names()[0].startswith("down_blocks.0.")
    bare = dataclasses.replace(record)  # its linear map is not computed yet
    assert bare.nbytes == sum(layer.queries.nbytes for layer in record.layers) > 0
    assert bare.linear_map().weight.nbytes + dataclasses.replace(record).nbytes == bare.nbytes
    assert repr(record).startswith(f"AttentionRecord({PROMPT!r}, grid=(16, 24), steps=3, layers=6, ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.prompt = "other"


def test_trap_hw_from_sqrt_of_a_token_count(record):
    """A wide and a tall layer of as many positions are different maps."""
    queries = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(0))
    keys = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    wide, tall = (
        dataclasses.replace(record, layers=(Layer("a.attn2", grid, 2, 0.7, KeyProjection(keys), queries=queries),))
        for grid in ((4, 6), (6, 4))
    )
    embeddings = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    assert wide.grid == (4, 6)
    assert tall.grid == (6, 4)
    assert torch.equal(wide.daam_from(embeddings).values.flatten(1), tall.daam_from(embeddings).values.flatten(1))
    assert wide.daam_from(embeddings).values.shape == (2, 4, 6)
    assert tall.ldaam_from(embeddings).values.shape == (2, 6, 4)


@pytest.mark.parametrize("steps", [[0, 0], [2, -1]])
def test_a_step_is_selected_once(record, steps):
    with pytest.raises(ValueError, match="a step is selected once, got"):
        record.select(steps=steps)
