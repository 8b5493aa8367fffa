"""Optimised tokens: their maps and probabilities, and their files on disk and on the Hugging Face hub."""

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
from .inputs import query_features, select_part

FORMAT = "daamlib-token-3"
FILE = "token.safetensors"  # in a repository of the hub
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

        token = daamlib.optimize_token(records, masks, word="car")
        token.maps(record)["car"]  # (H, W)
        token.save("car-token.safetensors")

    Attributes:
        embedding: float32 on the CPU. LDAAM: one row a word (and one of the background, if there is one). DAAM: the
            whole text.
        method: "ldaam" or "daam"; "probe" of `optimize_probe` and "keys" of `fit_classes`, whose rows hold a vector for
            each layer, which no text encoder makes.
        words: names of the K maps.
        rows: K tuples, the rows of `embedding` averaged to each word's map.
        scale: K numbers; sigmoid(scale * map + bias) is the calibrated probability (see `probabilities`).
        bias: K numbers.
        losses: the objective at every iteration, and at the end.
        gradient_norm: length of the objective's gradient at the end, for steps as long as the initial token.
        seconds: duration of the optimisation alone.
        info: the fit's inputs (model, prompts, text, loss, optimiser, weight decay, seed ...) and the parts of a record
            that the token reads (layers, max_timestep), of JSON's own types.
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
        """Return the maps of an image of the same model, from the layers and steps that the token was fitted to.

            token.maps(record)["car"]  # (H, W) on the record's grid

        The record is a `JointRecord` with its pipeline for the method "probe". Raises TypeError for the other kind of
        record, ValueError for one of another model or without the steps that the token reads.
        """
        return HeatMaps.of_words(self._read(record)[0], self.words)

    def _read(self, record: Any) -> tuple[Float[torch.Tensor, "K H W"], int]:
        """The maps of a record, and the number of passes that they sum."""
        kind: type[Any] = JointRecord if self.method == "probe" else AttentionRecord
        if not isinstance(record, kind):
            raise TypeError(f"a token of the method {self.method!r} does not read a {type(record).__name__}")
        self.require_model(record.fingerprint)
        if self.method == "probe":
            return record.probe_map(self.info.get("layers"))(self.embedding), len(record.timesteps)
        part = select_part(record, self.info.get("layers"), self.info.get("max_timestep"))
        if self.method == "keys":
            values = query_features(part, record.grid, self.embedding).T
            return values.unflatten(1, record.grid), len(part.timesteps)
        of_rows = (part.ldaam_from if self.method == "ldaam" else part.daam_from)(self.embedding).values
        values = torch.stack([of_rows[list(rows)].mean(dim=0) for rows in self.rows])
        return upsample(values, record.grid), len(part.timesteps)

    def probabilities(
        self, record: AttentionRecord | JointRecord, words: Sequence[str] | None = None
    ) -> Float[torch.Tensor, "k height width"]:
        """Return the (k, H, W) probabilities of some words (None: all), by the scale and bias learned with the token.

            token.probabilities(record, ["car"])[0] > 0.5

        A softmax between these words if the token was fitted with one (`multiclass`), else a sigmoid each. Raises as
        `maps` does, and ValueError for a word that is not the token's, or a token fitted with `loss="cross_entropy"`,
        which learns no scale and bias.
        """
        logits = self.logits(record, words)
        return logits.softmax(dim=0) if self.info.get("multiclass") else logits.sigmoid()

    def logits(
        self, record: AttentionRecord | JointRecord, words: Sequence[str] | None = None
    ) -> Float[torch.Tensor, "k height width"]:
        """Return scale * map + bias, the probabilities before their sigmoid or softmax; arguments and errors as theirs.

            token.logits(record, ["car"])[0] > 0

        Maps are sums over the passes: those of another number of passes than the token was fitted to, which is the mean
        number of its images, are scaled to it.
        """
        require_calibrated(self)
        words = self.words if words is None else words
        if set(words) - set(self.words):
            raise ValueError(f"the token has the words {list(self.words)}, got {list(words)}")
        rows = [self.words.index(word) for word in words]
        maps, passes = self._read(record)
        values, fitted = maps[rows], self.info.get("passes", ())
        scale, bias = (torch.tensor(numbers)[rows].view(-1, 1, 1) for numbers in (self.scale, self.bias))
        if fitted and passes != sum(fitted) / len(fitted):
            scale = scale * sum(fitted) / len(fitted) / passes
        return scale.to(values) * values + bias.to(values)

    def require_model(self, fingerprint: Fingerprint) -> None:
        """Raise ValueError unless the token was fitted on the model of this fingerprint.

            token.require_model(record.fingerprint)
        It may be a record's or a pipeline's.
        """
        fitted = self.info.get("fingerprint")  # a token that was made by hand has none
        difference = Fingerprint(fitted).difference(fingerprint) if fitted else None
        if difference:
            raise ValueError(
                f"the token of {', '.join(self.words)} was optimised on another model: the two have {difference}. "
                "Optimise one for this model, with the same LoRA"
            )

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file, all but the embedding as JSON in its header.

            token.save("car-token.safetensors")
        It is complete or not there.
        """
        save_dataclass(path, self, FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "OptimizedToken":
        """Read a saved token, to the CPU.

            daamlib.OptimizedToken.load("car-token.safetensors")

        Raises FileNotFoundError if there is no such file, ValueError if it is damaged, of an older format, or no token.
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
        """Upload the token, with a model card, to a repository of the Hugging Face hub; return the commit's address.

        `repo_id` is as "name/car-token"; a new repository is made, `private` or not. `revision` is the branch (None:
        main), `token` that of the hub's account (None: the one of `hf auth login`). All of `info` is uploaded: the
        training prompts, and the model's id or folder. Tested against a server on the same machine that answers as the
        hub does, never against the hub itself. `huggingface_hub` raises its own errors.
        """
        from huggingface_hub import HfApi

        words, api = ", ".join(self.words), HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            card = CARD.format(words=words, model=self.info.get("model", "unknown"), repo_id=repo_id)
            Path(folder, "README.md").write_bytes(card.encode())
            self.save(Path(folder, FILE))
            message = f"Upload the token of {words}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
        return commit.commit_url

    @classmethod
    def from_pretrained(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> "OptimizedToken":
        """Read a token from the Hugging Face hub, or from the hub's cache on this machine, as `load` does.

        `revision` is a branch, tag or commit (None: the main branch); see `push_to_hub` for the others.
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
    """Raise ValueError for a token that was fitted without a scale and a bias."""
    if token.info.get("loss") == "cross_entropy":
        raise ValueError(
            f'the token of {", ".join(token.words)} was fitted with loss="cross_entropy", which learns no scale and '
            'bias, so it has no probabilities: use loss="bce" or "dice"'
        )
