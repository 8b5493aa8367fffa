"""The notebooks on other models than the bundled one: each passes, or stops for a reason that it states.

The checkpoints are tiny, of random weights, and differ from the bundled model in everything that a notebook might take
for granted: the size of images and maps and whether they are square, the text width, the sampler, the number of text
encoders. Transformers differ in the bias and the norm of their keys too, and a joint model has no keys of a text that
did not run. What is measured on them means nothing.
"""

import nbformat
import numpy as np
import pytest
import tiny_joint
import tiny_transformers
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from tiny import build, vae
from transformers import CLIPTokenizer

import daamlib
from daamlib import datasets
from daamlib.cityscapes import BY_NAME
from daamlib.pipeline import BUNDLED, image_size
from daamlib_lab.runs.run import main
from daamlib_lab.urban.annotator import is_bundled, labels_for
from daamlib_lab.urban.scenes import KINDS

SIZES = {"sd1": (16, 24), "sdxl": 16}  # of the latents, as in the U-Net's config; the VAE's factor is 2
SAMPLERS = {"sd1": PNDMScheduler, "sdxl": EulerDiscreteScheduler}  # those that Stable Diffusion and SDXL come with


def encoder_for(tokenizer, encoder):
    """A new text encoder of the same kind and shape for another tokenizer."""
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["max_position_embeddings"] = tokenizer.model_max_length
    return type(encoder)(type(encoder.config).from_dict({**encoder.config.to_dict(), **ids}))


def know_the_words(pipe):
    """Give CLIP encoders the bundled tokenizer, which knows the notebooks' words."""
    tokenizer, parts = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer"), {}
    for name, encoder in pipe.components.items():
        if name.startswith("text_encoder") and type(encoder).__name__.startswith("CLIP"):
            parts[name] = encoder_for(tokenizer, encoder)
            parts[name.replace("text_encoder", "tokenizer")] = tokenizer
    pipe.register_modules(**parts)
    return pipe


def unet_pipe(family):
    pipe = build(family)
    pipe.unet.register_to_config(sample_size=SIZES[family])
    options = {"skip_prk_steps": True} if family == "sd1" else {}
    pipe.scheduler = SAMPLERS[family].from_config(pipe.scheduler.config, **options)
    return know_the_words(pipe)


def transformer_pipe(family):
    """Of the smallest of the sizes that the pipeline makes images in: 256 or 512 pixels."""
    pipe = tiny_transformers.build(family)
    sana = family.startswith("Sana")
    pipe.register_modules(vae=tiny_transformers.deep_vae(6) if sana else vae((4,) * 4, sample_size=256))
    pipe.transformer.register_to_config(sample_size=16 if sana else 32)
    return pipe


CHECKPOINTS = {
    "sd1": unet_pipe,
    "sdxl": unet_pipe,
    "PixArt-Sigma": transformer_pipe,
    "Sana 1.5": transformer_pipe,
    "SD 3": lambda family: know_the_words(tiny_joint.build(family)),
}


@pytest.fixture(scope="session", params=["sd1", "sdxl"])
def checkpoint(request, tmp_path_factory):
    """The folder of a checkpoint as `save_pretrained` writes it."""
    name = request.param.replace(" ", "-")
    folder = tmp_path_factory.mktemp(name) / f"tiny-{name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CHECKPOINTS[request.param](request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(checkpoint):
    return daamlib.load_pipeline(checkpoint, device="cpu")


@pytest.fixture
def run(checkpoint, tmp_path, capfd):
    """Run a notebook on the checkpoint: the exit code, what it printed, its output folder, what went wrong."""

    def run(number, **parameters):
        given = {"N_IMAGES": 1, "STEPS": 2, **parameters}
        pairs = [text for name, value in given.items() for text in ("-p", name, str(value))]
        runs = ["--runs-dir", str(tmp_path / "runs")]
        code = main(["--model", str(checkpoint), "--device", "cpu", *runs, *pairs, number])
        (executed,) = (tmp_path / "runs").glob("*/*.ipynb")
        cells = nbformat.read(executed, as_version=4).cells
        printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
        return code, printed, executed.with_suffix(""), capfd.readouterr().err

    return run


