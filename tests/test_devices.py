"""The route of notebooks 06 and 07 on a GPU that is not there; off-loaded and compiled pipelines; inference mode.

`placement.Pretended` stands in for the GPU, and the first tests prove that it would notice.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from helpers import assert_close, generate
from placement import Pretended, device_of
from tiny import build
from torch.nn import functional as F

import daamlib
from daamlib import AttentionRecord, OptimizedToken, datasets, optimize_token
from daamlib.attention.readers import fingerprint_of
from daamlib.cityscapes import BY_NAME
from daamlib.datasets import export
from daamlib.plots import show_map_rows, show_maps, show_values
from daamlib.widgets import explore
from daamlib_lab import experiments
from daamlib_lab.experiments import segmentation
from daamlib_lab.urban.annotator import annotate, load_annotator

PROMPTS = ["a car and a person", "a person and a car", "a car, a person", "a person, a car"]
SIZE = (32, 48)
CAR, PERSON = (BY_NAME[name].id for name in ("car", "person"))


@pytest.fixture(autouse=True)
def on_the_cpu(pytestconfig):
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("these tests choose their devices themselves: run them with --device cpu")


@pytest.fixture(params=["cuda", "mps"])
def gpu(request):
    """A pretended device, for the time of a test."""
    with Pretended(request.param) as device:
        yield device


def halves(images):
    """Label maps for tests: a car on the left, a person at the right, nothing between them."""
    ids = np.zeros(images.shape[:3], np.uint8)
    third = images.shape[2] // 3
    ids[:, 8:, :third], ids[:, 8:, -third:] = CAR, PERSON
    return ids


halved = datasets.AnnotatorLabeller(halves)


# -- the pretended device would notice -----------------------------------------------------------------------------

MIXED = {
    "add": lambda a, b: a + b,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a[0, 0], b[0, 0]]),  # scalars, too
    "matmul": lambda a, b: a @ b,
    "linear": F.linear,
    "compare": lambda a, b: a > b,
    "equal": torch.equal,
    "in place": lambda a, b: a.add_(b),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "an index": lambda a, b: b[a.long()],
    "an assignment": lambda a, b: a.__setitem__(a.long(), b),
    "a loss": F.mse_loss,
    "a layer": lambda a, b: torch.nn.Linear(2, 2)(a),
    "autograd": lambda a, b: torch.autograd.grad((a * a).sum(), a)[0] + b,
    ".grad": lambda a, b: (a.square().sum().backward(), a.grad + b),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_that_meet_raise(gpu, mix):
    near, far = torch.ones(2, 2), torch.ones(2, 2).to(gpu)
    if mix in (MIXED["autograd"], MIXED[".grad"]):
        far.requires_grad_()
    with pytest.raises(RuntimeError, match="device"):
        mix(far, near)
    if mix is not MIXED["a layer"]:
        mix(near.clone().requires_grad_(far.requires_grad), torch.ones(2, 2))


def test_numpy_and_generators_of_another_device_raise(gpu):
    far = torch.ones(2, device=gpu)
    for ask in (far.numpy, lambda: np.asarray(far), lambda: np.array([far[0], far[1]])):
        with pytest.raises(TypeError, match="numpy"):
            ask()
    assert far.numpy(force=True).tolist() == far.cpu().numpy().tolist() == far.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device=gpu, generator=torch.Generator())


def test_what_may_meet_as_on_a_gpu(gpu):
    near, far = torch.arange(4.0), torch.arange(4.0).to(gpu)
    assert (far * torch.tensor(2.0)).device == gpu  # a scalar on the CPU
    assert far[torch.tensor([0, 1])].device == gpu  # an index there
    assert near[far.long()[1]] == 1  # a scalar as an index
    far[1:3] = near[1:3]  # a copy
    assert near.copy_(far).device.type == "cpu"


def test_tensors_are_followed(gpu):
    far = torch.randn(2, 3).to(gpu)
    assert far.device == gpu and far.cpu().device.type == "cpu" and far.is_cuda == (gpu.type == "cuda")
    for made in (far.T, far[0], far.clone(), far.half(), far.new_zeros(2), torch.zeros_like(far), far.split(1)[1]):
        assert made.device == gpu
    for made in (torch.zeros(2, device=gpu), torch.as_tensor([1.0], device=gpu), torch.eye(2, device=gpu.type)):
        assert made.device == gpu
    assert torch.zeros(2).device.type == torch.arange(3).device.type == "cpu"
    assert torch.zeros(2).to(far).device == gpu
    near = torch.zeros(2)
    assert near.to("cpu") is near and far.to(gpu) is far and near.to(gpu) is not near
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(gpu)
    assert {tensor.device for tensor in module.state_dict().values()} == {gpu}
    assert module(far).device == gpu
    assert {tensor.device.type for tensor in module.to("cpu").state_dict().values()} == {"cpu"}


def test_apples_gpus_have_no_float64():
    with Pretended("mps") as gpu:
        for make in (lambda: torch.ones(2).to(gpu).double(), lambda: torch.ones(2, device=gpu, dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert torch.ones(2, device=gpu).cpu().double().dtype == torch.float64


def test_nothing_is_pretended_afterwards():
    with Pretended("cuda") as gpu:
        far = torch.ones(2).to(gpu)
    assert far.device.type == torch.nn.Parameter(torch.ones(2)).device.type == "cpu"
    assert device_of(far) == gpu


def test_a_device_that_is_not_there_is_a_usage_error():
    with pytest.raises(pytest.UsageError, match="nowhere"):
        tiny.prepare_device("nowhere")


# -- records -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(gpu):
    """(pipeline, record, linear record) on the pretended device."""
    pipe = build("sd1", gpu)
    with daamlib.trace(pipe) as trace, daamlib.trace(pipe, store="linear") as sums:
        generate(pipe)
    return pipe, trace[0], sums[0]


def tensors_of(record):
    kept = [record.prompt_embeddings.values]
    kept += [getattr(layer, name) for layer in record.layers for name in ("key_weight", "queries", "query_sum")]
    return [tensor for tensor in kept if tensor is not None]


def test_a_traced_image_is_the_same_wherever_it_is_made(gpu, sd1_pipe):
    far = build("sd1", gpu)
    with daamlib.trace(far) as trace:
        image = generate(far)
    assert torch.equal(image.cpu(), generate(sd1_pipe))
    assert {tensor.device for tensor in tensors_of(trace[0])} == {gpu}
    assert trace[0].device == gpu
    assert trace[0].daam("a tree").values.device == trace[0].ldaam("a tree").values.device == gpu


def test_a_record_moves_with_all_its_tensors(gpu, made):
    pipe, *records = made
    for record in records:
        there = record.linear_map().weight
        back = record.to("cpu")
        assert {tensor.device.type for tensor in tensors_of(back)} == {"cpu"}
        assert {tensor.device for tensor in tensors_of(record)} == {gpu}  # as it was
        assert (back.prompt, back.timesteps, back.branch, back.pipe) == (
            record.prompt,
            record.timesteps,
            "conditional",
            pipe,
        )
        assert back.linear_map().weight.device.type == "cpu"  # of the old record would lie on the GPU
        assert torch.equal(back.linear_map().weight, there.cpu())
        again = back.to(gpu)
        assert {tensor.device for tensor in tensors_of(again)} == {gpu}
        for one, other in zip(tensors_of(again), tensors_of(record), strict=True):
            assert torch.equal(one, other)
        assert again.linear_map().weight.device == gpu


def test_a_record_that_lies_apart_from_its_pipeline_embeds_texts(gpu, made):
    record = made[1].to("cpu")
    assert record.encode("a tree").values.device.type == "cpu"
    assert_close(record.daam("a tree").values, made[1].daam("a tree").values)
    assert_close(record.ldaam("a tree").values, made[1].ldaam("a tree").values)
    embeddings = made[1].encode("a tree")
    assert embeddings.values.device == gpu
    assert record.daam_from(embeddings).values.device.type == record.ldaam_from(embeddings).values.device.type == "cpu"


def test_where_a_record_is_loaded_to(gpu, made, tmp_path):
    pipe, record, _ = made
    record.save(tmp_path / "a.safetensors")
    load = functools.partial(AttentionRecord.load, tmp_path / "a.safetensors")
    for found, device in (
        (load(), "cpu"),
        (load(device=gpu), gpu.type),
        (load(pipe=pipe), gpu.type),
        (load(pipe=pipe, device="cpu"), "cpu"),
        (load(pipe=build("sd1"), device=gpu.type), gpu.type),
    ):
        assert {tensor.device.type for tensor in tensors_of(found)} == {device}
        assert found.device.type == device
        if found.pipe is not None:
            assert_close(found.daam("a tree").values, record.daam("a tree").values)


def test_real_images(gpu):
    pipe = build("sd1", gpu)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    record = daamlib.trace_image(pipe, image)
    assert {tensor.device for tensor in tensors_of(record)} == {gpu}
    pipe.scheduler.add_noise(torch.zeros(1, device=gpu), torch.zeros(1, device=gpu), torch.zeros(1).long().to(gpu))
    assert pipe.scheduler.alphas_cumprod.device == gpu  # the scheduler took them along
    assert_close(daamlib.trace_image(pipe, torch.from_numpy(image).permute(2, 0, 1).to(gpu) / 255).daam().values,
                 record.daam().values)  # fmt: skip
    assert_close(daamlib.trace_image(pipe.to("cpu"), image).daam().values, record.daam().values)


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scattered(gpu, made, tmp_path):
    """Records of one model, by where they lie: with the pipeline, on the CPU, some here and some there."""
    pipe, record, _ = made
    here = record.to("cpu")
    return {"far": [record] * 3, "near": [here] * 3, "both": [record, here, record], "both, near first": [here, record]}


FITS = {
    "LDAAM": {"word": "car"},
    "LDAAM without a word": {},
    "LDAAM, dice": {"word": "car", "loss": "dice"},
    "LDAAM, the thesis' loss": {"word": "car", "loss": "cross_entropy"},
    "LDAAM, joint": {"word": ("car", "tree"), "multiclass": True},
    "LDAAM, background": {"word": ("car", "tree"), "background": True},
    "LDAAM of a word in a text": {"word": "car", "text": "a car and a tree"},
    "DAAM": {"method": "daam", "word": "car"},
    "DAAM without a word": {"method": "daam"},
    "DAAM of another text": {"method": "daam", "word": "car", "text": "a car"},
    "DAAM, background": {"method": "daam", "word": ("car", "tree"), "background": True},
}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
def test_tokens_are_fitted_wherever_the_records_lie(gpu, scattered, options):
    ids = halves(np.zeros((1, *SIZE, 3), np.uint8))[0]
    several = not isinstance(options.get("word", ""), str)
    mask = np.stack([ids == CAR, ids == PERSON]) if several else ids == CAR
    tokens = {}
    for name, records in scattered.items():
        masks = [torch.from_numpy(mask).to(gpu) if i else mask for i in range(len(records))]
        token = tokens[name] = optimize_token(records, masks, **{"iterations": 4, **options})
        assert token.embedding.device.type == "cpu"
        assert all(map(math.isfinite, token.losses))
        for record in (scattered["far"][0], scattered["near"][0]):
            assert token.maps(record).values.device == record.device
            if options.get("loss") != "cross_entropy":
                assert token.probabilities(record).device == record.device
    assert tokens["near"].losses[0] == pytest.approx(tokens["far"].losses[0], rel=1e-4)
    assert tokens["both"].losses[0] == pytest.approx(tokens["far"].losses[0], rel=1e-4)


def test_a_token_is_the_same_token_after_loading(gpu, made, tmp_path):
    mask = halves(np.zeros((1, *SIZE, 3), np.uint8))[0] == CAR
    token = optimize_token([made[1]], [mask], word="car", iterations=3)
    token.save(tmp_path / "car.safetensors")
    loaded = OptimizedToken.load(tmp_path / "car.safetensors")
    assert torch.equal(loaded.embedding, token.embedding)
    assert torch.equal(loaded.maps(made[1])["car"], token.maps(made[1])["car"])


# -- notebooks 06 and 07 -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_route_of_notebook_06(gpu, tmp_path):
    """Images and their records on disk, label maps, the comparison, its ablations and figures."""
    pipe = build("sd1", gpu)
    options = {"steps": 2, "size": SIZE, "keep_steps": 1, "self_attention": True}
    dataset = datasets.generate(pipe, PROMPTS, tmp_path / "set", labeller=halved, **options)
    examples = experiments.load_examples(dataset, pipe)
    assert [example.record.device for example in examples] == [gpu] * 4
    traced = experiments.load_examples(dataset, pipe, timesteps=(300,))
    few = {"DAAM": {"iterations": 2}, "LDAAM": {"iterations": 2}}
    comparisons = [
        experiments.compare(of, classes=("car", "person"), train_images=(1, 2), resamples=5, options=few)
        for of in (examples, traced, [examples[0], *(replace(e, source=e.record.to("cpu")) for e in examples[1:])])
    ]
    test = [c.results[c.results.metric == "max_miou"].value for c in comparisons]
    assert np.isfinite(test).all()
    assert experiments.evaluate_transfer(comparisons[0].tokens, traced, resamples=5).value.notna().all()

    token = comparisons[0].tokens["LDAAM", 2, "car"]
    counts = experiments.count(examples, "car", "LDAAM", token, calibrated=True)
    assert counts.union.min() > 0
    record = examples[0].record
    for part in (record.select(steps=[0]), record.select(heads=[1, 2]), record.select(layers=lambda a: a.heads == 4)):
        assert part.daam()["car"].device == part.linear_map().weight.device == gpu
    maps = [record.daam()["car"], token.maps(record)["car"]]
    mask = torch.from_numpy(examples[0].masks["car"]).to(gpu)
    image = dataset.image(0)
    show_map_rows([image], {"a": maps[:1], "b": maps[1:]}, masks={"a": [mask], "b": [mask.cpu().numpy()]})
    show_maps(image, {"a": maps[0]})
    show_values({"a": maps[0]}, "value")


def test_the_route_of_notebook_07(gpu, tmp_path):
    """Tokens of a few annotated images label new ones, which a network is trained on."""
    pipe = build("sd1", gpu)
    annotated = datasets.generate(pipe, PROMPTS[:2], tmp_path / "a", labeller=halved, steps=2, size=SIZE, keep_steps=2)
    records = [annotated.record(i, pipe) for i in range(2)]
    masks = [np.stack([annotated.mask(i, word) for word in ("car", "person")]) for i in range(2)]
    token = optimize_token(records, masks, word=("car", "person"), background=True)
    token.save(tmp_path / "token.safetensors")
    loaded = OptimizedToken.load(tmp_path / "token.safetensors")
    whole = optimize_token(records[:1], [masks[0][0]], method="daam", word="car", text="a car", iterations=2)
    for name, tokens in (("ldaam", [loaded]), ("daam", [whole])):
        labeller = datasets.TokenLabeller(tuple(tokens), named_only=False)
        made = datasets.generate(pipe, PROMPTS, tmp_path / name, labeller=labeller, steps=2, size=SIZE)
        assert made.labels(3).shape == SIZE
    made = datasets.load(tmp_path / "ldaam")
    city = export.cityscapes(made, tmp_path / "city", classes=("car", "person"))
    data = segmentation.read(city, side=32)
    network = segmentation.train(data, steps=2, batch=2, device=gpu.type)
    assert next(network.parameters()).device == gpu
    found = segmentation.predict(network, data.images)
    assert found.shape == data.targets.shape
    annotator = load_annotator(device=gpu.type)
    assert annotate(annotator, segmentation.read(city).images[:1]).shape == (1, *SIZE)


@pytest.mark.parametrize("lies", ["far", "near"])
def test_the_explorer_reads_wherever_the_record_lies(gpu, made, tmp_path, lies):
    record = made[1].to("cpu") if lies == "near" else made[1]
    image = np.zeros((*SIZE, 3), np.uint8)
    mask = halves(image[None])[0] == CAR
    optimize_token([record], [mask], word="car", iterations=2).save(tmp_path / "car.safetensors")
    explorer = explore(record, image, torch.from_numpy(mask).to(gpu))
    for change in (
        {"word": "bus"},
        {"method": "ov-daam"},
        {"method": "daam", "word": "car"},
        {"steps": (1, 1)},
        {"method": "token", "token_path": str(tmp_path / "car.safetensors")},
    ):
        explorer.change(**change)
        assert explorer.result.message == ""
        assert explorer.result.heat.shape == SIZE


# -- off-loaded pipelines ------------------------------------------------------------------------------------------


@pytest.fixture
def onto():
    """The device that off-loaded models come to."""
    with Pretended("cuda") as device:
        yield device


OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_off_loaded_pipelines_are_traced(onto, family, offload, tmp_path):
    pipe, plain = build(family), build(family)
    getattr(pipe, offload)(device=onto)
    with daamlib.trace(pipe) as trace, daamlib.trace(pipe, store="linear") as sums:
        image = generate(pipe)
    with daamlib.trace(plain) as expected:
        assert torch.equal(image.cpu(), generate(plain))
    record = trace[0]
    assert {tensor.device.type for tensor in tensors_of(record)} == {onto.type}
    assert_close(record.daam("a tree").values, expected[0].daam("a tree").values)
    assert_close(sums[0].ldaam("a tree").values, expected[0].ldaam("a tree").values)
    assert fingerprint_of(pipe).difference(fingerprint_of(plain)) is None
    record.save(tmp_path / "a.safetensors")
    loaded = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    assert loaded.device.type == onto.type
    assert_close(loaded.daam("a tree").values, record.daam("a tree").values)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_off_loaded_pipelines_read_real_images_and_go_back(onto, offload, sd1_pipe):
    pipe = build("sd1")
    getattr(pipe, offload)(device=onto)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    record = daamlib.trace_image(pipe, image, prompt="a car")
    assert_close(record.daam().values, daamlib.trace_image(sd1_pipe, image, prompt="a car").daam().values)
    assert pipe.unet.device.type == ("cpu" if offload == OFFLOADS[0] else "meta")


@pytest.mark.parametrize("offload", OFFLOADS)
def test_off_loaded_pipelines_make_datasets(onto, offload, sd1_pipe, tmp_path):
    pipe = build("sd1")
    getattr(pipe, offload)(device=onto)
    assert datasets.weight_hash(pipe) == datasets.weight_hash(sd1_pipe)
    options = {"steps": 1, "size": SIZE, "keep_steps": 1, "labeller": halved}
    dataset = datasets.generate(pipe, PROMPTS[:1], tmp_path / "set", **options)
    record = dataset.record(0, pipe)
    assert record.device.type == onto.type
    token = optimize_token([record], [dataset.mask(0, "car")], word="car", iterations=2)
    labeller = datasets.TokenLabeller((token,))
    made = datasets.generate(pipe, PROMPTS[:1], tmp_path / "labelled", labeller=labeller, steps=1, size=SIZE)
    assert made.labels(0).shape == SIZE


# -- compiled U-Nets -----------------------------------------------------------------------------------------------


RAN = []  # what was compiled leaves a mark here whenever it runs


def counting(graph, inputs):
    """The "eager" backend, which leaves marks."""

    def run(*arguments):
        RAN.append(graph)
        return graph.forward(*arguments)

    return run


def wrapped(pipe):
    pipe.unet = torch.compile(pipe.unet, backend=counting)


def in_place(pipe):
    pipe.unet.compile(backend=counting)


def block_by_block(pipe):
    for block in pipe.unet.up_blocks:
        block.compile(backend=counting)


def one_block_wrapped(pipe):
    pipe.unet.up_blocks[0] = torch.compile(pipe.unet.up_blocks[0], backend=counting)


@pytest.fixture(params=[wrapped, in_place, block_by_block, one_block_wrapped], ids=lambda way: way.__name__)
def compiled(request):
    """A pipeline whose U-Net is compiled, and has run so."""
    torch.compiler.reset()
    pipe = build("sd1")
    request.param(pipe)
    generate(pipe, num_inference_steps=1)
    assert RAN
    RAN.clear()
    yield pipe
    torch.compiler.reset()
    RAN.clear()


def test_compiled_unets_are_traced(compiled, sd1_pipe, tmp_path):
    with daamlib.trace(sd1_pipe) as expected:
        plain = generate(sd1_pipe)
    with daamlib.trace(compiled) as trace, daamlib.trace(compiled, store="linear") as sums:
        image = generate(compiled)
    assert torch.equal(image, plain)
    assert [layer.name for layer in trace[0].layers] == [layer.name for layer in expected[0].layers]
    for one, other in zip(tensors_of(trace[0]), tensors_of(expected[0]), strict=True):
        assert torch.equal(one, other)
    assert_close(sums[0].ldaam("a tree").values, expected[0].ldaam("a tree").values)
    expected[0].save(tmp_path / "a.safetensors")
    assert AttentionRecord.load(tmp_path / "a.safetensors", pipe=compiled).encode("a tree").length == 4
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    record = daamlib.trace_image(compiled, image)
    assert_close(record.daam().values, daamlib.trace_image(sd1_pipe, image).daam().values)
    assert not RAN
    generate(compiled, num_inference_steps=1)  # as compiled as before
    assert RAN


# -- inference mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["queries", "linear"])
def test_records_made_in_inference_mode_can_be_differentiated_through(fresh, store, tmp_path):
    with torch.inference_mode():
        pipe = fresh("sd1")
        with daamlib.trace(pipe, store=store) as trace:
            generate(pipe)
            assert len(trace) == 1
        record = trace[0]
        record.ldaam("a tree")
        real = daamlib.trace_image(pipe, np.zeros((*SIZE, 3), np.uint8))
        record.save(tmp_path / "a.safetensors")
        loaded = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    with daamlib.trace(pipe, store=store) as expected:
        generate(pipe)
    for made in (record, loaded, real):
        assert not any(tensor.is_inference() for tensor in tensors_of(made))
        embeddings = torch.randn(3, 24, requires_grad=True)
        made.ldaam_from(embeddings).values.square().mean().backward()
        assert embeddings.grad.abs().sum() > 0
        if store == "queries":
            made.daam_from(embeddings).values.square().mean().backward()
    assert_close(record.ldaam("a tree").values, expected[0].ldaam("a tree").values)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tokens_are_fitted_in_any_mode(sd1_pipe, mode):
    mask = halves(np.zeros((1, *SIZE, 3), np.uint8))[0] == CAR
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    with mode():
        for method in ("ldaam", "daam"):
            token = optimize_token(list(trace), [mask], method=method, word="car", iterations=4)
            assert token.losses[-1] < token.losses[0]
            assert not token.embedding.requires_grad and not token.embedding.is_inference()
