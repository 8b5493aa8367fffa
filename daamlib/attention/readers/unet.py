"""The reader of U-Nets: Stable Diffusion 1.x, 2.x and XL."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..calls import Pass
from ..text import TokenEmbeddings
from .reader import Arguments, EmbedOptions, Noisy, Pair, Reader
from .sites import Site, embedder_of, place_of
from .words import is_rough, read_names, token_ids

MIDDLE, UP = "mid_block", "up_blocks"  # what the names of a layer begin with in the middle and in the decoder


class UNetReader(Reader):
    """Reads the cross-attention (`attn2`) of a diffusers pipeline's U-Net."""

    options: tuple[str, ...] = ("clip_skip", "lora_scale", "prompt_2", "max_sequence_length")

    @staticmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Return whether it is a U-Net; the last family to be asked, it takes every one."""
        return "UNet" in type(denoiser).__name__

    # both go through all modules of the U-Net, which a reader that embeds a text has no use for

    @functools.cached_property
    @override
    def sites(self) -> tuple[Site, ...]:
        return tuple(cross_attentions(self.denoiser, middle=self.middle))

    @functools.cached_property
    @override
    def self_sites(self) -> tuple[Site, ...]:
        sites = []
        for name, module in self.denoiser.named_modules():
            if name.startswith(UP) and hasattr(module, "transformer_blocks"):
                # the last `attn1` of each transformer in the up blocks, where objects differ most
                last = len(module.transformer_blocks) - 1
                attention = module.transformer_blocks[last].attn1
                if attention is not None and not attention.is_cross_attention:
                    name = f"{name}.transformer_blocks.{last}.attn1".replace("_orig_mod.", "")
                    width, scale = attention.to_k.in_features, float(attention.scale)
                    sites.append(Site(name, attention, attention.to_q, attention.heads, scale, width))
        return tuple(sites)

    @property
    @override
    def image_factor(self) -> int:
        return self.pipe.vae_scale_factor

    @staticmethod
    def grid(latent: tuple[int, int], positions: int) -> tuple[int, int]:
        """Return the latent's sides, halved (rounding up) as often as it takes. ValueError if that is not it."""
        h, w = latent
        while h * w > positions and h * w > 1:
            h, w = (h + 1) // 2, (w + 1) // 2
        if h * w != positions:
            raise ValueError(f"{positions} positions are no halving of the {latent[0]} x {latent[1]} latent")
        return h, w

    @override
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        sample, text = arguments["sample"], arguments["encoder_hidden_states"]
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter gives image embeddings, too
        if sample.ndim != 4 or len(text) != len(sample):
            raise ValueError(
                f"the U-Net was called with latents of shape {tuple(sample.shape)} and a text of shape "
                f"{tuple(text.shape)}: expected (batch, channel, height, width) and (batch, token, width), no videos"
            )
        mask = arguments.get("encoder_attention_mask")
        return Pass(sample, arguments["timestep"], text, None if mask is None else mask > 0)

    @override
    def prompt_of(self, result: Any, *, guided: bool) -> Pair:
        if not isinstance(result, torch.Tensor):
            return result[0], result[1]
        # InstructPix2Pix: the prompts', and twice the negative texts'
        positive, negative, *_ = result.chunk(3) if guided else (result, None)
        return positive, negative

    @override
    def check_image_model(self) -> None:
        config, latents = self.denoiser.config, self.pipe.vae.config.latent_channels
        if config.in_channels != latents:
            raise ValueError(
                f"this U-Net takes {config.in_channels} channels, the VAE makes {latents}: it is given an image after "
                "the noisy one, as for inpainting, depth or editing. A real image is read by a text-to-image model"
            )
        if getattr(config, "encoder_hid_dim_type", None) not in (None, "text_proj"):
            raise ValueError(
                f"this U-Net is given images next to the text ({config.encoder_hid_dim_type}, an IP-Adapter's "
                "image_embeds): call pipe.unload_ip_adapter() before a real image is read"
            )

    @override
    def passes(self, prompt: str, options: EmbedOptions, noisy: Noisy, size: tuple[int, int]) -> Iterator[Arguments]:
        encoded = self.run_encode_prompt(prompt, options)
        dtype, conditions = self.denoiser.dtype, None
        if getattr(self.denoiser.config, "addition_embed_type", None) == "text_time":  # SDXL
            pooled = encoded[2].to(dtype)
            # the refiner is given a score of the image's looks, 6 by its pipeline's default
            refiner = getattr(self.pipe.config, "requires_aesthetics_score", False)
            numbers = [*size, 0, 0, 6.0] if refiner else [*size, 0, 0, *size]
            conditions = {"text_embeds": pooled, "time_ids": torch.tensor([numbers], dtype=dtype, device=pooled.device)}
        for timestep, latents in noisy:
            yield (
                (latents.to(dtype), torch.tensor(timestep, device=latents.device)),
                {"encoder_hidden_states": encoded[0].to(dtype), "added_cond_kwargs": conditions},
            )

    @property
    @override
    def rough(self) -> bool:
        return is_rough(self.pipe, projected=getattr(self.denoiser, "encoder_hid_proj", None) is not None)

    @override
    @torch.no_grad()
    def project(self, text: Tensor) -> Tensor:
        if getattr(self.denoiser.config, "encoder_hid_dim_type", None) != "text_proj":
            return text
        layer = self.denoiser.encoder_hid_proj
        return layer(text.to(place_of(layer, self.pipe), self.denoiser.dtype))

    @override
    def named(self, prompt: str | None, text: Tensor, mask: Tensor | None, options: EmbedOptions) -> TokenEmbeddings:
        values, context = self.project(text[None])[0], None if prompt is None else self._context(options)
        if prompt is None or len(values) != context:  # a pipeline may make other rows, as of a text in several parts
            text_rows = TokenEmbeddings.unnamed(values)
        else:
            tokenizer = self._tokenizer[0]
            names = read_names(tokenizer, token_ids(tokenizer, self._converted(prompt), context))
            text_rows = TokenEmbeddings.padded(values, *names, left=tokenizer.padding_side == "left")
        return text_rows if mask is None else text_rows.take(mask.bool())

    def _context(self, options: EmbedOptions) -> int:
        """Return the number of rows that a text is padded to."""
        asked = inspect.signature(embedder_of(self.pipe)).parameters.get("max_sequence_length")  # Kolors
        return self._tokenizer[1] if asked is None else options.get("max_sequence_length", asked.default)

    @override
    def count(self, text: str, options: EmbedOptions) -> tuple[int, int]:
        # without truncation; `verbose=False` silences the tokenizer's own warning
        return len(self._tokenizer[0](self._converted(text), verbose=False).input_ids), self._context(options)

    @override
    def run_encode_prompt(self, prompt: str, options: EmbedOptions) -> tuple:
        return super().run_encode_prompt(prompt, {"num_images_per_prompt": 1, **options})

    @property
    def _tokenizer(self) -> tuple[Any, int]:
        """Tokenizer whose tokens are shown, and its context length: the first of SDXL's two, its refiner's only one."""
        second = self.pipe.tokenizer is None
        tokenizer = self.pipe.tokenizer_2 if second else self.pipe.tokenizer
        config = getattr(self.pipe.text_encoder_2 if second else self.pipe.text_encoder, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        return tokenizer, min(tokenizer.model_max_length, limit or tokenizer.model_max_length)

    def _converted(self, text: str) -> str:
        """Return a text in which a name of textual inversion stands as often as it has vectors."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return text if convert is None else convert(text, self._tokenizer[0])


def cross_attentions(unet: Any, *, middle: bool) -> Iterator[Site]:
    """Yield the cross-attentions of a U-Net. ValueError if there is none that DAAM can read."""
    if getattr(unet.config, "class_embed_type", None) == "simple_projection":
        raise ValueError(
            "this U-Net is given its text as one CLAP vector, as AudioLDM's and MusicLDM's are: there are no text "
            "tokens, whose attention could be read"
        )
    found = {
        name.replace("_orig_mod.", ""): module  # of a block that is compiled by itself
        for name, module in unet.named_modules()
        if name.endswith("attn2")
        and getattr(module, "is_cross_attention", False)
        and (middle or not name.startswith(MIDDLE))
        and ".ctrl_" not in name  # of ControlNet-XS, whose control branch runs inside the U-Net
    }
    if not found and any(getattr(module, "add_k_proj", None) is not None for module in unet.modules()):
        raise ValueError(
            "this U-Net adds the text's keys to the image's own (added-kv attention, as Kandinsky 2's and DeepFloyd "
            "IF's do): no reader knows it yet"
        )
    if not found:
        raise ValueError(
            f"the {type(unet).__name__} of this pipeline has no cross-attention (`attn2`) in its down and up blocks: "
            "only text-conditional U-Nets with CrossAttn blocks can be traced"
        )
    for name, module in found.items():
        norms = [part for part in ("norm_q", "norm_k", "norm_cross") if getattr(module, part, None)]
        if norms or getattr(module.to_k, "bias", None) is not None:
            raise ValueError(f"{name} normalises or shifts its keys ({norms or 'bias'}): its maps are not DAAM's")
        if hasattr(module.processor, "to_k_custom_diffusion"):
            raise ValueError(f"the processor of {name} has keys of its own (Custom Diffusion): its maps are not DAAM's")
        yield Site(name, module, module.to_q, module.heads, float(module.scale), module.cross_attention_dim)
