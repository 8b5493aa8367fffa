"""Loading pipelines, and what is inside of wrapped ones."""

import json
import logging
import shutil
import types

import pytest
import torch
import transformers
from helpers import assert_close, generate
from peft import LoraConfig, get_peft_model
from placement import Pretended
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, build
from torch.nn.parallel import DistributedDataParallel

import daamlib
from daamlib import pipeline
from daamlib_lab.urban.annotator import load_annotator


def build_transformer(family):
    """A tiny pipeline with a transformer, whose tokenizers need transformers 5."""
    if transformers.__version__ < "5":
        pytest.skip("its tokenizers need transformers 5")
    import tiny_joint
    import tiny_transformers

    module = tiny_transformers if family in tiny_transformers.FAMILIES else tiny_joint
    return module.build(family)


LORA = {"target_modules": ["to_q", "to_k"], "init_lora_weights": False}


def test_a_folder(capfd, device):
    pipe = daamlib.load_pipeline(GOLDEN / "tiny-sd15", device=device)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert (pipe.unet.dtype, pipe.device) == (torch.float32 if device.type == "cpu" else torch.float16, device)
    pipe = pipe.to(torch.float32)
    pipe("a car", height=64, width=64, num_inference_steps=1, output_type="latent")
    assert "it/s" not in capfd.readouterr().err  # no bars


def test_the_precision_is_the_callers(device):
    pipe = daamlib.load_pipeline(str(GOLDEN / "tiny-sd15"), device=device, dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    "family, stored, expected",
    [
        ("sd1", torch.float32, torch.float16),
        ("sd1", torch.float16, torch.float16),
        ("sd1", torch.bfloat16, torch.bfloat16),
        ("sdxl", torch.float32, torch.float16),
        ("SD 3", torch.float32, torch.bfloat16),
        ("SD 3", torch.float16, torch.float16),
        ("Flux.1", torch.bfloat16, torch.bfloat16),
        ("Qwen-Image", torch.float32, torch.bfloat16),
        ("PixArt-Sigma", torch.float32, torch.bfloat16),
        ("Sana 1.0", torch.float16, torch.float16),
    ],
)
def test_the_precision_on_a_gpu_is_the_stored_one_or_that_of_its_kind(tmp_path, family, stored, expected):
    make = build if family in ("sd1", "sdxl") else build_transformer
    make(family).to(dtype=stored).save_pretrained(tmp_path)
    with Pretended("cuda"):
        on_gpu = daamlib.load_pipeline(tmp_path, device="cuda")
    assert pipeline.denoiser_of(on_gpu).dtype == on_gpu.vae.dtype == expected
    assert pipeline.denoiser_of(daamlib.load_pipeline(tmp_path, device="cpu")).dtype == torch.float32


def save_denoiser(pipe, folder, **options):
    """The pipeline's folder, and in it its denoiser saved anew with these options; the path of the latter."""
    pipe.save_pretrained(folder)
    inner = folder / ("unet" if hasattr(pipe, "unet") else "transformer")
    shutil.rmtree(inner)
    pipeline.denoiser_of(pipe).save_pretrained(inner, **options)
    return inner


def precision(folder):
    with Pretended("cuda"):
        return pipeline.denoiser_of(daamlib.load_pipeline(folder, device="cuda")).dtype


def test_the_stored_precision_is_that_of_most_numbers_in_all_shards(tmp_path):
    pipe = build_transformer("Flux.1")
    denoiser = pipe.transformer.to(torch.float16)
    denoiser.proj_out.float()  # such as the norms of published models
    inner = save_denoiser(pipe, tmp_path, max_shard_size="10KB")
    assert len(list(inner.glob("*.safetensors"))) > 2
    assert precision(tmp_path) == torch.float16


