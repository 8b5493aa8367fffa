"""Optimised tokens: what `optimize_token` returns, and how it is kept on disk."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from ..attention.fingerprint import Fingerprint
from ..attention.heatmaps import HeatMaps, upsample
from ..attention.joint.record import JointRecord
from ..attention.record import AttentionRecord
from ..io import load_dataclass, save_dataclass
from .inputs import query_features, select_part, select_steps

FORMAT = "daamlib-token-3"
FILE = "token.safetensors"  # in a repository of the hub

# of a repository on the hub
CARD = """---
library_name: daamlib
tags:
  - daamlib
  - text-embedding
  - semantic-segmentation
---

# {words}

An optimised token: it reads {words} in the attention of the diffusion model `{model}`.

```python
from daamlib import OptimizedToken

token = OptimizedToken.from_pretrained("{repo_id}")
maps = token.maps(record)  # of an image that this model generated
```
"""


@dataclass(frozen=True, eq=False)
class OptimizedToken:
    """Text embeddings fitted to masks, which read any image of the same model (thesis: x-hat, X-hat').

    Attributes:
        embedding: float32 on the CPU; `maps` takes it to the record. LDAAM: one row a word (and one of the background,
            if asked for). DAAM: the whole text.
        method: "ldaam" or "daam"; "probe" of `optimize_probe` and "keys" of `fit_classes`, whose rows hold a vector for
            each layer, which no text encoder makes.
        words: The names of the K maps.
        rows: K tuples, the rows of `embedding` averaged to each word's map.
        scale: K numbers; sigmoid(scale * map + bias) is the calibrated probability (see `probabilities`).
        bias: K numbers.
        losses: The objective at every iteration, and where it stopped.
        gradient_norm: Of the objective where it stopped, for steps as long as the initial token.
        seconds: Of the optimisation alone.
        info: What made it (model, prompts, text, loss, optimiser, weight decay, seed ...) and what it reads (layers,
            max_timestep), of JSON's own types.
    """

    embedding: Float[torch.Tensor, "m d_text"]
    method: str
    words: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_norm: float
    seconds: float
    info: Mapping[str, Any] = field(default_factory=dict)

    def maps(self, record: AttentionRecord | JointRecord) -> HeatMaps:
        """The maps of an image of the same model, of the layers and steps that the token was fitted to.

        Args:
            record: Of any image, by any prompt; of a joint model for the method "probe", and with its pipeline.

        Returns:
            (K, H, W) maps at the record's grid, looked up by word.

        Raises:
            TypeError: The record is not of the kind that the method reads.
            ValueError: The record is of another model, or does not hold the steps that the token reads.
        """
        if isinstance(record, JointRecord) != (self.method == "probe"):
            raise TypeError(f"a token of the method {self.method!r} does not read a {type(record).__name__}")
        self.require_model(record.fingerprint)
        if isinstance(record, JointRecord):
            return HeatMaps.of_words(record.probe_map(self.info.get("layers"))(self.embedding), self.words)
        part = select_part(record, self.info.get("layers"), self.info.get("max_timestep"))
        if self.method == "keys":
            values = query_features(part, record.grid) @ self.embedding.to(part.device).T
            return HeatMaps.of_words(values.T.unflatten(1, record.grid), self.words)
        maps = part.ldaam_from(self.embedding) if self.method == "ldaam" else part.daam_from(self.embedding)
        values = torch.stack([maps.values[list(rows)].mean(dim=0) for rows in self.rows])
        return HeatMaps.of_words(upsample(values, record.grid), self.words)

    def probabilities(
        self, record: AttentionRecord | JointRecord, words: Sequence[str] | None = None
    ) -> Float[torch.Tensor, "k height width"]:
        """The probabilities that the scale and bias learned with the token make of its maps.

        Args:
            record: Of any image, by any prompt.
            words: Those of the token to read, by default all.

        Returns:
            (k, H, W) in [0, 1], one map a word: a softmax between these words where the token was fitted with one
            (`multiclass`), else a sigmoid each.

        Raises:
            ValueError: The record is of another model, a word is not the token's, or the token was fitted with
                `loss="cross_entropy"`, which learns no scale and bias.
        """
        logits = self.logits(record, words)
        return logits.softmax(dim=0) if self.info.get("multiclass") else logits.sigmoid()

    def logits(
        self, record: AttentionRecord | JointRecord, words: Sequence[str] | None = None
    ) -> Float[torch.Tensor, "k height width"]:
        """The maps through the scale and bias that were learned with the token, before a sigmoid or a softmax.

        Maps are sums over the steps: those of another number of steps than the token was fitted to, which is the mean
        number of its images, are scaled to it.

        Args:
            record: Of any image, by any prompt.
            words: Those of the token to read, by default all.

        Returns:
            (k, H, W), one map a word; 0 is as probable as not.

        Raises:
            ValueError: See `probabilities`.
        """
        require_calibrated(self)
        words = self.words if words is None else words
        if set(words) - set(self.words):
            raise ValueError(f"the token has the words {list(self.words)}, got {list(words)}")
        rows = [self.words.index(word) for word in words]
        values = self.maps(record).values[rows]
        scale, bias = (torch.tensor(numbers)[rows].view(-1, 1, 1) for numbers in (self.scale, self.bias))
        passes, chosen = self.info.get("passes", ()), select_steps(record, self.info.get("max_timestep"))
        steps = len(record.timesteps if chosen is None else chosen)
        if passes and steps != sum(passes) / len(passes):
            scale = scale * sum(passes) / len(passes) / steps
        return scale.to(values) * values + bias.to(values)

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
        save_dataclass(path, self, FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "OptimizedToken":
        """Read a saved token.

        Args:
            path: Of the file that `save` wrote.

        Returns:
            The token, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, of an older format, or no token.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no optimised token at {path}")
        try:
            token = load_dataclass(cls, path, FORMAT)
            shape, count = tuple(token.embedding.shape), len(token.words)
            if len(shape) != 2 or not len(token.rows) == len(token.scale) == len(token.bias) == count > 0:
                raise ValueError(f"its parts do not fit: embedding {shape}, words {token.words}")
            if max(map(max, token.rows)) >= shape[0]:
                raise ValueError(f"its rows {token.rows} are not those of {shape[0]} embeddings")
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable optimised token, or is damaged: {error}") from error
        return token

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload the token, with a model card, to a repository of the Hugging Face hub, which is made if need be.

        All of `info` goes along: the training prompts, and the model's id or folder. Tested against a server on the
        same machine that answers as the hub does, never against the hub itself.

        Args:
            repo_id: As "name/car-token".
            private: Whether a new repository is private.
            revision: The branch, by default the main one.
            token: Of the hub's account; None for the one that `hf auth login` stored.

        Returns:
            The address of the commit. `huggingface_hub` raises what it finds wrong.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        card = CARD.format(words=", ".join(self.words), model=self.info.get("model", "unknown"), repo_id=repo_id)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            self.save(path)
            files = [CommitOperationAdd(FILE, path), CommitOperationAdd("README.md", card.encode())]
            message = f"Upload the token of {', '.join(self.words)}"
            commit = api.create_commit(repo_id, files, commit_message=message, revision=revision)
        return commit.commit_url

    @classmethod
    def from_pretrained(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> "OptimizedToken":
        """Read a token from the Hugging Face hub, or from the hub's cache on this machine; see `push_to_hub`.

        Args:
            repo_id: As "name/car-token".
            revision: A branch, tag or commit, by default the main branch.
            token: Of the hub's account, for a private repository.

        Returns:
            The token, on the CPU.

        Raises:
            ValueError: The file is damaged, of an older format, or no token. `huggingface_hub` raises what it finds
                wrong.
        """
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(repo_id, FILE, revision=revision, token=token))

    def __repr__(self) -> str:
        last = f"{self.losses[-1]:.4g}" if self.losses else "none"
        return (
            f"OptimizedToken({list(self.words)}, {self.method}, {tuple(self.embedding.shape)}, loss {last}, "
            f"gradient norm {self.gradient_norm:.1e})"
        )


def require_calibrated(token: OptimizedToken) -> None:
    """ValueError for a token that was fitted without a scale and a bias."""
    if token.info.get("loss") == "cross_entropy":
        raise ValueError(
            f'the token of {", ".join(token.words)} was fitted with loss="cross_entropy", which learns no scale and '
            'bias, so it has no probabilities: use loss="bce" or "dice"'
        )
