"""Store denoiser passes, and re-run them with an additional text.

A pipeline changes: a LoRA is unloaded or scaled, weights are averaged, processors are set. So a pass that is re-run
must compute what the stored one did: a few numbers of the queries, keys and outputs are compared in every block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...pipeline import denoiser_of, uncompiled
from ..placement import on_device
from ..text import TokenEmbeddings
from ..watch import alone, unwatched
from .encoding import averages
from .families import Family
from .maps import TOLERANCE, Formulae, JointAttention, Sums, concept_map, open_vocabulary_daam, prompt_daam
from .stream import Stream, check_readable, take_rows

STORED = 4  # passes of a call that are read
PROMPT, WORDS, CONCEPTS = "prompt", "daam", "concept_map"  # what is summed while generating
CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")


@dataclass(frozen=True, eq=False)
class Calls(Sequence[Mapping[str, Any]]):
    """The denoiser's arguments of each stored pass of one image."""

    tensors: tuple[torch.Tensor, ...]  # of all passes; one that passes share is held once
    arguments: tuple[Mapping[str, Any], ...]  # of each pass by name, {"tensor": number} or {"value": ...}

    @classmethod
    def of(cls, calls: Sequence[Mapping[str, Any]]) -> "Calls":
        """Return the arguments of passes."""
        tensors = {id(each): each for call in calls for each in call.values() if isinstance(each, torch.Tensor)}
        number = {key: at for at, key in enumerate(tensors)}

        def held(value: Any) -> dict[str, Any]:
            return {"tensor": number[id(value)]} if id(value) in number else {"value": value}

        return cls(tuple(tensors.values()), tuple({name: held(each) for name, each in call.items()} for call in calls))

    def __len__(self) -> int:
        return len(self.arguments)

    def __getitem__(self, number):
        held = self.arguments[number].items()
        return {name: self.tensors[it["tensor"]] if "tensor" in it else _tuples(it["value"]) for name, it in held}


def _tuples(value: Any) -> Any:
    """Return JSON's lists of sizes as the tuples they were, as in Qwen-Image's `img_shapes`."""
    if not isinstance(value, list):
        return value
    return tuple(value) if all(isinstance(part, int) for part in value) else [_tuples(part) for part in value]


def passes_to_read(count: int) -> set[int]:
    """Return the numbers of the passes to read, of `count`: the middles of four equal parts of the call, or all."""
    return {int((part + 0.5) * count / STORED) for part in range(STORED)} if count > STORED else set(range(count))


def copy_arguments(arguments: Mapping[str, Any], row: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the arguments of one image, a row of a pass, to re-run it; none of a pass with a ControlNet.

    A tensor that equals that of an earlier pass (`known`), as the text's does, is shared with it.
    """
    if any(arguments.get(name) is not None for name in CONTROLNET):
        return {}
    stored = take_rows(arguments, slice(row, row + 1))
    for name, value in stored.items():
        if isinstance(value, torch.Tensor):
            before = known.get(name)
            same = before is not None and before.shape == value.shape and torch.equal(before, value)
            stored[name] = before if same else value.detach().clone()
        elif isinstance(value, Mapping):
            stored[name] = dict(value)
    if stored.get("img_shapes"):
        stored["img_shapes"] = stored["img_shapes"][:1]  # a pipeline makes images of one size
    return stored | {"return_dict": False}


def check_arguments(family: Family, denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return the grid of a pass' positions. ValueError for a pass of more than one text and one image."""
    for name in ("joint_attention_kwargs", "attention_kwargs"):
        if further := sorted(set(arguments.get(name) or {}) - {"scale"}):
            raise ValueError(f"the transformer is called with {name} of {further}, as an IP-Adapter: not supported")
    check_readable(denoiser)
    grid = family.grid(denoiser, arguments)
    sample, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    if sample.ndim == 3 and sample.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"the transformer is called with {sample.shape[1]} positions for an image of {grid[0]} x {grid[1]}: those "
            "of other images, as when editing, cannot be told apart"
        )
    channels, expected = sample.shape[1 if sample.ndim == 4 else 2], denoiser.config.in_channels
    if channels != expected:
        raise ValueError(
            f"the transformer takes {expected} channels, got {channels}: that of a Fill, Control or inpainting "
            "pipeline reads a second image, too. Trace the pipeline's own call"
        )
    if len(sample) != len(text):
        raise ValueError(
            f"the transformer is called with {len(text)} texts for {len(sample)} latents: expected one text each. "
            "Repeat the prompt's embeddings for every image"
        )
    return grid