def test_variants_do_not_say_the_stored_precision(tmp_path):
    pipe = build_transformer("SD 3")
    pipe.save_pretrained(tmp_path)
    pipe.transformer.half().save_pretrained(tmp_path / "transformer", variant="fp16")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) == 2
    assert precision(tmp_path) == torch.bfloat16


@pytest.mark.parametrize("written, expected", [("bfloat16", torch.bfloat16), ("float32", torch.float16)])
def test_weights_that_are_no_safetensors_have_the_precision_of_their_config(fresh, tmp_path, written, expected):
    config = save_denoiser(fresh("sd1"), tmp_path, safe_serialization=False) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": written}))
    assert precision(tmp_path) == expected


def test_the_precision_of_a_model_in_the_hubs_cache(monkeypatch, tmp_path):
    home = tmp_path / "models--me--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    build_transformer("Flux.1").to(dtype=torch.float16).save_pretrained(snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert precision("me/tiny") == torch.float16


def test_a_missing_bundled_model_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "BUNDLED", tmp_path / "urban-tiny")
    with pytest.raises(FileNotFoundError, match="urban-tiny"):
        daamlib.load_pipeline()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bundled_model_is_checked_in_every_precision(dtype):
    assert daamlib.load_pipeline(device="cpu", dtype=dtype).text_encoder.dtype == dtype


def test_the_bundled_weights_have_the_names_that_all_versions_of_transformers_know():
    with safe_open(pipeline.BUNDLED / "text_encoder" / "model.safetensors", "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"text_model"}
    folder = pipeline.BUNDLED / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())  # transformers 4 reads these two
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]  # transformers 5 this one
    assert (vocabulary, merges) == (model["vocab"], [tuple(pair) for pair in model["merges"]])


def test_training_writes_what_all_versions_load(tmp_path):
    if transformers.__version__ < "5":
        pytest.skip("the training needs transformers 5")
    from training import networks

    pipe = daamlib.load_pipeline(device="cpu", dtype=torch.float16)
    networks.save(pipe, tmp_path, "15MB")
    for name in ("text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (tmp_path / name).read_bytes() == (pipeline.BUNDLED / name).read_bytes()
    written, shipped = (json.loads((folder / "check.json").read_text()) for folder in (tmp_path, pipeline.BUNDLED))
    assert written["text"] == shipped["text"]
    assert written["values"] == pytest.approx(shipped["values"], abs=0.01)


@pytest.fixture
def copy(monkeypatch, tmp_path):
    """A copy of the bundled model, which is loaded in its place."""
    monkeypatch.setattr(pipeline, "BUNDLED", shutil.copytree(pipeline.BUNDLED, tmp_path / "copy"))
    return pipeline.BUNDLED


def change(path, act):
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def lose(tensors):
    tensors.pop(next(name for name in tensors if name.endswith("weight")))


def gain(tensors):
    tensors["left_over.weight"] = torch.zeros(2)


def rename(tensors):
    for name in list(tensors):
        tensors["another." + name] = tensors.pop(name)


@pytest.mark.parametrize("act", [lose, gain, rename])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_bundled_weights_that_are_missing_or_left_over_are_an_error(copy, part, act):
    change(next((copy / part).glob("*.safetensors")), act)
    with pytest.raises(ValueError, match="do not fit their model"):
        daamlib.load_pipeline(device="cpu")


def test_bundled_weights_of_other_values_are_an_error(copy):
    change(copy / "text_encoder" / "model.safetensors", lambda tensors: [each.mul_(1.2) for each in tensors.values()])
    with pytest.raises(ValueError, match="'a red car'.*transformers"):
        daamlib.load_pipeline(device="cpu")


@pytest.mark.parametrize("silent", [False, True])
def test_weights_that_a_users_model_lacks_are_an_error(fresh, tmp_path, silent):
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    fresh("sdxl").save_pretrained(tmp_path)
    change(tmp_path / "text_encoder_2" / "model.safetensors", lose)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL if silent else logging.WARNING)
        with pytest.raises(ValueError, match="(?s)CLIPTextModelWithProjection.*newly initialized"):
            daamlib.load_pipeline(tmp_path, device="cpu")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def test_weights_that_a_users_model_does_not_need_are_no_error(fresh, tmp_path):
    fresh("sd1").save_pretrained(tmp_path)
    change(tmp_path / "text_encoder" / "model.safetensors", gain)
    with torch.no_grad():
        assert daamlib.load_pipeline(tmp_path, device="cpu").text_encoder(torch.tensor([[1]]))[0].isfinite().all()


