"""Descriptions of the families of joint models, one each."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...pipeline import denoiser_of
from ..readers.words import BYTE_SPACE, Names, read_pieces, read_tokens, side_by_side, token_ids

NOT_LINEAR = (  # why there is no linear map, and what there is
    "the text of a joint model changes with the image from block to block, so a word's map is not linear in its "
    "embedding, and there is nothing to collapse. record.ldaam(word) reads a lone word; optimize_probe fits vectors in "
    "the attention's output space, in which maps are linear"
)


@dataclass(frozen=True)
class Family:
    """Description of how one family of joint models is read."""

    name: str
    denoiser: str  # the name of the class of `pipe.transformer`
    blocks: tuple[str, ...]  # the names of its lists of blocks, in the order they are called
    # (denoiser, text values (m, d_text)) -> (m, channels), what the first block receives of a text
    embed: Callable[[Any, torch.Tensor], torch.Tensor]
    # (denoiser, arguments of a pass, n) -> `image_rotary_emb` of the blocks for a text of n tokens
    rotary: Callable[[Any, Mapping[str, Any], int], Any]
    split: Callable[[Any, int], tuple[Any, Any]]  # (`image_rotary_emb`, n) -> tables of n text tokens and of the image
    rotate: Callable[[torch.Tensor, Any], torch.Tensor]  # (x (batch, token, head, d_head), table) -> x
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int]]  # (denoiser, arguments of a pass) -> (h, w)
    timestep: float  # what the passes' `timestep` is multiplied with to be 0 ... 1000
    image_embedder: str  # the name of the layer that receives `hidden_states`
    encoders: tuple[str, ...]  # parts of the pipeline that embed a text
    unused: Mapping[str, Any]  # arguments of `encode_prompt` that have no default
    negative: int | None  # where `encode_prompt` returns the negative text; None: it is called once more for it
    # (pipe, texts by the argument of `encode_prompt`, rows) -> the names of the text's tokens
    names: Callable[[Any, Mapping[str, str], int], Names]
    # (pipe, noisy latents, noise level 0 ... 1, result of `encode_prompt`) -> arguments of a pass
    arguments: Callable[[Any, torch.Tensor, float, Sequence[Any]], dict[str, Any]]
    sides: Callable[[Any], int]  # (pipe) -> what an image's sides must be multiples of


def family_of(pipe: Any) -> Family | None:
    """Return the family of a pipeline's transformer; None if it is none of these."""
    if getattr(pipe, "transformer", None) is None:
        return None
    kinds = {kind.__name__ for kind in type(denoiser_of(pipe)).__mro__}  # by name: diffusers takes seconds to import
    return next((family for family in FAMILIES if family.denoiser in kinds), None)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Return (1, channel, h, w) latents as (1, h/2 * w/2, 4 * channel): squares of 2 x 2, a position each."""
    squares = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (1, c, h/2, 2, w/2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _default_guidance(pipe: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """Return the guidance scale that the pipeline would embed by itself, for a model with guidance embedded."""
    if not denoiser_of(pipe).config.guidance_embeds:
        return None
    scale = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    return torch.full([len(latents)], scale or 1.0, device=latents.device, dtype=torch.float32)


# -- Stable Diffusion 3 and 3.5: no rotary tables; the text is CLIP's tokens and then T5's


def _sd3_grid(denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    height, width = arguments["hidden_states"].shape[-2:]
    return height // denoiser.config.patch_size, width // denoiser.config.patch_size


def _sd3_names(pipe: Any, texts: Mapping[str, str], rows: int) -> Names:
    clip = pipe.tokenizer.model_max_length
    names: Names = ((), ())
    if pipe.text_encoder_3 is not None:  # without it the rows are zeros
        text = texts.get("prompt_3") or texts["prompt"]
        names = read_pieces(pipe.tokenizer_3, token_ids(pipe.tokenizer_3, text, rows - clip))
    of_clip = read_tokens(pipe.tokenizer, token_ids(pipe.tokenizer, texts["prompt"], clip))
    return side_by_side([(of_clip, clip), (names, rows - clip)])


def _sd3_arguments(pipe: Any, latents: torch.Tensor, level: float, encoded: Sequence[Any]) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": encoded[0],
        "pooled_projections": encoded[2],
        "timestep": torch.full([len(latents)], level * 1000, device=latents.device),
    }


SD3 = Family(
    name="SD 3",
    denoiser="SD3Transformer2DModel",
    blocks=("transformer_blocks",),
    embed=lambda denoiser, values: denoiser.context_embedder(values),
    rotary=lambda denoiser, arguments, n: None,
    split=lambda rotary, n: (None, None),
    rotate=lambda x, table: x,
    grid=_sd3_grid,
    timestep=1.0,
    image_embedder="pos_embed",
    encoders=("text_encoder", "text_encoder_2"),  # and a third, without which rows are zeros
    unused={"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False},
    negative=1,
    names=_sd3_names,
    arguments=_sd3_arguments,
    sides=lambda pipe: pipe.vae_scale_factor * denoiser_of(pipe).config.patch_size,
)


# -- Flux.1: one rotary table over text and image; the text's positions are all 0, so that its rotation is the identity


def _flux_rotary(denoiser: Any, arguments: Mapping[str, Any], n: int) -> Any:
    image = arguments["img_ids"]
    return denoiser.pos_embed(torch.cat([image.new_zeros(n, image.shape[1]), image]))


def _flux_rotate(x: torch.Tensor, table: Any) -> torch.Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, table, sequence_dim=1)


def _flux_grid(denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    ids = arguments["img_ids"]
    h, w = (int(side) + 1 for side in ids.reshape(-1, 3).amax(dim=0)[1:])
    if ids.shape != (h * w, 3) or not torch.equal(ids, _flux_ids(h, w).to(ids)):
        raise ValueError(
            f"the transformer is called with img_ids of shape {tuple(ids.shape)} that are not 0, row, column of the "
            f"positions of one image of {h} x {w}: those of other images, as when editing, cannot be told apart"
        )
    return h, w


def _flux_ids(h: int, w: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(h)), torch.arange(float(w)))


def _flux_names(pipe: Any, texts: Mapping[str, str], rows: int) -> Names:
    text = texts.get("prompt_2") or texts["prompt"]
    if hasattr(pipe, "maybe_convert_prompt"):  # a textual inversion may have several vectors
        text = pipe.maybe_convert_prompt(text, pipe.tokenizer_2)
    return side_by_side([(read_pieces(pipe.tokenizer_2, token_ids(pipe.tokenizer_2, text, rows)), rows)])


def _flux_arguments(pipe: Any, latents: torch.Tensor, level: float, encoded: Sequence[Any]) -> dict[str, Any]:
    h, w = latents.shape[-2] // 2, latents.shape[-1] // 2
    return {
        "hidden_states": _packed(latents),
        "encoder_hidden_states": encoded[0],
        "pooled_projections": encoded[1],
        "timestep": torch.full([len(latents)], level, device=latents.device),
        "img_ids": _flux_ids(h, w).to(encoded[2]),
        "txt_ids": encoded[2],
        "guidance": _default_guidance(pipe, latents),
    }


FLUX = Family(
    name="Flux.1",
    denoiser="FluxTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    embed=lambda denoiser, values: denoiser.context_embedder(values),
    rotary=_flux_rotary,
    split=lambda rotary, n: (tuple(table[:n] for table in rotary), tuple(table[n:] for table in rotary)),
    rotate=_flux_rotate,
    grid=_flux_grid,
    timestep=1000.0,
    image_embedder="x_embedder",
    encoders=("text_encoder", "text_encoder_2"),
    unused={"prompt_2": None},
    negative=None,
    names=_flux_names,
    arguments=_flux_arguments,
    sides=lambda pipe: pipe.vae_scale_factor * 2,
)


# -- Qwen-Image: a table for the image and one for the text, whose positions go on after the image's


def _qwen_rotary(denoiser: Any, arguments: Mapping[str, Any], n: int) -> Any:
    device = arguments["hidden_states"].device
    return denoiser.pos_embed(arguments["img_shapes"], max_txt_seq_len=n, device=device)


def _qwen_rotate(x: torch.Tensor, table: Any) -> torch.Tensor:
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    return apply_rotary_emb_qwen(x, table, use_real=False)


def _qwen_grid(denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    shapes = arguments["img_shapes"][0]  # of an image, or a list of those of several
    _, height, width = shapes if isinstance(shapes[0], int) else shapes[0]
    return height, width


def _qwen_names(pipe: Any, texts: Mapping[str, str], rows: int) -> Names:
    start = pipe.prompt_template_encode_start_idx  # where the template's own words end
    ids = pipe.tokenizer(pipe.prompt_template_encode.format(texts["prompt"])).input_ids[start:]
    return side_by_side([(read_pieces(pipe.tokenizer, ids, mark=BYTE_SPACE, end="<|im_end|>"), rows)])


def _qwen_arguments(pipe: Any, latents: torch.Tensor, level: float, encoded: Sequence[Any]) -> dict[str, Any]:
    return {
        "hidden_states": _packed(latents),
        "encoder_hidden_states": encoded[0],
        "encoder_hidden_states_mask": encoded[1],
        "timestep": torch.full([len(latents)], level, device=latents.device),
        "img_shapes": [[(1, latents.shape[-2] // 2, latents.shape[-1] // 2)]],
        "guidance": _default_guidance(pipe, latents),
    }


QWEN_IMAGE = Family(
    name="Qwen-Image",
    denoiser="QwenImageTransformer2DModel",
    blocks=("transformer_blocks",),
    embed=lambda denoiser, values: denoiser.txt_in(denoiser.txt_norm(values)),
    rotary=_qwen_rotary,
    split=lambda rotary, n: (rotary[1], rotary[0]),
    rotate=_qwen_rotate,
    grid=_qwen_grid,
    timestep=1000.0,
    image_embedder="img_in",
    encoders=("text_encoder",),
    unused={},
    negative=None,
    names=_qwen_names,
    arguments=_qwen_arguments,
    sides=lambda pipe: pipe.vae_scale_factor * 2,
)

FAMILIES = (SD3, FLUX, QWEN_IMAGE)