def test_the_size_of_images_follows_the_model(pipe, fresh):
    expected = {"StableDiffusionPipeline": (32, 48), "StableDiffusionXLPipeline": (32, 32)}[type(pipe).__name__]
    assert image_size(pipe) == expected
    image = pipe("a car", num_inference_steps=1).images[0]
    assert image.size == expected[::-1]
    for function in (image_size, is_bundled):
        with pytest.raises(TypeError, match="U-Net"):
            function("a model")
    unknown = fresh("sd1")
    unknown.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size"):
        image_size(unknown)


def test_the_annotator_labels_images_of_the_bundled_model_only(pipe):
    with pytest.raises(ValueError, match="MASKS="):
        labels_for(pipe)
    images = np.zeros((1, 48, 64, 3), np.uint8)
    assert labels_for(pipe, any_model=True)(images).shape == (1, 48, 64)
    bundled = daamlib.load_pipeline(device="cpu", dtype=torch.bfloat16)
    assert labels_for(bundled)(images).shape == (1, 48, 64)
    with torch.no_grad():
        bundled.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.1)
    assert not is_bundled(bundled)


def test_masks_are_checked_before_there_are_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="masks"):
        datasets.check_masks(tmp_path / "masks", 2)
    Image.fromarray(np.full((8, 8), BY_NAME["car"].id, np.uint8)).save(tmp_path / "00001.png")
    datasets.check_masks(tmp_path, 2)
    with pytest.raises(ValueError, match="00001.png"):
        datasets.check_masks(tmp_path, 1)


# What each prints of the sizes of the model, at the smallest numbers of images and scenes that it can do with.
SMALLEST = {
    "00": ({}, "grid {maps}, "),
    "01": ({}, "1 images (3, 32, 32) -> latents (4, 16, 16)"),  # of scenes, which are square
    "02": ({"N_IMAGES": 2}, "grid {maps}"),
    "03": ({"N_SCENES": 2}, "grid of the maps: {maps}, "),
    "04": ({"N_SCENES": 3}, "maps of {maps}, text width {width}"),
    "05": ({"N_SCENES": 24}, "one token of {width} numbers, fitted to 5 masks of {scene}"),
    "08": ({"N_SCENES": 24}, "self-attention of {maps[0]} x {maps[1]} positions"),
    "09": ({"N_IMAGES": 7, "CASES": 2}, "maps of {scene}: "),
}
PRINTED = {
    "tiny-sd1": {"maps": (16, 24), "scene": (16, 16), "width": 24},
    "tiny-sdxl": {"maps": (8, 8), "scene": (8, 8), "width": 40},
}


UNETS = [
    ("sd1", "01"),
    ("sd1", "03"),
    ("sd1", "05"),
    ("sd1", "08"),
    ("sd1", "09"),
    ("sdxl", "00"),
    ("sdxl", "02"),
    ("sdxl", "04"),
]  # each once


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, number", UNETS, indirect=["checkpoint"])
def test_a_notebook_passes(run, checkpoint, number):
    parameters, text = SMALLEST[number]
    code, printed, _, error = run(number, **parameters)
    assert code == 0, error
    assert text.format(**PRINTED[checkpoint.name]) in printed