def test_an_annotator_whose_weights_are_missing_is_an_error(tmp_path):
    folder = shutil.copytree(pipeline.BUNDLED / "annotator", tmp_path / "annotator")
    change(folder / "model.safetensors", lose)
    with pytest.raises(ValueError, match="(?s)do not fit their model.*Segformer"):
        load_annotator(folder)


def test_a_generator_for_each_seed():
    first, second = daamlib.generators([3, 4])
    assert (first.initial_seed(), second.initial_seed()) == (3, 4)
    assert first.device.type == "cpu"


def test_the_size_of_images_needs_the_scale_of_the_autoencoder(sd1_pipe):
    assert pipeline.image_size(sd1_pipe) == (32, 32)
    with pytest.raises(ValueError, match="vae_scale_factor.*height and width"):
        pipeline.image_size(types.SimpleNamespace(unet=sd1_pipe.unet))


def compiled(module):
    return torch.compile(module, backend="eager")


def with_lora(module):
    torch.manual_seed(0)
    return get_peft_model(module, LoraConfig(**LORA)).eval()


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def compiled_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


WRAPPERS = {
    "PEFT": (with_lora,),
    "compiled": (compiled,),
    "compiled around PEFT": (with_lora, compiled),
    "PEFT around compiled": (compiled, with_lora),
    "compiled in place around PEFT": (with_lora, compiled_in_place),
    "compiled in place inside PEFT": (compiled_in_place, with_lora),
    "compiled forward": (compiled_forward,),
}


@pytest.mark.parametrize("wrappers", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_denoiser_is_read_as_the_plain_one(fresh, wrappers):
    plain, wrapped = fresh("sd1"), fresh("sd1")
    if with_lora in wrappers:  # the same weights in the same layers, without a wrapper
        with_lora(plain.unet)
    inner = wrapped.unet
    for wrap in wrappers:
        wrapped.unet = wrap(wrapped.unet)
    assert pipeline.denoiser_of(wrapped) is inner
    before = generate(wrapped)  # compiles without hooks
    with daamlib.trace(wrapped) as trace, daamlib.trace(plain) as other:
        images, expected = generate(wrapped), generate(plain)
    assert torch.equal(images, expected)
    assert_close(before, expected)
    assert trace[0].layer_names() == other[0].layer_names()
    assert torch.equal(trace[0].daam().values, other[0].daam().values)
    assert torch.equal(generate(wrapped), before)


def test_a_denoiser_for_several_processes(fresh):
    pipe = fresh("sd1")
    unet, wrapper = pipe.unet, torch.nn.Module.__new__(DistributedDataParallel)  # whose making needs a process group
    torch.nn.Module.__init__(wrapper)
    wrapper.module = compiled(unet)
    pipe.unet = compiled(wrapper)
    assert pipeline.denoiser_of(pipe) is unet


def test_what_is_compiled_runs_compiled_afterwards(fresh):
    pipe, calls = fresh("sd1"), []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph(*args)

    pipe.unet = torch.compile(pipe.unet, backend=backend)
    pipe.unet.down_blocks[0].attentions[0].compile(backend=backend)
    generate(pipe)
    assert calls
    with pytest.raises(KeyError), pipeline.uncompiled(pipe):
        calls.clear()
        generate(pipe)
        assert not calls
        raise KeyError
    generate(pipe)
    assert calls
