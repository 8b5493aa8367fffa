"""The reader of U-Nets: Stable Diffusion 1.x, 2.x and XL."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...pipeline import denoiser_of
from ..calls import Pass
from ..fingerprint import Fingerprint
from ..text import TextTooLongError, TokenEmbeddings, require_text
from .sites import Site, embedder_of, embeds, fingerprint_of_sites, place_of
from .words import is_rough, read_names, require_text_encoder, token_ids

MIDDLE, UP = "mid_block", "up_blocks"  # what the names of a layer begin with in the middle and in the decoder


class UNetReader:
    """Reads the cross-attention (`attn2`) of a diffusers pipeline's U-Net.

    Args:
        pipe: the pipeline.
        middle: whether the middle block takes part, which DAAM leaves out.
    """

    stream: str | None = None  # the one of several texts that is read, by its name
    options: tuple[str, ...] = ("clip_skip", "lora_scale", "prompt_2", "max_sequence_length")  # of `encode_prompt`

    @staticmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Whether this is the family of the denoiser: the last to be asked, it takes every U-Net."""
        return "UNet" in type(denoiser).__name__

    def __init__(self, pipe: Any, *, middle: bool = False):
        self.pipe = pipe
        self.denoiser: Any = denoiser_of(pipe)
        self.middle = middle

    @property
    def embeds(self) -> bool:
        """Whether the pipeline embeds texts by a method of its own."""
        return embeds(self.pipe)

    @property
    def rough(self) -> bool:
        """Whether the precision of embeddings cannot be read off their values."""
        return is_rough(self.pipe, projected=getattr(self.denoiser, "encoder_hid_proj", None) is not None)

    # what follows goes through all modules of the U-Net, which a reader that embeds a text has no use for

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The cross-attentions. ValueError if there is none that DAAM can read."""
        return tuple(cross_attentions(self.denoiser, middle=self.middle))

    @functools.cached_property
    def self_sites(self) -> tuple[Site, ...]:
        """The self-attentions whose mean refines maps."""
        return tuple(_self_sites(self.denoiser))

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """Of the U-Net's call."""
        return inspect.signature(self.denoiser.forward)

    @property
    def image_factor(self) -> int:
        """What the height and width of an image in pixels must be multiples of."""
        return self.pipe.vae_scale_factor

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        """The latents, noise level and text that the U-Net is called with. ValueError if they are not of images."""
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        sample, text = arguments["sample"], arguments["encoder_hidden_states"]
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter gives image embeddings beside the text
        if sample.ndim != 4 or len(text) != len(sample):
            raise ValueError(
                f"the U-Net was called with latents of shape {tuple(sample.shape)} and a text of shape "
                f"{tuple(text.shape)}: expected (batch, channel, height, width) and (batch, token, width); videos "
                "cannot be traced"
            )
        mask = arguments.get("encoder_attention_mask")
        return Pass(sample, arguments["timestep"], text, None if mask is None else mask > 0)

    @staticmethod
    def grid(latent: tuple[int, int], positions: int) -> tuple[int, int]:
        """(h, w) of a site with `positions` = h * w: the latent's, halved (rounding up) as often as it takes."""
        h, w = latent
        while h * w > positions and h * w > 1:
            h, w = (h + 1) // 2, (w + 1) // 2
        if h * w != positions:
            raise ValueError(f"{positions} positions are no halving of the {latent[0]} x {latent[1]} latent")
        return h, w

    def prompt_of(self, result: Any, *, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the positive and the negative embeddings of what `encode_prompt` returned."""
        if not isinstance(result, torch.Tensor):
            return result[0], result[1]
        # InstructPix2Pix: the prompts', and twice the negative texts'
        positive, negative, *_ = result.chunk(3) if guided else (result, None)
        return positive, negative

    @torch.no_grad()
    def project(self, text: torch.Tensor) -> torch.Tensor:
        """Return a (batch, token, width) text as the attentions receive it: projected, where the U-Net does so."""
        if getattr(self.denoiser.config, "encoder_hid_dim_type", None) != "text_proj":
            return text
        layer = self.denoiser.encoder_hid_proj
        return layer(text.to(place_of(layer, self.pipe), self.denoiser.dtype))

    def named(
        self,
        prompts: Sequence[str | None],
        text: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> list[TokenEmbeddings]:
        """Return a pass' (image, context, width) text as the attentions receive it, with tokens and words by prompt.

        Without the tokens that the mask (image, context) leaves out.
        """
        texts = [self._named(prompt, rows, options) for prompt, rows in zip(prompts, self.project(text), strict=True)]
        return texts if mask is None else [each.take(rows.bool()) for each, rows in zip(texts, mask, strict=True)]

    def _named(self, prompt: str | None, values: torch.Tensor, options: Mapping[str, Any]) -> TokenEmbeddings:
        """The embeddings of a prompt, cut at the context length, with their tokens and words.

        Other rows than the context has, as a pipeline makes of a text in several parts, are not named.
        """
        context = None if prompt is None else self._context(options)
        if prompt is None or len(values) != context:
            return TokenEmbeddings.unnamed(values)
        tokenizer = self._tokenizer[0]
        names = read_names(tokenizer, token_ids(tokenizer, self._converted(prompt), context))
        return TokenEmbeddings.padded(values, *names, left=tokenizer.padding_side == "left")

    def _context(self, options: Mapping[str, Any]) -> int:
        """The rows that a text is padded to."""
        asked = inspect.signature(embedder_of(self.pipe)).parameters.get("max_sequence_length")  # Kolors
        return self._tokenizer[1] if asked is None else options.get("max_sequence_length", asked.default)

    def encode(self, text: str, *, padding: bool = False, options: Mapping[str, Any] | None = None) -> TokenEmbeddings:
        """Embed any text as a prompt was with these options of `pipe.encode_prompt`, see `AttentionRecord.encode`.

        CLIP's attention is causal, so the values of a token do not depend on the padding after it.
        """
        require_text(text)
        options = {name: value for name, value in (options or {}).items() if name != "prompt_2"}  # the prompt's alone
        tokenizer, context = self._tokenizer[0], self._context(options)
        # counted without truncation; `verbose=False` silences the tokenizer's own warning, the error says it better
        count = len(tokenizer(self._converted(text), verbose=False).input_ids)
        if count > context:
            raise TextTooLongError(
                f"the text has {count} tokens with its start and end token, the text encoder reads {context}: "
                f"shorten it by {count - context} tokens: {text!r}"
            )
        embeddings = self._named(text, self.embed(text, options), options)
        return embeddings if padding else embeddings.without_padding()

    def embed(self, prompt: str, options: Mapping[str, Any]) -> torch.Tensor:
        """(context, d_text) of a prompt, by `encode_prompt` with these options."""
        return self.project(self._encode_prompt(prompt, options)[0])[0]

    @torch.no_grad()
    def _encode_prompt(self, prompt: str, options: Mapping[str, Any]) -> tuple:
        """What `pipe.encode_prompt` returns for one prompt without guidance. ValueError without a text encoder."""
        require_text_encoder(self.pipe)
        embed = embedder_of(self.pipe)
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **options}
        encoded = embed(prompt=prompt, device=self.pipe._execution_device, **options)
        return (encoded,) if isinstance(encoded, torch.Tensor) else encoded

    @property
    def _tokenizer(self) -> tuple[Any, int]:
        """The one whose tokens are shown, and its context length: the first of SDXL's two, its refiner's only one."""
        second = self.pipe.tokenizer is None
        tokenizer = self.pipe.tokenizer_2 if second else self.pipe.tokenizer
        config = getattr(self.pipe.text_encoder_2 if second else self.pipe.text_encoder, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        return tokenizer, min(tokenizer.model_max_length, limit or tokenizer.model_max_length)

    def _converted(self, text: str) -> str:
        """With textual inversion, one name may stand for several vectors."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return text if convert is None else convert(text, self._tokenizer[0])

    def check_image_model(self) -> None:
        """ValueError for a U-Net that needs more than a noisy image and a text."""
        config, latents = self.denoiser.config, self.pipe.vae.config.latent_channels
        if config.in_channels != latents:
            raise ValueError(
                f"this U-Net takes {config.in_channels} channels, the VAE makes {latents}: it is given an image beside "
                "the noisy one, as for inpainting, depth or editing. A real image is read by a text-to-image model"
            )
        if getattr(config, "encoder_hid_dim_type", None) not in (None, "text_proj"):
            raise ValueError(
                f"this U-Net is given images beside the text ({config.encoder_hid_dim_type}, an IP-Adapter's "
                "image_embeds): call pipe.unload_ip_adapter() before a real image is read"
            )

    def defaults(self) -> dict[str, Any]:
        """Return the options that a call of the pipeline embeds prompts with unless it is told others."""
        return {}

    def passes(
        self,
        prompt: str,
        options: Mapping[str, Any],
        timesteps: Sequence[int],
        noisy: Sequence[torch.Tensor],
        size: tuple[int, int],
    ) -> Iterator[tuple[tuple, dict[str, Any]]]:
        """Yield the arguments of a pass for each timestep and its (1, channel, h, w) latents, conditioned on `prompt`.

        options: of `encode_prompt`; size: (height, width) of the image in pixels, which SDXL's U-Net is told.
        """
        encoded = self._encode_prompt(prompt, options)
        dtype, conditions = self.denoiser.dtype, None
        if getattr(self.denoiser.config, "addition_embed_type", None) == "text_time":  # SDXL
            pooled = encoded[2].to(dtype)
            # the refiner is told a score of the image's looks, 6 by its pipeline's default
            refiner = getattr(self.pipe.config, "requires_aesthetics_score", False)
            numbers = [*size, 0, 0, 6.0] if refiner else [*size, 0, 0, *size]
            conditions = {"text_embeds": pooled, "time_ids": torch.tensor([numbers], dtype=dtype, device=pooled.device)}
        for timestep, latents in zip(timesteps, noisy, strict=True):
            yield (
                (latents.to(dtype), torch.tensor(timestep, device=latents.device)),
                {"encoder_hidden_states": encoded[0].to(dtype), "added_cond_kwargs": conditions},
            )

    def fingerprint(self) -> Fingerprint:
        """What tells the model from others as it is now, with the LoRA it holds."""
        return fingerprint_of_sites(self.sites, self.denoiser.dtype, self.pipe)


def cross_attentions(unet: Any, *, middle: bool) -> Iterator[Site]:
    """The cross-attentions of a U-Net. ValueError if there is none that DAAM can read."""
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


def _self_sites(unet: torch.nn.Module) -> Iterator[Site]:
    """The last self-attention (`attn1`) of each transformer in the up blocks, where objects are told apart best."""
    for name, module in unet.named_modules():
        if name.startswith(UP) and hasattr(module, "transformer_blocks"):
            last = len(module.transformer_blocks) - 1
            attention = module.transformer_blocks[last].attn1
            if attention is not None and not attention.is_cross_attention:
                name = f"{name}.transformer_blocks.{last}.attn1".replace("_orig_mod.", "")
                width = attention.to_k.in_features
                yield Site(name, attention, attention.to_q, attention.heads, float(attention.scale), width)
