"""The reader of cross-attention transformers: PixArt-alpha and Sigma, Sana 1.0 and 1.5.

Their image reads a text that it does not change, as in a U-Net, so all that holds of U-Nets holds exactly. What
differs: the text c that the attentions receive is the text encoder's, projected; keys have a bias, and in Sana 1.5 an
RMS norm across heads; a mask leaves padding out; and there is one grid, that of the latent's patches.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ...pipeline import denoiser_of, uncompiled
from ..calls import Pass
from ..fingerprint import Fingerprint
from ..text import PAD, TextTooLongError, TokenEmbeddings, require_text
from .sites import Site, embedder_of, embeds, fingerprint_of_sites, place_of, refuse_caches
from .words import is_rough, read_pieces, require_text_encoder

KINDS = ("PixArtTransformer2DModel", "SanaTransformer2DModel")
PROJECTIONS = ("caption_projection", "caption_norm")  # what c has gone through, in this order, where a model has it
PROBE_TOKENS, PROBE_POSITIONS = 3, 2  # of the pass that shows which attentions the text reaches
SELF_LAYERS = 4  # self-attentions that are read, evenly spaced in the later half of the blocks; not tuned


class CrossTransformerReader:
    """Reads the attentions of a diffusers pipeline's transformer that the text reaches, whatever `middle` says."""

    stream: str | None = None  # one text reaches the attentions
    options = ("clean_caption", "complex_human_instruction", "lora_scale", "max_sequence_length")

    @staticmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Whether this is the family of the denoiser."""
        return type(denoiser).__name__ in KINDS

    def __init__(self, pipe: Any, *, middle: bool = False):
        self.pipe = pipe
        self.denoiser: Any = denoiser_of(pipe)
        self._signature = inspect.signature(self.denoiser.forward)
        self._scale = getattr(self.denoiser.config, "timestep_scale", None) or 1.0

    @functools.cached_property
    def _attentions(self) -> dict[str, Any]:
        modules = self.denoiser.named_modules()
        named = {name.replace("_orig_mod.", ""): module for name, module in modules}  # compiled blocks
        kinds = {name: (getattr(each, "to_q", None), getattr(each, "to_k", None)) for name, each in named.items()}
        return {name: named[name] for name, (to_q, to_k) in kinds.items() if to_q is not None and to_k is not None}

    @functools.cached_property
    def _received(self) -> dict[str, torch.Tensor]:
        """What `to_k` of each attention receives where the denoiser reads a text of few tokens at fewer positions.

        The denoiser's own hooks, a trace's among them, are passed by.
        """
        refuse_caches(self.denoiser)  # a cache would hand this pass' attention to the image
        received: dict[str, torch.Tensor] = {}
        config, patch = self.denoiser.config, self.denoiser.config.patch_size
        if getattr(config, "guidance_embeds", False):
            raise ValueError("this transformer is told its guidance (Sana Sprint): its noise levels cannot be read")
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
        for name, found in received.items():
            if found.shape[1] == PROBE_TOKENS and not torch.allclose(found, expected.to(found), rtol=1e-2, atol=1e-2):
                raise ValueError(f"the text changes on its way to {name}: its attention is not read exactly")
        return received

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The attentions that the text reaches. ValueError if there is none that DAAM can read."""
        names = [name for name, found in self._received.items() if found.shape[1] == PROBE_TOKENS]
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
    def self_sites(self) -> tuple[Site, ...]:
        """Some of the attentions of positions to one another."""
        names = [name for name, found in self._received.items() if found.shape[1] == PROBE_POSITIONS]
        late = names[len(names) // 2 :]
        return tuple(self._site(name) for name in late[:: -(-len(late) // SELF_LAYERS)])

    def _site(self, name: str) -> Site:
        module, width = self._attentions[name], self._received[name].shape[2]
        linear = "Linear" in type(module.processor).__name__
        return Site(name, module, module.to_q, module.heads, float(module.scale), width, linear)

    @property
    def image_factor(self) -> int:
        """What the height and width of an image in pixels must be multiples of."""
        return self.pipe.vae_scale_factor * self.denoiser.config.patch_size

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        """The latents, noise level and text that the transformer is called with. ValueError if they are not these."""
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        sample, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        if sample.ndim != 4 or text.ndim != 3 or len(text) != len(sample):
            raise ValueError(
                f"the transformer was called with latents of shape {tuple(sample.shape)} and a text of shape "
                f"{tuple(text.shape)}: expected (batch, channel, height, width) and (batch, token, width)"
            )
        mask = arguments.get("encoder_attention_mask")
        if mask is not None:
            mask = mask.squeeze(1) > -1 if mask.ndim == 3 else mask > 0  # added to the scores, or 1 where it takes part
        return Pass(sample, arguments["timestep"] / self._scale, text, mask)

    def grid(self, latent: tuple[int, int], positions: int) -> tuple[int, int]:
        """(h, w) of a site with `positions` = h * w: the latent's patches."""
        h, w = (side // self.denoiser.config.patch_size for side in latent)
        if h * w != positions:
            raise ValueError(
                f"{positions} positions are not the {h} x {w} patches of a {latent[0]} x {latent[1]} latent"
            )
        return h, w

    @property
    def embeds(self) -> bool:
        """Whether the pipeline embeds texts by a method of its own."""
        return embeds(self.pipe)

    @property
    def rough(self) -> bool:
        """Whether the precision of embeddings cannot be read off their values."""
        return is_rough(self.pipe, projected=True)

    # -- texts ---------------------------------------------------------------------------------------------------

    def prompt_of(self, result: tuple, *, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the positive and the negative embeddings of what `encode_prompt` returned."""
        return result[0], result[2]

    def named(
        self, prompts: Sequence[str | None], text: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> list[TokenEmbeddings]:
        """Return the text of a pass as the attentions receive it, without what the mask leaves out, named by prompt."""
        projected, count = self.project(text), text.shape[1]
        masks = [[True] * count] * len(text) if mask is None else mask.bool().tolist()
        found = []
        for prompt, values, kept in zip(prompts, projected, masks, strict=True):
            rows = [row for row, takes_part in enumerate(kept) if takes_part]
            ids, first = ([], 0) if prompt is None else self._ids(prompt, options, truncation=True)
            # a mask that leaves rows before or between the text's out leaves its tokens in their order, if all are left
            if prompt is None or (rows != list(range(len(rows))) and len(rows) != len(ids)):
                found.append(TokenEmbeddings.unnamed(values[rows]))
                continue
            tokens, words = read_pieces(self.pipe.tokenizer, ids, first)
            tokens = (*tokens, *[PAD] * len(rows))[: len(rows)]  # a mask may be longer or shorter than its prompt
            kept_words = tuple(word for word in words if word.stop <= len(rows))
            found.append(TokenEmbeddings(values[rows], tokens, kept_words))
        return found

    @torch.no_grad()
    def project(self, text: torch.Tensor) -> torch.Tensor:
        """Return c of the text encoder's (batch, token, width) text, as the attentions receive it."""
        for name in PROJECTIONS:
            module = getattr(self.denoiser, name, None)
            if module is not None:
                text = module(text.to(place_of(module, self.pipe), self.denoiser.dtype))
        return text.detach()

    def _ids(self, prompt: str, options: Mapping[str, Any], *, truncation: bool) -> tuple[list[int], int]:
        """The token of each row of a prompt's embeddings, and the row where its own words begin."""
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

    def encode(self, text: str, *, padding: bool = False, options: Mapping[str, Any] | None = None) -> TokenEmbeddings:
        """Embed any text as a prompt was with these options, (m, d_text) as the attentions receive it.

        `padding` is of no meaning here, where attention leaves padding out. Raises TypeError if `text` is no string,
        ValueError if it is longer than the context length.
        """
        require_text(text)
        options = options or {}
        count, kept = (len(self._ids(text, options, truncation=cut)[0]) for cut in (False, True))
        if count > kept:
            raise TextTooLongError(f"the text has {count} tokens, the pipeline reads {kept}: shorten it: {text!r}")
        embedded, mask, *_ = self._encode_prompt(text, options)
        return self.named([text], embedded, mask, options)[0]

    def embed(self, prompt: str, options: Mapping[str, Any]) -> torch.Tensor:
        """Return (m, d_text) of a prompt, by `encode_prompt` with these options."""
        text, mask, *_ = self._encode_prompt(prompt, options)
        return self.named([prompt], text, mask, options)[0].values

    @torch.no_grad()
    def _encode_prompt(self, prompt: str, options: Mapping[str, Any]) -> tuple:
        """What `pipe.encode_prompt` returns for one prompt without guidance. ValueError without a text encoder."""
        require_text_encoder(self.pipe)
        device = self.pipe._execution_device
        return embedder_of(self.pipe)(prompt=prompt, device=device, do_classifier_free_guidance=False, **options)

    # -- passes --------------------------------------------------------------------------------------------------

    def check_image_model(self) -> None:
        """ValueError for a transformer that needs more than a noisy image and a text."""
        channels, latents = self.denoiser.config.in_channels, self.pipe.vae.config.latent_channels
        if channels != latents:
            raise ValueError(f"this transformer takes {channels} channels, the VAE makes {latents}: it edits images")

    def defaults(self) -> dict[str, Any]:
        """Return the options that a call of the pipeline embeds prompts with unless it is told others."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        given = {name: known[name].default for name in self.options if name in known}
        return {name: value for name, value in given.items() if value is not None}

    def passes(
        self,
        prompt: str,
        options: Mapping[str, Any],
        timesteps: Sequence[int],
        noisy: Sequence[torch.Tensor],
        size: tuple[int, int],
    ) -> Iterator[tuple[tuple, dict[str, Any]]]:
        """Yield the arguments of a pass for each timestep and its (1, channel, h, w) latents, conditioned on `prompt`.

        options: of `encode_prompt`; size: (height, width) of the image in pixels.
        """
        text, mask, *_ = self._encode_prompt(prompt, options)
        for timestep, latents in zip(timesteps, noisy, strict=True):
            yield (), self._arguments(latents, timestep, text, mask, size)

    def _arguments(
        self, latents: torch.Tensor, timestep: float, text: torch.Tensor, mask: Any, size: tuple[int, int]
    ) -> dict[str, Any]:
        dtype, device = self.denoiser.dtype, self.pipe._execution_device
        arguments: dict[str, Any] = {
            "hidden_states": latents.to(device, dtype),
            "encoder_hidden_states": text.to(device, dtype),
            "encoder_attention_mask": None if mask is None else mask.to(device),
            "timestep": torch.full((1,), timestep * self._scale, device=device),
        }
        if getattr(self.denoiser, "use_additional_conditions", False):  # PixArt-alpha at 1024 px
            conditions = {"resolution": [[*size]], "aspect_ratio": [[size[0] / size[1]]]}
            arguments["added_cond_kwargs"] = {
                name: torch.tensor(values, dtype=dtype, device=device) for name, values in conditions.items()
            }
        return arguments

    def fingerprint(self) -> Fingerprint:
        """What tells the model from others as it is now, with the LoRA it holds."""
        return fingerprint_of_sites(self.sites, self.denoiser.dtype, self.pipe)
