"""The readers of AudioLDM2, whose U-Net reads two texts.

Each block attends to eight vectors that a GPT-2 generates from the whole prompt, and to the prompt's tokens as Flan-T5
embeds them, without a bias, a norm or a projection. They are read one at a time: the T5's words, or the GPT-2's vectors
by their position. A map's height is time, from the start of the sound, and its width is frequency, mel bins from low to
high. Where `librosa` is installed, a pipeline sorts the sounds of one prompt (`num_waveforms_per_prompt`) by how well
they fit it; records are in the order in which they were made.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..calls import Pass
from ..text import TokenEmbeddings
from .reader import EmbedOptions, Pair, Reader
from .sites import Site
from .unet import UNetReader, cross_attentions
from .words import read_pieces, token_ids


class T5Reader(UNetReader):
    """Reads the T5 tokens of AudioLDM2, as a U-Net's."""

    stream = "t5"
    options = ()
    arguments = ("encoder_hidden_states_1", "encoder_attention_mask_1")  # of the U-Net: the text, and its mask

    @staticmethod
    def reads(denoiser: torch.nn.Module) -> bool:
        """Return whether it is a U-Net that is called with a second text."""
        return "encoder_hidden_states_1" in inspect.signature(denoiser.forward).parameters

    @functools.cached_property
    @override
    def sites(self) -> tuple[Site, ...]:
        sites = cross_attentions(self.denoiser, middle=self.middle)
        own = tuple(site for site in sites if _stream_of(self.denoiser, site.name) == self.stream)
        if not own:
            raise ValueError(
                f"no attention of this {type(self.denoiser).__name__} reads {self.stream!r}; the models that speak a "
                'transcription read no T5 tokens, and are traced by trace(pipe, stream="gpt2")'
            )
        return own

    @property
    @override
    def image_factor(self) -> int:
        raise ValueError(f"{type(self.pipe).__name__} makes sounds, it has no images that could be read")

    @override
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        text, mask = (arguments.get(name) for name in self.arguments)
        if text is None:  # where there is no second text, the U-Net takes the first in its place
            raise ValueError(f"the U-Net was called without {self.arguments[0]}, the text that is to be read")
        return Pass(arguments["sample"], arguments["timestep"], text, None if mask is None else mask > 0)

    @override
    def prompt_of(self, result: Any, *, guided: bool) -> Pair:
        return result[0], None  # under guidance both texts in one batch, which the recorder takes apart

    @override
    def run_encode_prompt(self, prompt: str, options: EmbedOptions) -> tuple:
        return Reader.run_encode_prompt(self, prompt, {"num_waveforms_per_prompt": 1})

    @override
    def named(self, prompt: str | None, text: Tensor, mask: Tensor | None, options: EmbedOptions) -> TokenEmbeddings:
        values, tokenizer = text if mask is None else text[mask > 0], self.pipe.tokenizer_2
        if prompt is None:
            return TokenEmbeddings.unnamed(values)
        ids = token_ids(tokenizer, prompt, tokenizer.model_max_length)
        return TokenEmbeddings(values, *read_pieces(tokenizer, ids))

    @override
    def count(self, text: str, options: EmbedOptions) -> tuple[int, int]:
        tokenizer = self.pipe.tokenizer_2
        return len(tokenizer(text, verbose=False).input_ids), tokenizer.model_max_length


class GPT2Reader(T5Reader):
    """Reads the vectors that AudioLDM2's GPT-2 generates, by their position: they are no words."""

    stream = "gpt2"
    arguments = ("encoder_hidden_states", "encoder_attention_mask")

    @override
    def prompt_of(self, result: Any, *, guided: bool) -> Pair:
        return result[2], None

    @override
    def named(self, prompt: str | None, text: Tensor, mask: Tensor | None, options: EmbedOptions) -> TokenEmbeddings:
        return TokenEmbeddings.unnamed(text)

    @override
    def encode_prompt(self, prompt: str, options: EmbedOptions) -> Pair:
        # vectors of another text are no words, and they depend on how the prompts are padded
        raise ValueError(
            "the vectors that GPT-2 generates of a prompt are no words: record.daam() and record.ldaam() read them by "
            'position; texts are read by trace(pipe, stream="t5")'
        )


def _stream_of(unet: Any, site: str) -> str:
    """Return the stream of a cross-attention: the first two transformers of each cycle are given one text."""
    block, _, path = site.partition(".attentions.")
    number, cycle = int(path.split(".")[0]), len(unet.get_submodule(block).cross_attention_dim)
    return "gpt2" if number % cycle <= 1 else "t5"