# What each prints of a transformer, or the reason why it stops.
NO_MAP = 'ValueError: store="linear" is not for SD 3: the text of a joint model changes with the image'
NO_TOKEN = "ValueError: the text of a joint model changes with the image"
NO_UNET = "ValueError: this notebook opens a U-Net and takes DDIM's steps by hand"
NO_PARTS = "ValueError: this notebook takes maps apart into the passes, layers and heads of one cross-attention"
TRANSFORMERS = {
    ("PixArt-Sigma", "00"): "grid (16, 16), 2 steps, 2 cross-attention layers",
    ("PixArt-Sigma", "01"): NO_UNET,
    ("PixArt-Sigma", "02"): "the sum is DAAM: True",
    ("PixArt-Sigma", "03"): "X' = X gives DAAM: True",
    ("PixArt-Sigma", "04"): "LD(x + y) = LD(x) + LD(y): False\nLD((x + y) / 2) = (LD(x) + LD(y)) / 2: True",
    ("PixArt-Sigma", "05"): "one token of 24 numbers, fitted to 5 masks of (16, 16)",
    ("Sana 1.5", "04"): "A has the shape (3, 16, 16, 24)",
    ("SD 3", "00"): "grid (8, 8), 2 steps, 4 cross-attention layers",
    ("SD 3", "01"): NO_UNET,
    ("SD 3", "02"): NO_PARTS,
    ("SD 3", "03"): "X' = X gives DAAM: True",
    ("SD 3", "04"): NO_MAP,
    ("SD 3", "05"): NO_TOKEN,
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, number", TRANSFORMERS, indirect=["checkpoint"])
def test_a_notebook_on_a_transformer_passes_or_says_why_not(run, request, number):
    family = request.node.callspec.params["checkpoint"]
    text, (parameters, _) = TRANSFORMERS[family, number], SMALLEST[number]
    code, printed, folder, error = run(number, **parameters)
    if not text.startswith("ValueError"):
        assert code == 0, error
        assert text in printed
        assert (folder / "metrics.json").is_file()
    else:
        assert code == 1
        other_ways = (
            ("notebooks 00 and 03",) if text in (NO_UNET, NO_PARTS) else ("nothing to collapse", "optimize_probe")
        )
        assert text in error and all(way in error.replace("Notebooks", "notebooks") for way in other_ways)
        assert not (folder / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["SD 3"], indirect=True)
def test_without_an_attention_of_the_image_alone_propagation_stops(run):
    code, _, folder, error = run("08", **SMALLEST["08"][0])
    assert code == 1
    assert "ValueError: self_attention: SD 3 is a joint model" in error
    assert not (folder / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["sdxl", "PixArt-Sigma", "SD 3"], indirect=True)
def test_a_denoiser_that_needs_more_than_one_text_stops_the_checks_of_maps(run):
    code, _, folder, error = run("09", **SMALLEST["09"][0])
    assert code == 1
    assert "ValueError: this notebook calls a U-Net with a noisy image and one text" in error
    assert not (folder / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, number", [("sdxl", "06"), ("sd1", "07")], indirect=["checkpoint"])
def test_without_masks_a_notebook_stops_before_it_generates(run, number):
    code, _, folder, error = run(number, N_IMAGES=28)
    assert code == 1
    assert "ValueError: the annotator knows the drawn streets of the bundled model" in error
    assert "daamlib.widgets.annotate" in error and "MASKS=" in error
    assert [path.name for path in folder.iterdir() if not path.name.startswith("figure_")] == []


def draw_masks(folder, n, size):
    """Label maps of `n` images, each with a rectangle for every class that its prompt names."""
    folder.mkdir()
    generator, width = np.random.default_rng(0), size[1] // 2
    for i, prompt in enumerate(datasets.urban_prompts(n)):
        ids = np.zeros(size, np.uint8)
        for k, name in enumerate(name for name in KINDS if name in prompt):
            y, x = generator.integers(0, size[0] // 2), k * width + generator.integers(0, width // 2)
            ids[y : y + size[0] // 3, x : x + width // 2] = BY_NAME[name].id
        Image.fromarray(ids).save(folder / f"{i:05d}.png")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["sd1"], indirect=True)
def test_the_tables_with_drawn_masks(run, pipe, tmp_path):
    n, size = 28, image_size(pipe)
    draw_masks(tmp_path / "masks", n, size)
    (tmp_path / "masks" / f"{n - 1:05d}.png").unlink()  # not every image has to have one
    code, printed, folder, error = run("06", N_IMAGES=n, KEEP_STEPS=2, MASKS=tmp_path / "masks")
    assert code == 0, error
    assert "car           named in  14 prompts, found in  14 of their images" in printed
    generated = datasets.load(folder / f"images-0-{n}")
    assert generated.settings["labels"] == ["masks of masks"]
    assert generated.labelled == list(range(n - 1))
    assert generated.image(0).size == size[::-1]
