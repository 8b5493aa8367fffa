"""Every pipeline of diffusers that is given a text is decided on, and refused for the reason that the page states."""

import inspect
import re
from types import SimpleNamespace

import diffusers
import pytest
import support_table
import torch
from pipelines import DECISIONS, PIPELINES

import daamlib
from daamlib.attention.joint.families import FAMILIES
from daamlib.attention.readers import UNREAD, why_unread
from daamlib.attention.readers.cross_transformer import KINDS

OTHER = ("Output", "Config", "Blocks")
KNOWN = {"UNet2DConditionModel", "AudioLDM2UNet2DConditionModel", *KINDS} | {one.denoiser for one in FAMILIES}
TEXT = re.compile("prompt|text|caption|lyrics")


def is_given_a_text(name):
    """Whether a name is of a pipeline with a text; of those whose libraries are not installed nobody can tell."""
    if "Pipeline" not in name or "Modular" in name or name.startswith("AutoPipeline") or name.endswith(OTHER):
        return False
    kind = getattr(diffusers, name)
    if not inspect.isclass(kind) or hasattr(kind, "_backends"):
        return inspect.isclass(kind)
    parameters = inspect.signature(kind.__call__).parameters if issubclass(kind, diffusers.DiffusionPipeline) else ()
    return any(map(TEXT.search, parameters))


def denoisers_of(name):
    """The classes in the annotation of a pipeline's U-Net or transformer."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    part = next((parameters[part].annotation for part in ("unet", "transformer") if part in parameters), None)
    return re.findall(r"\w+", getattr(part, "__name__", "") if inspect.isclass(part) else str(part))


def test_each_pipeline_is_decided_on():
    undecided = sorted(name for name in dir(diffusers) if is_given_a_text(name) and name not in PIPELINES)
    assert not undecided, f"decide on {undecided} in tests/pipelines.py, then run `make support-table`"
    assert sum(len(names.split()) for names in DECISIONS.values()) == len(PIPELINES), "a class is decided on twice"


def test_decisions_are_those_of_the_readers():
    for name, decision in PIPELINES.items():
        if hasattr(diffusers, name) and not hasattr(getattr(diffusers, name), "_backends"):
            kinds = denoisers_of(name) or [""]
            why = why_unread(kinds[-1])
            assert decision == why if why else decision not in UNREAD.values() or "Video" in name, (name, kinds, why)
            if decision.startswith("read by"):
                assert set(kinds) & KNOWN, (name, kinds)
            if decision.startswith("no reader"):
                assert not set(kinds) & KNOWN, (name, kinds)


@pytest.mark.parametrize("kind", [*UNREAD, "Kandinsky5Transformer3DModel", "AuraFlowTransformer2DModel"])
def test_a_refusal_says_the_reason_of_the_page(kind):
    pipe = SimpleNamespace(transformer=type(kind, (torch.nn.Module,), {})())
    with pytest.raises(TypeError, match=f"a {kind}") as caught, daamlib.trace(pipe):
        pass
    assert (why_unread(kind) or "Flux.1 or Qwen-Image") in str(caught.value)


@pytest.mark.supports(
    family="Kandinsky 2, DeepFloyd IF", feature="refused", note="their U-Nets add the text's keys to the image's own"
)
def test_added_keys_are_refused():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("SimpleCrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2,
    )
    with pytest.raises(ValueError, match="added-kv attention"), daamlib.trace(SimpleNamespace(unet=unet)):
        pass


def test_the_page_has_each_class():
    page = support_table.TABLE.read_text()
    for decision, names in DECISIONS.items():
        assert f"- {decision}: {', '.join(sorted(names.split()))}\n" in page, "run `make support-table`"
