"""What `docs/supported.md` says of pipelines with a U-Net, each cell against the processors of the running model."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from helpers import assert_close, capture, generate, iou, naive_maps, with_text
from peft import LoraConfig
from tiny import BLOCKS, build, of_components

import daamlib
from daamlib import AttentionRecord

GRIDS = [(16, 24), (8, 12)]
TEXT = "a bicycle, a tree"
IMAGE = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(1, 1, 32, 48).index_fill(3, torch.arange(24), 1.0)


def controlnet(pipe):
    net = ControlNetModel(
        **{name: value for name, value in BLOCKS.items() if name != "up_block_types"},
        cross_attention_dim=24,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    return of_components(StableDiffusionControlNetPipeline, pipe, controlnet=net.eval().to(pipe.device))


def sdxl_img2img(pipe):
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return other


def with_lora(pipe):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    return pipe


def unchanged(pipe):
    return pipe


HALF = {"image": IMAGE, "strength": 0.5}  # half of the steps
# row of the table -> (the tiny pipeline, what is made of it, the call's options, the passes of four steps)
PIPELINES = {
    "SD 1.x": ("sd1", unchanged, {}, 4),
    "SD 1.x, ControlNet": ("sd1", controlnet, {"image": IMAGE}, 4),
    "SD 1.x, img2img": ("sd1", lambda pipe: of_components(StableDiffusionImg2ImgPipeline, pipe), HALF, 2),
    "SD 1.x, inpainting": (
        "sd1",
        lambda pipe: of_components(StableDiffusionInpaintPipeline, pipe),
        {**HALF, "mask_image": MASK, "height": 32, "width": 48},
        2,
    ),
    "SD 1.x, LoRA": ("sd1", with_lora, {}, 4),
    "SD 2.x": ("sd2", unchanged, {}, 4),
    "SDXL": ("sdxl", unchanged, {}, 4),
    "SDXL, img2img": ("sdxl", sdxl_img2img, HALF, 2),
}
ROWS = [pytest.param(name, marks=pytest.mark.supports(family=name), id=name) for name in PIPELINES]


@pytest.fixture(scope="module", params=ROWS)
def case(request, device):
    """One guided call, with its conditional half in row 1 of what is captured."""
    family, make, options, passes = PIPELINES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipe = make(build(family, device))
    with daamlib.trace(pipe) as trace, daamlib.trace(pipe, store="maps", texts=[TEXT]) as online:
        with capture(pipe.unet) as captures:
            generate(pipe, "a car", num_inference_steps=4, **options)
    (record,) = trace
    assert (record.prompt, len(record.timesteps)) == ("a car", passes)
    return SimpleNamespace(pipe=pipe, record=record, online=online[0], captures=captures)


def embeddings_of(pipe, text):
    """(context, d_text) as the pipeline embeds a prompt."""
    return pipe.encode_prompt(text, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0][
        0
    ]


@pytest.mark.supports(feature="prompt's words")
def test_the_words_of_the_prompt(case):
    assert_close(case.record.daam().values, naive_maps(case.captures, GRIDS, image=1)[:4])


@pytest.mark.supports(feature="any text")
@torch.no_grad()
def test_any_text(case):
    values = embeddings_of(case.pipe, TEXT)
    expected = naive_maps(with_text(case.pipe.unet, case.captures, values), GRIDS, image=1)
    maps = case.record.daam(TEXT)
    assert_close(maps.values, expected[: len(maps)])
    (row,) = [row for row, token in enumerate(maps.tokens) if token == "tree"]
    assert_close(maps["tree"], expected[row])


@pytest.mark.supports(feature="lone word")
@torch.no_grad()
def test_a_word_alone(case):
    values = case.record.encode("tree").values[1:2]
    expected = naive_maps(with_text(case.pipe.unet, case.captures, values), GRIDS, image=1, kind="scores")
    assert_close(case.record.ldaam("tree")["tree"][None], expected, 1e-4)
    assert_close(case.record.linear_map()(values), expected, 1e-4)


@pytest.mark.supports(feature="token")
def test_a_token_recovers_a_mask(case):
    """The mask is where the map of some embedding is high, so that a token that reads it exists."""
    some = torch.randn(1, case.record.d_text, generator=torch.Generator().manual_seed(0))
    values = case.record.ldaam_from(some).values[0]
    mask = values > values.median()
    token = daamlib.optimize_token([case.record], [mask], weight_decay=1e-8)
    assert iou(token.probabilities(case.record)[0] > 0.5, mask) > 0.98


@pytest.mark.supports(feature="store=maps")
def test_maps_kept_while_generating(case):
    for text in (None, TEXT):
        assert_close(case.online.daam(text).values, case.record.daam(text).values)
    assert all(layer.queries is None for layer in case.online.layers)


@pytest.mark.supports(feature="save and load")
def test_a_record_from_a_file(case, tmp_path):
    case.record.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=case.pipe)
    for text in (None, TEXT):
        assert torch.equal(back.daam(text).values, case.record.daam(text).values)
        assert torch.equal(back.ldaam(text).values, case.record.ldaam(text).values)
