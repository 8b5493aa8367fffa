"""Passes that are kept, and made again with a text that runs along."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...pipeline import denoiser_of, uncompiled
from .families import Family
from .maps import Formulae, JointAttention, Sums, concept_map, open_vocabulary_daam, prompt_daam
from .stream import Stream, take_rows

KEPT = 4  # passes of a call that are read
PROMPT, WORDS, CONCEPTS = "prompt", "daam", "concept_map"  # what is summed while generating
REFUSED = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")


def passes_to_keep(count: int) -> set[int]:
    """The numbers of the passes that are read, of `count`: the middles of four equal parts of the call, or all.

    Early passes fix where things are and late ones their edges, so all parts take part; four of them are enough for a
    mean over noise levels, and keep the cost of later readings to that of four steps.
    """
    return {int((part + 0.5) * count / KEPT) for part in range(KEPT)} if count > KEPT else set(range(count))


def keep_arguments(arguments: Mapping[str, Any], row: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pass of one image, to make it again: its row of the batch, copied.

    Args:
        arguments: of the pass.
        row: of the image.
        known: what was kept of an earlier pass; a tensor that is equal is shared with it, as the text's is.

    Returns:
        The arguments.
    """
    kept = take_rows(arguments, slice(row, row + 1))
    for name, value in kept.items():
        if isinstance(value, torch.Tensor):
            before = known.get(name)
            same = before is not None and before.shape == value.shape and torch.equal(before, value)
            kept[name] = before if same else value.detach().clone()
        elif isinstance(value, Mapping):
            kept[name] = dict(value)
    if kept.get("img_shapes"):
        kept["img_shapes"] = kept["img_shapes"][:1]  # a pipeline makes images of one size
    return kept | {"return_dict": False}


def check_arguments(family: Family, denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The grid of a pass's positions. ValueError for a pass that is no text's and one image's alone."""
    for name in REFUSED:
        if arguments.get(name) is not None:
            raise ValueError(f"the transformer is called with {name}: passes with a ControlNet cannot be made again")
    for name in ("joint_attention_kwargs", "attention_kwargs"):
        odd = set(arguments.get(name) or {}) - {"scale"}
        if odd:
            raise ValueError(f"the transformer is called with {name} of {sorted(odd)}, as an IP-Adapter: not supported")
    grid = family.grid(denoiser, arguments)
    sample = arguments["hidden_states"]
    if sample.ndim == 3 and sample.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"the transformer is called with {sample.shape[1]} positions for an image of {grid[0]} x {grid[1]}: those "
            "of other images, as when editing, cannot be told apart"
        )
    return grid


def while_generating(pool: torch.Tensor | None) -> Formulae:
    """What is read while generating: DAAM of the prompt, and with words, of these, and their concept map."""

    def formulae(image: JointAttention, texts: tuple[JointAttention, ...]) -> dict[str, torch.Tensor | None]:
        found: dict[str, torch.Tensor | None] = {PROMPT: prompt_daam(image)}
        if pool is not None:
            found[WORDS] = open_vocabulary_daam(image, texts[0], pool)
            found[CONCEPTS] = concept_map(image, texts[0], pool)
        return found

    return formulae


def make_again(
    pipe: Any, family: Family, calls: Sequence[Mapping[str, Any]], texts: Sequence[torch.Tensor], formulae: Formulae
) -> Sums:
    """Make kept passes again, with texts that run along.

    Args:
        pipe: whose transformer made them.
        family: its own.
        calls: the arguments of each pass, of one image.
        texts: (m, d_text) values each.
        formulae: what is read of every block.

    Returns:
        Their sums over the blocks and passes.
    """
    denoiser, sums = denoiser_of(pipe), Sums(formulae)
    with torch.no_grad(), uncompiled(pipe), Stream(family, denoiser) as stream:
        for arguments in calls:
            moved = {name: _on(pipe._execution_device, value) for name, value in arguments.items()}
            stream.begin(moved, slice(None), texts, sums.read)
            denoiser.forward(**moved)  # past the hooks on the denoiser, of a trace that is open
            stream.end()
    # as at the end of the pipeline's own call: off-loaded models go back; past a trace that watches the method
    type(pipe).maybe_free_model_hooks(pipe)
    return sums


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else dict(value) if isinstance(value, Mapping) else value
