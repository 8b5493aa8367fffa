"""The notebooks on other models than the bundled one: each passes, or stops for a reason that it states.

The checkpoints are tiny, of random weights, and differ from the bundled model in everything that a notebook might take
for granted: the size of images and maps and whether they are square, the text width, the sampler, the number of text
encoders. What is measured on them means nothing.
"""

import nbformat
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from tiny import build
from transformers import CLIPTokenizer

import daamlib
from daamlib import datasets
from daamlib.cityscapes import BY_NAME
from daamlib.pipeline import BUNDLED, image_size
from daamlib.runs.run import main
from daamlib.urban.annotator import is_bundled, labels_for

SIZES = {"sd1": (16, 24), "sdxl": 16}  # of the latents, as in the U-Net's config; the VAE's factor is 2
SAMPLERS = {"sd1": PNDMScheduler, "sdxl": EulerDiscreteScheduler}  # those that Stable Diffusion and SDXL come with


def encoder_for(tokenizer, encoder):
    """A new text encoder of the same kind and shape for another tokenizer."""
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return type(encoder)(type(encoder.config).from_dict({**encoder.config.to_dict(), **ids}))


@pytest.fixture(scope="session", params=["sd1", "sdxl"])
def checkpoint(request, tmp_path_factory):
    """The folder of a checkpoint as `save_pretrained` writes it."""
    pipe = build(request.param)
    pipe.unet.register_to_config(sample_size=SIZES[request.param])
    options = {"skip_prk_steps": True} if request.param == "sd1" else {}
    pipe.scheduler = SAMPLERS[request.param].from_config(pipe.scheduler.config, **options)
    tokenizer, parts = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer"), {}  # it knows the notebooks' words
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in [name for name in pipe.components if name.startswith("text_encoder")]:
            parts[name] = encoder_for(tokenizer, pipe.components[name])
            parts[name.replace("text_encoder", "tokenizer")] = tokenizer
    pipe.register_modules(**parts)
    folder = tmp_path_factory.mktemp(request.param) / f"tiny-{request.param}"
    pipe.save_pretrained(folder)
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
    "03": ({"N_SCENES": 8}, "grid of the maps: {maps}, "),
    "04": ({"N_SCENES": 8}, "maps of {maps}, text width {width}"),
    "05": ({"N_SCENES": 24}, "one token of {width} numbers, fitted to 5 masks of {scene}"),
}
PRINTED = {
    "tiny-sd1": {"maps": (16, 24), "scene": (16, 16), "width": 24},
    "tiny-sdxl": {"maps": (8, 8), "scene": (8, 8), "width": 40},
}


@pytest.mark.slow
@pytest.mark.parametrize("number", SMALLEST)
def test_a_notebook_passes(run, checkpoint, number):
    parameters, text = SMALLEST[number]
    code, printed, _, error = run(number, **parameters)
    assert code == 0, error
    assert text.format(**PRINTED[checkpoint.name]) in printed


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, number", [("sdxl", "06"), ("sd1", "07")], indirect=["checkpoint"])
def test_without_masks_a_notebook_stops_before_it_generates(run, number):
    code, _, folder, error = run(number)
    assert code == 1
    assert "ValueError: the annotator knows the drawn streets of the bundled model" in error
    assert "daamlib.widgets.annotate" in error and "MASKS=" in error
    assert not any(folder.iterdir())


def draw_masks(folder, n, size):
    """Label maps of `n` images, each with a rectangle for every class that its prompt names."""
    folder.mkdir()
    generator, width = np.random.default_rng(0), size[1] // 2
    for i, prompt in enumerate(datasets.urban_prompts(n)):
        ids = np.zeros(size, np.uint8)
        for k, name in enumerate(name for name in datasets.CLASSES if name in prompt):
            y, x = generator.integers(0, size[0] // 2), k * width + generator.integers(0, width // 2)
            ids[y : y + size[0] // 3, x : x + width // 2] = BY_NAME[name].id
        Image.fromarray(ids).save(folder / f"{i:05d}.png")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["sd1"], indirect=True)
def test_the_tables_with_drawn_masks(run, pipe, tmp_path):
    n, size = 24, image_size(pipe)
    draw_masks(tmp_path / "masks", n, size)
    (tmp_path / "masks" / f"{n - 1:05d}.png").unlink()  # not every image has to have one
    code, printed, folder, error = run("06", N_IMAGES=n, KEEP_STEPS=2, MASKS=tmp_path / "masks")
    assert code == 0, error
    assert "car           named in  12 prompts, found in  12 of their images" in printed
    generated, rendered = (datasets.load(folder / f"{kind}-0-{n}") for kind in ("images", "rendered"))
    assert generated.settings["labels"] == ["masks of masks"]
    assert generated.labelled == list(range(n - 1))
    assert generated.image(0).size == size[::-1] and rendered.image(0).size == (32, 32)
