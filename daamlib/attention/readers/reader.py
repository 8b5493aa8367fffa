"""Interface of a reader of a model family, and the questions that all readers ask of a pipeline alike."""

import abc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...pipeline import denoiser_of
from ..calls import Pass
from ..fingerprint import Fingerprint
from ..text import TextTooLongError, TokenEmbeddings, require_text
from .sites import Site, embedder_of, fingerprint_of_sites
from .words import require_text_encoder

EmbedOptions = Mapping[str, Any]  # arguments of `encode_prompt`
Pair = tuple[Tensor, Tensor | None]  # positive and negative embeddings, or embeddings and their mask
Noisy = Sequence[tuple[int, Tensor]]  # timesteps, and the (1, channel, h, w) latents of each
Arguments = tuple[tuple, dict[str, Any]]  # of a pass


class Reader(abc.ABC):
    """Reads one family of models whose image attends to a text that it does not change.

    `middle` says whether a U-Net's middle block takes part, which DAAM leaves out.
    """

    stream: str | None = None  # the one of several texts that is read, by its name
    options: tuple[str, ...] = ()  # arguments of `encode_prompt` that later texts need

    def __init__(self, pipe: Any, *, middle: bool = False):
        self.pipe, self.middle = pipe, middle
        self.denoiser: Any = denoiser_of(pipe)  # its calls are the denoising passes
        self.signature = inspect.signature(self.denoiser.forward)

    @staticmethod
    @abc.abstractmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Return whether a denoiser is of this family."""

    # -- the model -----------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The cross-attentions. ValueError if there is none that DAAM can read."""

    @property
    @abc.abstractmethod
    def self_sites(self) -> tuple[Site, ...]:
        """The self-attentions that maps are refined along."""

    @property
    @abc.abstractmethod
    def image_factor(self) -> int:
        """Number that the height and width of an image in pixels must be multiples of."""

    @abc.abstractmethod
    def grid(self, latent: tuple[int, int], positions: int) -> tuple[int, int]:
        """Return the (h, w) of a site with `positions` = h * w. ValueError if the latent's sides do not explain it."""

    def fingerprint(self) -> Fingerprint:
        """Return what tells the model from others as it is now, with the LoRA it holds."""
        return fingerprint_of_sites(self.sites, self.denoiser.dtype, self.pipe)

    # -- passes --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        """Return the inputs of a pass. ValueError if they are not those of images."""

    @abc.abstractmethod
    def prompt_of(self, result: Any, *, guided: bool) -> Pair:
        """Return the positive and the negative embeddings of what `encode_prompt` returned."""

    @abc.abstractmethod
    def check_image_model(self) -> None:
        """ValueError for a denoiser that needs more than a noisy image and a text."""

    def defaults(self) -> dict[str, Any]:
        """Return the options that a call of the pipeline embeds prompts with unless it is given others."""
        return {}

    @abc.abstractmethod
    def passes(self, prompt: str, options: EmbedOptions, noisy: Noisy, size: tuple[int, int]) -> Iterator[Arguments]:
        """Yield the arguments of a pass at each timestep under a prompt; `size` is of the image in pixels."""

    # -- texts ---------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def rough(self) -> bool:
        """Return True if the precision of embeddings cannot be read off their values."""

    def project(self, text: Tensor) -> Tensor:
        """Return a (batch, token, width) text as the attentions receive it."""
        return text

    @abc.abstractmethod
    def named(self, prompt: str | None, text: Tensor, mask: Tensor | None, options: EmbedOptions) -> TokenEmbeddings:
        """Return the rows of a text that a mask keeps, as the attentions receive them, with tokens and words."""

    @abc.abstractmethod
    def count(self, text: str, options: EmbedOptions) -> tuple[int, int]:
        """Return the number of tokens of a text, special ones included, and how many are read."""

    def encode(self, text: str, *, padding: bool = False, options: EmbedOptions | None = None) -> TokenEmbeddings:
        """Embed any text as a prompt with these options; TypeError if it is no string, ValueError if it is too long."""
        require_text(text)
        options = {name: value for name, value in (options or {}).items() if name != "prompt_2"}  # the prompt's alone
        count, context = self.count(text, options)
        if count > context:
            raise TextTooLongError(
                f"the text has {count} tokens with its start and end token, the text encoder reads {context}: "
                f"shorten it by {count - context} tokens: {text!r}"
            )
        embedded, mask = self.encode_prompt(text, options)
        named = self.named(text, embedded[0], None if mask is None else mask[0], options)
        return named if padding else named.without_padding()

    def embed(self, prompt: str, options: EmbedOptions) -> Tensor:
        """Return the (m, d_text) embeddings of a prompt by `encode_prompt` with these options."""
        text, mask = self.encode_prompt(prompt, options)
        return self.named(None, text[0], None if mask is None else mask[0], options).values

    def encode_prompt(self, prompt: str, options: EmbedOptions) -> Pair:
        """Return the (1, token, width) text of a prompt, and its mask where the attentions are given one."""
        return self.run_encode_prompt(prompt, options)[0], None

    @torch.no_grad()
    def run_encode_prompt(self, prompt: str, options: EmbedOptions) -> tuple:
        """Return what `encode_prompt` returns for one prompt without guidance. ValueError without a text encoder."""
        require_text_encoder(self.pipe)
        embed, device = embedder_of(self.pipe), self.pipe._execution_device
        encoded = embed(prompt=prompt, device=device, do_classifier_free_guidance=False, **options)
        return (encoded,) if isinstance(encoded, Tensor) else encoded
