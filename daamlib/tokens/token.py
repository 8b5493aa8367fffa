"""Optimised tokens: what `optimize_token` returns, and how it is kept on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..attention.fingerprint import Fingerprint
from ..attention.heatmaps import HeatMaps
from ..attention.record import AttentionRecord
from ..attention.text import Word
from ..io import atomic_write

FORMAT = "daamlib-token-1"


@dataclass(frozen=True, eq=False)
class OptimizedToken:
    """Text embeddings fitted to masks, which read any image of the same model (thesis: x-hat, X-hat').

    embedding: (m, d_text) float32 on the CPU; `maps` takes it to the record. LDAAM: one row a word (and one of the
    background, if asked for). DAAM: the whole text. words: the names of the K maps. rows: K tuples, the rows of
    `embedding` averaged to each word's map.
    scale, bias: K numbers; sigmoid(scale * map + bias) is the calibrated probability (see `probabilities`).
    losses: the objective at every evaluation. gradient_norm: of the objective where it stopped, for steps as long as
    the initial token. seconds: of the optimisation alone.
    info: what made it (model, prompts, text, loss, optimiser, weight decay, seed ...), JSON's own types.
    """

    embedding: torch.Tensor
    method: str
    words: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_norm: float
    seconds: float
    info: Mapping[str, Any] = field(default_factory=dict)

    def maps(self, record: AttentionRecord) -> HeatMaps:
        """The K maps of another image of the same model, (K, H, W), looked up by word.

        Raises ValueError if the record is of a model with other cross-attention keys.
        """
        self.require_model(record.fingerprint)
        maps = record.ldaam_from(self.embedding) if self.method == "ldaam" else record.daam_from(self.embedding)
        values = torch.stack([maps.values[list(rows)].mean(dim=0) for rows in self.rows])
        return named_maps(values, self.words)

    def probabilities(self, record: AttentionRecord, words: Sequence[str] | None = None) -> torch.Tensor:
        """(K, H, W) in [0, 1]: the maps of `words` (default: all) through the scale and bias learned with the token.

        A softmax between these words where the token was fitted with one (`joint`), else a sigmoid each. Maps are
        sums over the steps: those of another number of steps than the token was fitted to are scaled to it.

        Raises ValueError for a word that is not the token's, a token fitted with `loss="cross_entropy"`, which learns
        no scale and bias, or a record of another model.
        """
        require_calibrated(self)
        words = self.words if words is None else words
        if set(words) - set(self.words):
            raise ValueError(f"the token has the words {list(self.words)}, got {list(words)}")
        rows = [self.words.index(word) for word in words]
        values = self.maps(record).values[rows]
        scale, bias = (torch.tensor(numbers)[rows].view(-1, 1, 1) for numbers in (self.scale, self.bias))
        steps, passes = len(record.timesteps), self.info.get("passes", ())
        if passes and steps not in passes:
            scale = scale * sum(passes) / len(passes) / steps
        logits = scale.to(values) * values + bias.to(values)
        return logits.softmax(dim=0) if self.info.get("joint") else logits.sigmoid()

    def require_model(self, fingerprint: Fingerprint) -> None:
        """ValueError unless the token was fitted on the model of this fingerprint, of a record or a pipeline."""
        own = self.info.get("fingerprint")  # a token that was made by hand has none
        difference = Fingerprint(own).difference(fingerprint) if own else None
        if difference:
            raise ValueError(
                f"the token of {', '.join(self.words)} was optimised on another model: the two have {difference}. "
                "Optimise one for this model, with the same LoRA"
            )

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file, all but the embedding as JSON in its header, whole or not at all."""
        path = Path(path)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "embedding"}
        header = json.dumps({"format": FORMAT, **fields})
        embedding = self.embedding.detach().cpu().contiguous().clone()
        with atomic_write(path) as temporary:
            save_file({"embedding": embedding}, temporary, metadata={"daamlib": header})

    @classmethod
    def load(cls, path: str | Path) -> "OptimizedToken":
        """Read a saved token. Raises FileNotFoundError, or ValueError if the file is none or is damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no optimised token at {path}")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["daamlib"])
                embedding = file.get_tensor("embedding").clone()  # aligned: products round the same as before saving
            if header.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            for name in ("words", "scale", "bias", "losses"):
                header[name] = tuple(header[name])
            header["rows"] = tuple(tuple(rows) for rows in header["rows"])
            token = cls(embedding, **header)
            count = len(token.words)
            if embedding.ndim != 2 or not len(token.rows) == len(token.scale) == len(token.bias) == count > 0:
                raise ValueError(f"its parts do not fit: embedding {tuple(embedding.shape)}, words {token.words}")
            if max(max(rows) for rows in token.rows) >= len(embedding):
                raise ValueError(f"its rows {token.rows} are not those of {len(embedding)} embeddings")
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable optimised token, or is damaged: {error}") from error
        return token

    def __repr__(self) -> str:
        last = f"{self.losses[-1]:.4g}" if self.losses else "none"
        return (
            f"OptimizedToken({list(self.words)}, {self.method}, {tuple(self.embedding.shape)}, loss {last}, "
            f"gradient norm {self.gradient_norm:.1e})"
        )


def named_maps(values: torch.Tensor, words: tuple[str, ...]) -> HeatMaps:
    """(K, H, W) maps that are looked up by `words`, one row each."""
    return HeatMaps(values, words, tuple(Word(word, row, row + 1) for row, word in enumerate(words)))


def require_calibrated(token: OptimizedToken) -> None:
    """ValueError for a token that was fitted without a scale and a bias."""
    if token.info.get("loss") == "cross_entropy":
        raise ValueError(
            f'the token of {", ".join(token.words)} was fitted with loss="cross_entropy", which learns no scale and '
            'bias, so it has no probabilities: use loss="bce" or "dice"'
        )
