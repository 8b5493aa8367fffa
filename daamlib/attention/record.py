"""The record of one image: everything any later text needs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import record_file as files
from .fingerprint import Fingerprint
from .heatmaps import HeatMaps, upsample
from .layers import Layer
from .ldaam import LinearMap, check_embeddings, collapse
from .text import TokenEmbeddings
from .text import encode as encode_text

MAX_BYTES = 2**26  # of attention probabilities held at a time while computing DAAM


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """The cross-attention of one image, from `trace`, `trace_image` or `load`.

    prompt: the text that generated the image (thesis: X), None if it was given as embeddings.
    prompt_embeddings: the prompt's embeddings as the U-Net saw them, padding included (d_text wide).
    timesteps: of each U-Net pass, in order; some schedulers repeat one. layers: see `Layer`.
    """

    prompt: str | None
    prompt_embeddings: TokenEmbeddings
    timesteps: list[int]
    layers: tuple[Layer, ...]
    branch: str = "conditional"
    pipe: Any = field(default=None, repr=False)  # embeds further texts

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the largest cross-attention map, which all maps are up-sampled to."""
        return max((layer.grid for layer in self.layers), key=lambda grid: grid[0] * grid[1])

    @property
    def d_text(self) -> int:
        """The width of the text embeddings."""
        return self.layers[0].key_weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the record's tensors lie, and its maps are computed."""
        return self.layers[0].key_weight.device

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells the model that made the record from others, by the key weights it was made with."""
        return Fingerprint.of_keys({layer.name: layer.project for layer in self.layers}, self.d_text)

    @property
    def nbytes(self) -> int:
        """Bytes of the queries or their sums (the key weights, shared by the records of a trace, come on top)."""
        kept = [layer.query_sum if layer.queries is None else layer.queries for layer in self.layers]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def encode(self, text: str, *, padding: bool = False) -> TokenEmbeddings:
        """Embed any text with the model's own text encoder: (m, d_text) values and their tokens.

        m = 2 + number of tokens (start and end token included), or the context length with `padding`. The values lie
        on the record's device, wherever the pipeline is. Raises TypeError if it is no string, ValueError if it is too
        long or if the record was loaded without a pipeline.
        """
        if self.pipe is None:
            raise ValueError(
                "this record has no text encoder: load it with AttentionRecord.load(path, pipe=pipe), or give "
                "embeddings to daam_from / ldaam_from"
            )
        embeddings = encode_text(self.pipe, text, padding=padding)
        return replace(embeddings, values=embeddings.values.to(self.device))

    def daam(self, text: str | None = None, *, padding: bool = True) -> HeatMaps:
        """DAAM of the prompt (`text=None`) or of any other text: OV-DAAM (thesis: D(X'); DAAM, Tang et al. 2022).

        Softmax over the tokens, up-sampled bilinearly to `grid`, summed over steps, layers and heads. With `padding`
        the softmax is over the whole context, as while generating; without, over the text's own tokens (as OVAM).
        Returns (m, H, W) maps of start token ... end token. Raises ValueError with `store="linear"`.
        """
        embeddings = self.text_embeddings(text, padding=padding)
        return self._rows(self.daam_from(embeddings), embeddings)

    def ldaam(self, text: str | None = None) -> HeatMaps:
        """Linear DAAM: the same sums without the softmax, so every token's map is its own (thesis: LD(x))."""
        embeddings = self.text_embeddings(text, padding=False)
        return self._rows(self.ldaam_from(embeddings), embeddings)

    def daam_from(self, embeddings: torch.Tensor | TokenEmbeddings, *, max_bytes: int = MAX_BYTES) -> HeatMaps:
        """DAAM of (m, d_text) embeddings, the softmax over exactly these m; differentiable in them.

        `max_bytes` bounds the attention probabilities held at a time. Raises ValueError for another width, or if the
        record holds no queries (`store="linear"`).
        """
        if self.layers[0].queries is None:
            raise ValueError(
                'DAAM needs the queries of every step, this record was made with store="linear": trace with '
                'store="queries", or use ldaam'
            )
        values = check_embeddings(embeddings, self.d_text, self.device)
        maps = sum(upsample(layer.softmax_maps(values, max_bytes), self.grid) for layer in self.layers)
        return HeatMaps(maps, *_names(embeddings))

    def ldaam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Linear DAAM of (m, d_text) embeddings, differentiable in them. Raises ValueError for another width."""
        return HeatMaps(self.linear_map()(embeddings), *_names(embeddings))

    def linear_map(self) -> LinearMap:
        """LDAAM collapsed to one tensor (H, W, d_text), computed once; `daamlib.attention.ldaam` derives it."""
        return self._linear_map

    @functools.cached_property
    @torch.inference_mode(False)  # it is kept, and a tensor of inference mode can never be differentiated through
    def _linear_map(self) -> LinearMap:
        return collapse(self.layers, self.grid)

    def select(
        self,
        *,
        layers: Callable[[Layer], bool] | None = None,
        steps: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> "AttentionRecord":
        """A record of only some layers (a predicate), steps and heads (numbers), for looking into the sum.

        Maps keep the full `grid` only while a layer of that grid is left. Raises ValueError if nothing is left or,
        for steps, if the record holds only their sum; IndexError for a number that does not exist.
        """
        kept = [layer for layer in self.layers if layers is None or layers(layer)]
        if not kept or (steps is not None and not len(steps)) or (heads is not None and not len(heads)):
            names = [f"{layer.name} {layer.grid}" for layer in self.layers]
            raise ValueError(f"nothing is left of {len(self.timesteps)} steps and the layers {names}")
        if steps is not None and kept[0].queries is None:
            raise ValueError('steps cannot be taken apart: this record was made with store="linear"')
        return replace(
            self,
            layers=tuple(layer.select(steps, heads) for layer in kept),
            timesteps=self.timesteps if steps is None else [self.timesteps[step] for step in steps],
        )

    def to(self, device: str | torch.device) -> "AttentionRecord":
        """The record with all its tensors on `device`, where its maps are then computed; the pipeline stays.

        A new record, which computes its `linear_map` anew; this one stays as it is. Raises what PyTorch raises for a
        device that is not there.
        """
        device = torch.device(device)
        prompt = replace(self.prompt_embeddings, values=self.prompt_embeddings.values.to(device))
        return replace(self, prompt_embeddings=prompt, layers=tuple(layer.to(device) for layer in self.layers))

    def save(self, path: str | Path) -> None:
        """Write the record to one `.safetensors` file; a file of that name is replaced only when all is written."""
        files.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, pipe: Any = None, device: str | torch.device | None = None) -> "AttentionRecord":
        """Read a saved record; `pipe`, the pipeline that made it, lets it embed further texts.

        device: where its tensors go and its maps are computed; None: where `pipe` computes, without one the CPU.
        Raises FileNotFoundError, or ValueError if the file is no record, is damaged, or is of another model.
        """
        return files.load(Path(path), pipe, device)

    def text_embeddings(self, text: str | None = None, *, padding: bool = True) -> TokenEmbeddings:
        """The embeddings of the prompt (`text=None`), which need no pipeline, or of any other text (`encode`)."""
        if text is not None:
            return self.encode(text, padding=padding)
        prompt, rows = self.prompt_embeddings, self.prompt_embeddings.length
        return prompt if padding else replace(prompt, values=prompt.values[:rows], tokens=prompt.tokens[:rows])

    @staticmethod
    def _rows(maps: HeatMaps, embeddings: TokenEmbeddings) -> HeatMaps:
        """Cut the padding's rows off."""
        rows = embeddings.length
        return HeatMaps(maps.values[:rows], embeddings.tokens[:rows], embeddings.words)

    def __repr__(self) -> str:
        return (
            f"AttentionRecord({self.prompt!r}, grid={self.grid}, steps={len(self.timesteps)}, "
            f"layers={len(self.layers)}, {self.nbytes / 2**20:.1f} MiB)"
        )


def _names(embeddings: torch.Tensor | TokenEmbeddings) -> tuple:
    """Tokens and words of embeddings; bare tensors get numbers."""
    if isinstance(embeddings, TokenEmbeddings):
        return embeddings.tokens, embeddings.words
    return tuple(str(i) for i in range(len(embeddings))), ()


def require_same_model(records: Sequence[AttentionRecord]) -> None:
    """ValueError unless all records come from one model: the same layers with the same key weights."""
    first, *others = records
    for number, other in enumerate(others, start=1):
        difference = first.fingerprint.difference(other.fingerprint)
        if difference:
            raise ValueError(
                f"record {number} and record 0 have {difference}: their tokens cannot be mixed. Use "
                "records of one model, with the same LoRA"
            )
