"""The readers: which attentions of a model can be read, and what a call of its denoiser means.

A reader (`reader.Reader`) is the one place that knows a model family, one module each.
"""

from typing import Any

from ...pipeline import denoiser_of
from ..fingerprint import Fingerprint
from ..text import TokenEmbeddings
from .audioldm2 import GPT2Reader, T5Reader
from .cross_transformer import CrossTransformerReader
from .reader import Reader
from .unet import UP, UNetReader

READERS: tuple[type[Reader], ...] = (CrossTransformerReader, T5Reader, GPT2Reader, UNetReader)  # the first that reads

VIDEO = "makes videos: a pass has many frames, maps are of one image"
AUDIO = "makes audio by a diffusion transformer, whose positions are of time alone; no reader knows it yet"
UNREAD = {  # classes of denoisers -> why they are not read, where there is more to say than that no reader knows them
    "UNet3DConditionModel": VIDEO,
    "UNetMotionModel": VIDEO,
    "UNetSpatioTemporalConditionModel": VIDEO,
    "I2VGenXLUNet": VIDEO,
    "StableAudioDiTModel": AUDIO,
    "StableAudio3DiTModel": AUDIO,
    "AceStepTransformer1DModel": AUDIO,
    "LongCatAudioDiTTransformer": AUDIO,
    "Kandinsky3UNet": "a U-Net of another kind; no reader knows it yet",
    "DreamLiteUNetModel": "a U-Net of another kind; no reader knows it yet",
}
SPACE_TIME = "its positions are of time, height and width (also where it makes one image), maps are of height and width"


def why_unread(kind: str) -> str | None:
    """Return why denoisers of a class are not read, by the class's name; None where nothing is known of it."""
    return UNREAD.get(kind) or (SPACE_TIME if kind.endswith("Transformer3DModel") else None)


def reader_of(pipe: Any, *, middle: bool = False, stream: str | None = None) -> Reader:
    """Return the reader of a pipeline's model family and text. TypeError or ValueError where there is none."""
    denoiser = denoiser_of(pipe)
    kind = type(denoiser).__name__
    if why := why_unread(kind):
        raise TypeError(f"{type(pipe).__name__} with a {kind} is not read: {why}")
    readers = [reader for reader in READERS if reader.reads(denoiser)]
    for reader in readers:
        if stream in (None, reader.stream):
            return reader(pipe, middle=middle)
    if readers:
        streams = [reader.stream for reader in readers if reader.stream]
        raise ValueError(f"{type(pipe).__name__} has no text stream {stream!r}: {streams or 'it reads one text'}")
    raise TypeError(
        "expected a diffusers pipeline with a U-Net (SD 1.x, 2.x, XL, AudioLDM2) or a transformer of PixArt, Sana, "
        f"SD 3, SD 3.5, Flux.1 or Qwen-Image, got {type(pipe).__name__} with a {kind}, which no reader knows"
    )


def in_decoder(layer: str) -> bool:
    """Return whether the layer of this name is in a decoder, which only some families have: U-Nets."""
    return layer.startswith(UP)


def encode(pipe: Any, text: str, *, padding: bool = False) -> TokenEmbeddings:
    """Embed any text as the pipeline embeds its prompts.

        daamlib.encode(pipe, "a traffic light")["traffic light"]  # (tokens, d_text)

    See `AttentionRecord.encode`.
    """
    return reader_of(pipe).encode(text, padding=padding)


def fingerprint_of(
    pipe: Any, *, middle: bool = False, stream: str | None = None, lora_scale: float = 1.0
) -> Fingerprint:
    """Return the fingerprint of a pipeline as it is now, in a pass with this scale of its LoRA.

    TypeError or ValueError for a pipeline that cannot be read.
    """
    reader = reader_of(pipe, middle=middle, stream=stream)
    layers = [module for module in reader.denoiser.modules() if hasattr(module, "scale_layer")]  # PEFT's
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(lora_scale)
        return reader.fingerprint()
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
