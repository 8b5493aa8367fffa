"""The readers of AudioLDM2, whose U-Net reads two texts.

Each block attends in turn to itself, to eight vectors that a GPT-2 generates from the whole prompt, and to the prompt's
tokens as Flan-T5 embeds them. Both are cross-attention without a bias, a norm or a projection, so that all formulae of
images hold exactly. They are read one at a time: the T5's words, or the GPT-2's vectors by their position.

A map's height is time, from the start of the sound, and its width is frequency, mel bins from low to high: its (H, W)
is that of the latents, which the VAE enlarges to the mel-spectrogram.

Padding to the longest prompt of a batch is masked in the T5's attention: here it is left out. Where `librosa` is
installed, a pipeline sorts the several sounds of one prompt (`num_waveforms_per_prompt`) by how well they fit it, after
it made them; records are in the order in which they were made.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..calls import Pass
from ..text import TextTooLongError, TokenEmbeddings, require_text
from .sites import Site, embedder_of
from .unet import UNetReader, cross_attentions
from .words import read_pieces, token_ids


class T5Reader(UNetReader):
    """Reads the T5 tokens of AudioLDM2, as a U-Net's."""

    stream = "t5"
    options = ()
    arguments = ("encoder_hidden_states_1", "encoder_attention_mask_1")  # of the U-Net: the text, and its mask

    @staticmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Whether this is the family of the denoiser: a U-Net that is called with a second text."""
        return "encoder_hidden_states_1" in inspect.signature(denoiser.forward).parameters

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The cross-attentions that read this text. ValueError if there is none."""
        sites = cross_attentions(self.denoiser, middle=self.middle)
        own = tuple(site for site in sites if _stream_of(self.denoiser, site.name) == self.stream)
        if not own:
            raise ValueError(
                f"no attention of this {type(self.denoiser).__name__} reads {self.stream!r}; the models that speak a "
                'transcription read no T5 tokens, and are traced by trace(pipe, stream="gpt2")'
            )
        return own

    @property
    def image_factor(self) -> int:
        """ValueError: there are no images."""
        raise ValueError(f"{type(self.pipe).__name__} makes sounds, it has no images that could be read")

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        """The latents, noise level and text that the U-Net is called with. ValueError if it is called without one."""
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        text, mask = (arguments.get(name) for name in self.arguments)
        if text is None:  # where there is no second text, the U-Net takes the first in its place
            raise ValueError(f"the U-Net was called without {self.arguments[0]}, the text that is to be read")
        return Pass(arguments["sample"], arguments["timestep"], text, None if mask is None else mask > 0)

    def prompt_of(self, result: tuple, *, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the T5's text; under guidance it holds both texts in one batch, which the recorder takes apart."""
        return result[0], None

    def embed(self, prompt: str, options: Mapping[str, Any]) -> torch.Tensor:
        """(m, d_text) of a prompt alone, by `encode_prompt`."""
        device = self.pipe._execution_device
        with torch.no_grad():
            return embedder_of(self.pipe)(prompt, device, 1, do_classifier_free_guidance=False)[0][0]

    def named(
        self, prompts: Sequence[str | None], text: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> list[TokenEmbeddings]:
        """The rows of an (image, token, d_text) text that are not masked, with the tokens and words of each prompt."""
        rows = text if mask is None else [values[own > 0] for values, own in zip(text, mask, strict=True)]
        return [self._named(prompt, values, options) for prompt, values in zip(prompts, rows, strict=True)]

    def _named(self, prompt: str | None, values: torch.Tensor, options: Mapping[str, Any]) -> TokenEmbeddings:
        if prompt is None:
            return TokenEmbeddings.unnamed(values)
        tokenizer = self.pipe.tokenizer_2
        ids = token_ids(tokenizer, prompt, tokenizer.model_max_length)
        return TokenEmbeddings(values, *read_pieces(tokenizer, ids))

    def encode(self, text: str, *, padding: bool = False, options: Mapping[str, Any] | None = None) -> TokenEmbeddings:
        """Embed any text as a prompt, its tokens and the end token; `padding` and `options` are of no meaning here.

        Raises TypeError if `text` is no string, ValueError if it is longer than the context length.
        """
        require_text(text)
        tokenizer = self.pipe.tokenizer_2
        count, context = len(tokenizer(text, verbose=False).input_ids), tokenizer.model_max_length
        if count > context:
            raise TextTooLongError(
                f"the text has {count} tokens, the text encoder reads {context}: shorten it: {text!r}"
            )
        return self._named(text, self.embed(text, options or {}), {})


class GPT2Reader(T5Reader):
    """Reads the vectors that AudioLDM2's GPT-2 generates, by their position: they are no words."""

    stream = "gpt2"
    embeds = False  # the vectors are not of a text alone
    arguments = ("encoder_hidden_states", "encoder_attention_mask")

    def prompt_of(self, result: tuple, *, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the vectors; under guidance they are those of both texts in one batch."""
        return result[2], None

    def named(
        self, prompts: Sequence[str | None], text: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> list[TokenEmbeddings]:
        """The (image, vector, d_text) vectors, numbered."""
        return [TokenEmbeddings.unnamed(values) for values in text]

    def embed(self, prompt: str, options: Mapping[str, Any]) -> torch.Tensor:
        """Raise ValueError: vectors of another text are no words, and they depend on how the prompts are padded."""
        raise ValueError(
            "the vectors that GPT-2 generates of a prompt are no words: record.daam() and record.ldaam() read them by "
            'position; texts are read by trace(pipe, stream="t5")'
        )

    def encode(self, text: str, *, padding: bool = False, options: Mapping[str, Any] | None = None) -> TokenEmbeddings:
        """ValueError, see `embed`."""
        return TokenEmbeddings.unnamed(self.embed(text, options or {}))


def _stream_of(unet: Any, site: str) -> str:
    """What a cross-attention reads: the first two transformers of each cycle are given one text, others the second."""
    block, _, path = site.partition(".attentions.")
    number, cycle = int(path.split(".")[0]), len(unet.get_submodule(block).cross_attention_dim)
    return "gpt2" if number % cycle <= 1 else "t5"
