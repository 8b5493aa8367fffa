"""The reader of cross-attention transformers: PixArt-alpha and Sigma, Sana 1.0 and 1.5.

Their image reads a text that it does not change, as in a U-Net, so all that holds of U-Nets holds exactly. What
differs: the text c that the attentions receive is the text encoder's, projected; keys have a bias, and in Sana 1.5 an
RMS norm across heads; a mask leaves padding out; and there is one grid, that of the latent's patches.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ...pipeline import uncompiled
from ..calls import Pass
from ..text import PAD, TokenEmbeddings
from .reader import Arguments, EmbedOptions, Noisy, Pair, Reader
from .sites import Site, embedder_of, place_of, refuse_caches
from .words import is_rough, read_pieces

KINDS = ("PixArtTransformer2DModel", "SanaTransformer2DModel")
PROJECTIONS = ("caption_projection", "caption_norm")  # what c has gone through, in this order, where a model has it
PROBE_TOKENS, PROBE_POSITIONS = 3, 2  # of the pass that shows which attentions the text reaches
SELF_LAYERS = 4  # self-attentions that are read, evenly spaced in the later half of the blocks; not tuned


class CrossTransformerReader(Reader):
    """Reads the attentions of a diffusers pipeline's transformer that the text reaches, whatever `middle` says."""

    options = ("clean_caption", "complex_human_instruction", "lora_scale", "max_sequence_length")

    @staticmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Return whether it is a transformer of `KINDS`."""
        return type(denoiser).__name__ in KINDS

    @functools.cached_property
    def _attentions(self) -> dict[str, Any]:
        modules = self.denoiser.named_modules()
        named = {name.replace("_orig_mod.", ""): module for name, module in modules}  # compiled blocks
        kinds = {name: (getattr(each, "to_q", None), getattr(each, "to_k", None)) for name, each in named.items()}
        return {name: named[name] for name, (to_q, to_k) in kinds.items() if to_q is not None and to_k is not None}

    @functools.cached_property
    def _received(self) -> dict[str, Tensor]:
        """Inputs of every `to_k` in one probe pass with 3 tokens and 2 positions, past the denoiser's own hooks."""
        refuse_caches(self.denoiser)  # a cache would hand this pass' attention to the image
        received: dict[str, Tensor] = {}
        config, patch = self.denoiser.config, self.denoiser.config.patch_size
        if getattr(config, "guidance_embeds", False):
            raise ValueError("this transformer is given its guidance (Sana Sprint): its noise levels cannot be read")
        latents = torch.ones(1, config.in_channels, patch, PROBE_POSITIONS * patch)
        text = torch.ones(1, PROBE_TOKENS, config.caption_channels or config.cross_attention_dim)
        arguments = self._arguments(latents, 0.0, text, torch.ones(1, PROBE_TOKENS), (patch, PROBE_POSITIONS * patch))
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(uncompiled(self.pipe))
            for name, module in self._attentions.items():
                hook = lambda _, args, name=name: received.update({name: args[0]})  # noqa: E731
                stack.callback(module.to_k.register_forward_pre_hook(hook).remove)
            self.denoiser.forward(**arguments)
            expected = self.project(text)
        for name, each in received.items():
            if each.shape[1] == PROBE_TOKENS and not torch.allclose(each, expected.to(each), rtol=1e-2, atol=1e-2):
                raise ValueError(f"the text changes on its way to {name}: its attention is not read exactly")
        return received

    @functools.cached_property
    @override
    def sites(self) -> tuple[Site, ...]:
        names = [name for name, received in self._received.items() if received.shape[1] == PROBE_TOKENS]
        if not names:
            raise ValueError(
                f"no text reaches an attention's `to_k` in the {type(self.denoiser).__name__} of this pipeline: only "
                "cross-attention with projections of its own can be read (`unfuse_qkv_projections` brings them back)"
            )
        sites = tuple(self._site(name) for name in names)
        for site in sites:
            if type(site.keys).__name__ not in ("Linear", "RMSNorm") or site.linear:
                raise ValueError(f"{site.name} has {type(site.keys).__name__} keys: its maps are not DAAM's")
            if getattr(site.module, "norm_cross", None) is not None:
                raise ValueError(f"{site.name} normalises its text: its maps are not DAAM's")
        return sites

    @functools.cached_property
    @override
    def self_sites(self) -> tuple[Site, ...]:
        names = [name for name, received in self._received.items() if received.shape[1] == PROBE_POSITIONS]
        late = names[len(names) // 2 :]
        return tuple(self._site(name) for name in late[:: -(-len(late) // SELF_LAYERS)])

    def _site(self, name: str) -> Site:
        module, width = self._attentions[name], self._received[name].shape[2]
        linear = "Linear" in type(module.processor).__name__
        return Site(name, module, module.to_q, module.heads, float(module.scale), width, linear)

    @property
    @override
    def image_factor(self) -> int:
        return self.pipe.vae_scale_factor * self.denoiser.config.patch_size

    @property
    def _timestep_scale(self) -> float:
        return getattr(self.denoiser.config, "timestep_scale", None) or 1.0

    @override
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        sample, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        if sample.ndim != 4 or text.ndim != 3 or len(text) != len(sample):
            raise ValueError(
                f"the transformer was called with latents of shape {tuple(sample.shape)} and a text of shape "
                f"{tuple(text.shape)}: expected (batch, channel, height, width) and (batch, token, width)"
            )
        mask = arguments.get("encoder_attention_mask")
        if mask is not None:
            mask = mask.squeeze(1) > -1 if mask.ndim == 3 else mask > 0  # added to the scores, or 1 where it takes part
        return Pass(sample, arguments["timestep"] / self._timestep_scale, text, mask)

    @override
    def grid(self, latent: tuple[int, int], positions: int) -> tuple[int, int]:
        h, w = (side // self.denoiser.config.patch_size for side in latent)
        if h * w != positions:
            raise ValueError(f"{positions} positions are not the {h} x {w} patches of latents of {latent}")
        return h, w

    @property
    @override
    def rough(self) -> bool:
        return is_rough(self.pipe, projected=True)

    @override
    def prompt_of(self, result: Any, *, guided: bool) -> Pair:
        return result[0], result[2]

    @override
    def named(self, prompt: str | None, text: Tensor, mask: Tensor | None, options: EmbedOptions) -> TokenEmbeddings:
        rows = list(range(len(text))) if mask is None else mask.nonzero().flatten().tolist()
        values = self.project(text[None])[0][rows]
        ids, first = ([], 0) if prompt is None else self._ids(prompt, options, truncation=True)
        # a mask that leaves rows before or between the text's out leaves its tokens in their order, if all are left
        if prompt is None or (rows != list(range(len(rows))) and len(rows) != len(ids)):
            return TokenEmbeddings.unnamed(values)
        tokens, words = read_pieces(self.pipe.tokenizer, ids, first)
        tokens = (*tokens, *[PAD] * len(rows))[: len(rows)]  # a mask may be longer or shorter than its prompt
        return TokenEmbeddings(values, tokens, tuple(word for word in words if word.stop <= len(rows)))

    @override
    @torch.no_grad()
    def project(self, text: Tensor) -> Tensor:
        for name in PROJECTIONS:
            module = getattr(self.denoiser, name, None)
            if module is not None:
                text = module(text.to(place_of(module, self.pipe), self.denoiser.dtype))
        return text.detach()

    def _ids(self, prompt: str, options: EmbedOptions, *, truncation: bool) -> tuple[list[int], int]:
        """Return the token of each row of a prompt's embeddings, and the row where its own words begin."""
        defaults = inspect.signature(embedder_of(self.pipe)).parameters
        given = {name: options.get(name, defaults[name].default) for name in self.options if name in defaults}
        (text,) = self.pipe._text_preprocessing(prompt, clean_caption=given["clean_caption"])
        context, tokenizer = given["max_sequence_length"], self.pipe.tokenizer
        instruction = "\n".join(given.get("complex_human_instruction") or ())
        before = tokenizer(instruction).input_ids if instruction else []
        # of an instruction before the prompt, its first and its last token are left
        limit = context + len(before) - 2 if before else context
        cut = {"truncation": True, "max_length": limit} if truncation else {"verbose": False}
        ids = tokenizer(instruction + text, **cut).input_ids
        if not before:
            return ids, 0
        same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        return [ids[0], *ids[len(before) - 1 :]], max(1, same - len(before) + 2)

    @override
    def count(self, text: str, options: EmbedOptions) -> tuple[int, int]:
        whole, cut = (len(self._ids(text, options, truncation=each)[0]) for each in (False, True))
        return whole, cut

    @override
    def encode_prompt(self, prompt: str, options: EmbedOptions) -> Pair:
        text, mask, *_ = self.run_encode_prompt(prompt, options)
        return text, mask

    @override
    def check_image_model(self) -> None:
        channels, latents = self.denoiser.config.in_channels, self.pipe.vae.config.latent_channels
        if channels != latents:
            raise ValueError(f"this transformer takes {channels} channels, the VAE makes {latents}: it edits images")

    @override
    def defaults(self) -> dict[str, Any]:
        known = inspect.signature(type(self.pipe).__call__).parameters
        given = {name: known[name].default for name in self.options if name in known}
        return {name: value for name, value in given.items() if value is not None}

    @override
    def passes(self, prompt: str, options: EmbedOptions, noisy: Noisy, size: tuple[int, int]) -> Iterator[Arguments]:
        text, mask = self.encode_prompt(prompt, options)
        for timestep, latents in noisy:
            yield (), self._arguments(latents, timestep, text, mask, size)

    def _arguments(
        self, latents: Tensor, timestep: float, text: Tensor, mask: Any, size: tuple[int, int]
    ) -> dict[str, Any]:
        dtype, device = self.denoiser.dtype, self.pipe._execution_device
        arguments: dict[str, Any] = {
            "hidden_states": latents.to(device, dtype),
            "encoder_hidden_states": text.to(device, dtype),
            "encoder_attention_mask": None if mask is None else mask.to(device),
            "timestep": torch.full((1,), timestep * self._timestep_scale, device=device),
        }
        if getattr(self.denoiser, "use_additional_conditions", False):  # PixArt-alpha at 1024 px
            conditions = {"resolution": [[*size]], "aspect_ratio": [[size[0] / size[1]]]}
            arguments["added_cond_kwargs"] = {
                name: torch.tensor(values, dtype=dtype, device=device) for name, values in conditions.items()
            }
        return arguments
