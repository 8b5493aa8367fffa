"""Base of the records of all model families: texts, pictures, devices and files."""

import abc
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from typing_extensions import Self

from ..io import load_dataclass, save_dataclass
from .fingerprint import Fingerprint
from .heatmaps import HeatMaps
from .pictures import overlay
from .placement import on_device
from .text import TokenEmbeddings
from .weak import Weakly


@dataclass(frozen=True, eq=False)
class ImageRecord(abc.ABC):
    """Common fields and methods of `AttentionRecord` and `JointRecord`.

    Attributes:
        prompt: the text that the passes read (thesis: X), the negative one of the unconditional branch; None if it was
            given as embeddings.
        prompt_embeddings: (rows, d_text) as the denoiser saw them, padding included.
        timesteps: of each pass that was read, in order; some schedulers repeat one.
        embedded_with: arguments of `encode_prompt` that the prompt was embedded with, such as `clip_skip`.
        masked: whether a mask left padding out of the softmax; then it is left out of later texts', too.
        encoder_check: embeddings of `readers.words.CHECK_TEXT` while generating, if the prompt was given as embeddings.
        pipe: embeds further texts; None once nothing else holds it, and of copies, pickles and files. See `with_pipe`.
    """

    prompt: str | None
    prompt_embeddings: TokenEmbeddings
    timesteps: list[float]
    _: KW_ONLY
    embedded_with: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False
    encoder_check: torch.Tensor | None = None
    pipe: Any = Weakly()

    FORMAT: ClassVar[str]  # name and version of the file format

    def __getstate__(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "pipe"}

    @abc.abstractmethod
    def encode(self, text: str, *, padding: bool = False) -> TokenEmbeddings:
        """Embed any text as the prompt was embedded."""

    @abc.abstractmethod
    def daam(self, text: Any = None, *, padding: bool = True) -> HeatMaps:
        """Return DAAM of the prompt, or of another text."""

    @abc.abstractmethod
    def ldaam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Return maps of (m, d_text) embeddings without a softmax."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise an error if the parts of a record from a file do not fit each other."""

    @abc.abstractmethod
    def fingerprint_of(self, pipe: Any) -> Fingerprint:
        """Measure the model of a pipeline as the record's own was."""

    @property
    def d_text(self) -> int:
        """The width of the text embeddings."""
        return self.prompt_embeddings.values.shape[1]

    @property
    def summands(self) -> int:
        """Number of terms in a cell of a map: heads x layers x passes. ValueError where layers need a pipeline.

        DAAM of all tokens, padding included, sums to it, but for joint models, where the image's positions take part.
        """
        return len(self.timesteps) * sum(layer.heads for layer in self.layers)  # type: ignore[attr-defined]

    def layer_names(self) -> list[str]:
        """Return the names of the attentions that are read.

            record.layer_names()[-1]
        They are in the order of the layers.
        """
        return [layer.name for layer in self.layers]  # type: ignore[attr-defined]

    def text_embeddings(self, text: str | None = None, *, padding: bool = True) -> TokenEmbeddings:
        """Return a copy of the prompt's embeddings (None, or its words), or embed another text.

            record.text_embeddings().values  # (rows, d_text)
        Another text needs the pipeline.
        """
        if text is None or text == self.prompt:
            prompt = self.prompt_embeddings
            return replace(prompt, values=prompt.values.clone()) if padding else prompt.without_padding()
        return self.encode(text, padding=padding and not self.masked)

    def ldaam(self, text: str | None = None) -> HeatMaps:
        """Return maps of a text (None: the prompt) without a softmax.

            record.ldaam("traffic light")["traffic light"]  # (H, W)
        See `ldaam_from`.
        """
        return self.ldaam_from(self.text_embeddings(text, padding=False))

    def overlay(self, word: str, image: Any, *, text: Any = None, opacity: float = 0.65) -> Image.Image:
        """Return the image under DAAM of a word of the prompt, or of `text`.

            record.overlay("car", image).save("car.png")

        Raises what `daam` and `daamlib.overlay` raise.
        """
        return overlay(image, self.daam(text)[word], opacity=opacity)

    def to(self, device: str | torch.device) -> Self:
        """Return the record with its tensors on `device`, where its maps are then computed.

            record.to("cpu").daam()["car"].numpy()
        The pipeline stays where it is.
        """
        return on_device(self, torch.device(device))

    def require_pipe(self, otherwise: str) -> Any:
        """Return the pipeline; ValueError, with another way, if there is none."""
        if self.pipe is None:
            raise ValueError(
                f"this record has no model and no text encoder: load it with {type(self).__name__}.load(path, "
                "pipe=pipe), or use record.with_pipe(pipe), and keep `pipe` (a record does not keep its pipeline "
                f"alive, its copies and pickles are without it); {otherwise}"
            )
        return self.pipe

    def with_pipe(self, pipe: Any) -> Self:
        """Return the record with a pipeline of the model that made it, which the caller keeps alive.

            record = daamlib.AttentionRecord.load("car.safetensors").with_pipe(pipe)
            record.daam("a tree")

        Raises ValueError for a pipeline of another model.
        """
        return self._made_by(pipe, "this record")

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file.

            record.save("image.safetensors")
            again = type(record).load("image.safetensors", pipe=pipe)
        It is complete or not there.
        """
        save_dataclass(path, replace(self, pipe=None), self.FORMAT)

    @classmethod
    @torch.inference_mode(False)  # its tensors may be differentiated through wherever it was loaded
    def load(cls, path: str | Path, *, pipe: Any = None, device: str | torch.device | None = None) -> Self:
        """Read a saved record, as `save` shows, with the pipeline that made it, which the caller keeps alive.

        Its tensors go to `device`, by default where the pipeline computes, without one the CPU. Raises
        FileNotFoundError, and ValueError for a file that is no record, is damaged, or is of another model.
        """
        try:
            record = load_dataclass(cls, path, cls.FORMAT)
            record.check()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path} is not a readable attention record, or is damaged: {error}") from error
        record, device = record._made_by(pipe, path), device or getattr(pipe, "_execution_device", None)
        return record if device is None else record.to(device)

    def _made_by(self, pipe: Any, name: str | Path) -> Self:
        """Return the record with a pipeline; ValueError for another model's."""
        record: Any = self
        if pipe is not None:  # the record may hold some of the model's layers alone
            made_by = record.fingerprint
            if other := made_by.difference(self.fingerprint_of(pipe).of_layers(made_by.layers)):
                raise ValueError(f"{name} and the pipeline have {other}: give the model that made it, with its LoRA")
        return replace(record, pipe=pipe)