def while_generating(words: TokenEmbeddings | None) -> Formulae:
    """Return what is read while generating: DAAM of the prompt, and of extra words, with their concept map."""
    pool = None if words is None else averages(words)

    def formulae(image: JointAttention, texts: tuple[JointAttention, ...]) -> dict[str, torch.Tensor | None]:
        maps: dict[str, torch.Tensor | None] = {PROMPT: prompt_daam(image)}
        if pool is not None:
            maps[WORDS] = open_vocabulary_daam(image, texts[0], pool)
            maps[CONCEPTS] = concept_map(image, texts[0], pool)
        return maps

    return formulae


def rerun(
    pipe: Any,
    family: Family,
    calls: Sequence[Mapping[str, Any]],
    texts: Sequence[torch.Tensor],
    formulae: Formulae,
    computed: torch.Tensor | None = None,
) -> Sums:
    """Re-run the passes of one image with further (m, d_text) texts, and sum what the formulae make of the blocks.

    Raises ValueError if the pipeline computes something else than it did (`computed` of each pass, if it was made).
    """
    if not all(calls):
        raise ValueError(
            "the passes of an image with a ControlNet are not stored, for its states are too large, and cannot be "
            "re-run: give the words beforehand, as trace(pipe, words=[...])"
        )
    denoiser, sums = denoiser_of(pipe), Sums(formulae)
    try:
        with torch.no_grad(), uncompiled(pipe), Stream(family, denoiser) as stream, alone(stream):
            for number, arguments in enumerate(calls):
                moved = on_device(arguments, pipe._execution_device)
                _require_precision(pipe, family, moved["hidden_states"])
                stream.begin(moved, slice(None), texts, sums.read)
                denoiser.forward(**moved)  # past the hooks on the denoiser, of a trace that is open
                if problem := stream.finish():
                    raise ValueError(problem)
                if computed is not None:
                    now = sums.computed(0, number + 1)[-1]
                    _require_same(computed[number], now, TOLERANCE[moved["hidden_states"].dtype])
    finally:
        # as at the end of the pipeline's own call: off-loaded models go back; modular pipelines have no such method
        if hasattr(pipe, "maybe_free_model_hooks"):
            unwatched(pipe, "maybe_free_model_hooks")()
    return sums


def _require_same(then: torch.Tensor, now: torch.Tensor, tolerance: float) -> None:
    """ValueError unless a pass computes what it did: (blocks, 5, probes) each."""
    if not then.isfinite().all():
        raise ValueError("the attention of this image holds NaN or infinite values: generate it in another precision")
    if then.shape == now.shape:
        off = (now - then).norm(dim=2) / then.norm(dim=2).clamp(min=torch.finfo(then.dtype).tiny)
        mean = off.square().mean().sqrt()
        if off.max() <= tolerance and mean <= tolerance / 4:
            return
        where = f"it differs by {mean:.1%} in the mean of its blocks"
    else:
        where = f"{len(now)} blocks for {len(then)}"
    raise ValueError(
        f"the pipeline does not compute what it did when it made this image ({where}): the weights of its model "
        "changed, or are another model's, as after a LoRA was unloaded or scaled, or it computes in another precision. "
        "Bring it back to what it was; words given to trace(words=) are stored, and need no model"
    )


def _require_precision(pipe: Any, family: Family, states: torch.Tensor) -> None:
    """ValueError unless the denoiser computes in the type of the states that a pass was made of."""
    device, embedder = pipe._execution_device, denoiser_of(pipe).get_submodule(family.image_embedder)
    now = next((weight.dtype for weight in embedder.parameters() if weight.dtype in TOLERANCE), states.dtype)
    if now != states.dtype and not torch.is_autocast_enabled(device.type):
        raise ValueError(
            f"this image was made in {states.dtype}, the pipeline's model is in {now} now, in which its passes come "
            f"out otherwise: use pipe.to(dtype={states.dtype})"
        )
