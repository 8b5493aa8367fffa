"""The record of one image: everything any later text needs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from . import record_file
from .daam import daam
from .fingerprint import Fingerprint, placed
from .heatmaps import HeatMaps, upsample
from .layers import Layer
from .ldaam import LinearMap, NormedLinearMap, collapse
from .pictures import overlay
from .readers import fingerprint_of, reader_of
from .readers.words import CHECK_TEXT
from .self_attention import SelfAttention
from .softmax import MAX_BYTES
from .text import TokenEmbeddings, check_embeddings
from .weak import Weakly

ENCODER_TOLERANCE = 0.01  # of the prompt's embeddings, between float16 or float32 calls of one text encoder
ROUGH_TOLERANCE = 0.05  # where a call is in bfloat16, or its precision cannot be read off the embeddings


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """The cross-attention of one image, from `trace`, `trace_image` or `load`.

    Attributes:
        prompt: the text that the passes read (thesis: X), the negative one of the unconditional branch; None if it was
            given as embeddings.
        prompt_embeddings: the prompt's embeddings as the denoiser saw them, padding included (d_text wide).
        timesteps: of each pass of the denoiser, in order; some schedulers repeat one.
        layers: see `Layer`.
        branch: the half of classifier-free guidance that was read.
        stream: the text that was read, where the denoiser is given several; else None.
        texts: the further texts whose DAAM is kept in `Layer.maps`.
        self_attention: what `refine` propagates maps along, if the trace was asked to keep it.
        kept_map: what a record that was `collapsed` reads LDAAM from; else None.
        embedded_with: the arguments of `encode_prompt` that the prompt was embedded with, such as `clip_skip`.
        masked: whether a mask left padding out of the passes' softmax; then it is left out of later texts', too.
        encoder_check: of a prompt that was given as embeddings, those of `readers.words.CHECK_TEXT` by the text encoder
            as it was while generating; None where it could not be asked.
        pipe: embeds further texts. A record does not keep its pipeline alive, and copies and pickles are without it:
            None once nothing else holds it, and of a record that was loaded without one. See `with_pipe`.
    """

    prompt: str | None
    prompt_embeddings: TokenEmbeddings
    timesteps: list[float]
    layers: tuple[Layer, ...]
    branch: str = "conditional"
    stream: str | None = None
    texts: Mapping[str, TokenEmbeddings] = field(default_factory=dict)
    self_attention: SelfAttention | None = None
    kept_map: LinearMap | None = None
    embedded_with: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False
    encoder_check: torch.Tensor | None = None
    pipe: Any = Weakly()

    def __getstate__(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "pipe"}

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the largest cross-attention map, which all maps are up-sampled to."""
        return max((layer.grid for layer in self.layers), key=lambda grid: grid[0] * grid[1])

    @property
    def d_text(self) -> int:
        """The width of the text embeddings."""
        return self.layers[0].to_k.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the record's tensors lie, and its maps are computed."""
        return self.layers[0].to_k.weight.device

    @property
    def summands(self) -> int:
        """How many terms a map sums in a cell: heads x layers x passes. DAAM of all tokens sums to it, with padding."""
        return len(self.timesteps) * sum(layer.heads for layer in self.layers)

    def layer_names(self) -> list[str]:
        """Return the names of the attentions that are read.

        record.layer_names()[-1]  # "up_blocks...."
        """
        return [layer.name for layer in self.layers]

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells the model that made the record from others, by the key weights it was made with."""
        return Fingerprint.of_keys({layer.name: layer.project for layer in self.layers}, self.d_text)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored of the image, and of its `linear_map` once that was computed.

        The key weights, which the records of a trace share, come on top.
        """
        linear = self.kept_map or vars(self).get("_linear_map")
        return sum(part.nbytes for part in (*self.layers, self.self_attention, linear) if part is not None)

    def with_pipe(self, pipe: Any) -> "AttentionRecord":
        """Return the record with a pipeline that embeds further texts, which the caller keeps alive.

            record = daamlib.AttentionRecord.load("car.safetensors").with_pipe(pipe)
            record.daam("a tree")

        Raises ValueError for a pipeline of another model.
        """
        return replace(placed(self, "this record", pipe, self.device, self._fingerprint_of), pipe=pipe)

    def _fingerprint_of(self, pipe: Any) -> Fingerprint:
        """Measure a pipeline's model at the LoRA scale of this record's passes."""
        scale = self.embedded_with.get("lora_scale")
        return fingerprint_of(pipe, middle=True, stream=self.stream, lora_scale=1.0 if scale is None else scale)

    def encode(self, text: str, *, padding: bool = False) -> TokenEmbeddings:
        """Embed any text with the model's own text encoder, as the prompt was (`embedded_with`).

            record.encode("a traffic light")["traffic light"]  # (tokens, d_text)

        Args:
            text: any words.
            padding: whether to keep the rows up to the context length.

        Returns:
            (m, d_text) values on the record's device, wherever the pipeline is, and their tokens: m = 2 + number of
            tokens (start and end token included), or the context length.

        Raises:
            TypeError: `text` is no string.
            ValueError: it is too long, the record has no pipeline (any more), or the pipeline embeds the prompt in
                another way than while generating, as after a LoRA was unloaded.
        """
        pipe = self.pipe
        if pipe is None:
            raise ValueError(
                "this record has no text encoder: load it with AttentionRecord.load(path, pipe=pipe), or use "
                "record.with_pipe(pipe), and keep `pipe` (a record does not keep its pipeline alive, its copies and "
                "pickles are without it); or give embeddings to daam_from / ldaam_from"
            )
        reader = reader_of(pipe, stream=self.stream)
        embeddings = reader.encode(text, padding=padding, options=self.embedded_with)
        self._require_text_encoder(reader)
        return replace(embeddings, values=embeddings.values.to(self.device))

    def _require_text_encoder(self, reader: Any) -> None:
        """ValueError if the prompt, or the check text, embedded again has other embeddings than while generating.

        What the encoder computes is compared, not its weights: a LoRA, its scale, a copied average of weights or a
        textual inversion may change it without a trace in them.
        """
        text, given = self.prompt, self.prompt_embeddings
        if self.encoder_check is not None:
            text, given = CHECK_TEXT, TokenEmbeddings.unnamed(self.encoder_check)
        if text is None:
            return
        rows, count = given.rows, len(given.tokens)
        own, now = given.values[rows], reader.embed(text, self.embedded_with)
        # a reader's embeddings end with the text or with its padding; a mask may have left out rows of the record's
        places = [now[rows]] if len(now) == count else [now[: len(rows)], now[-len(rows) :]]
        errors = [(found.to(own.device).float() - own.float()).norm() for found in places if len(found) == len(own)]
        error = min(errors) / own.float().norm() if errors else 1.0
        rough = reader.rough or any(torch.equal(each.bfloat16().to(each), each) for each in (own, now))
        if not error <= (ROUGH_TOLERANCE if rough else ENCODER_TOLERANCE):
            raise ValueError(
                "the pipeline's text encoder is not the one that embedded this record's prompt, whose embeddings "
                f"differ by {error:.1%} now: a new text would not fit the record's keys. Was a LoRA loaded, unloaded "
                "or scaled since, were weights averaged, a textual inversion replaced, or the prompt's embeddings "
                "weighted? Bring the pipeline back to what it was, or give embeddings to daam_from / ldaam_from"
            )

    def daam(self, text: str | None = None, *, padding: bool = True) -> HeatMaps:
        """Return DAAM of the prompt, or of any other text (OV-DAAM, thesis: D(X')), see `daamlib.attention.daam`.

            record.daam()["car"]  # a word of the prompt, (H, W)
            record.daam("a car and a tree")["tree"]

        Args:
            text: None for the prompt itself. A record made with `store="maps"` knows the texts that `trace` was given.
            padding: with it the softmax is over the whole context, as while generating; without, over the text's own
                tokens (as OVAM).

        Returns:
            (m, H, W) maps of start token ... end token, up-sampled to `grid`, summed over steps, layers and heads.

        Raises:
            ValueError: the record does not hold what the text needs (`store="linear"`), or see `encode`.
        """
        if self.layers[0].queries is None and self.layers[0].maps:
            return self._kept_maps(text, padding)
        embeddings = self.text_embeddings(text, padding=padding)
        return _without_padding(self.daam_from(embeddings), embeddings)

    def _kept_maps(self, text: str | None, padding: bool) -> HeatMaps:
        key = None if text == self.prompt else text
        if (key is not None and key not in self.texts) or not padding:
            raise ValueError(
                f'this record was made with store="maps" and keeps DAAM, with padding, of '
                f"{[self.prompt, *self.texts]}; got {text!r} with padding={padding}: "
                'name the text in trace(pipe, store="maps", texts=...), or use '
                'store="queries"'
            )
        embeddings = self.prompt_embeddings if key is None else self.texts[key]
        maps = functools.reduce(torch.add, [upsample(layer.maps[key], self.grid) for layer in self.layers])
        return _without_padding(_named(self.finite(maps), embeddings), embeddings)

    def overlay(self, word: str, image: Any, *, text: str | None = None, opacity: float = 0.65) -> Image.Image:
        """Return the image under DAAM of a word of the prompt, or of `text`.

            record.overlay("car", image).save("car.png")
            record.overlay("tree", image, text="a car and a tree").save("tree.png")

        Raises what `daam` and `pictures.overlay` raise.
        """
        return overlay(image, self.daam(text)[word], opacity=opacity)

    def ldaam(self, text: str | None = None) -> HeatMaps:
        """Return linear DAAM of a text (None: the prompt): the same sums without the softmax (thesis: LD(x)).

        record.ldaam("traffic light")["traffic light"]  # (H, W)
        """
        return self.ldaam_from(self.text_embeddings(text, padding=False))

    def daam_from(self, embeddings: torch.Tensor | TokenEmbeddings, *, max_bytes: int = MAX_BYTES) -> HeatMaps:
        """Return DAAM of (m, d_text) embeddings, the softmax over exactly these m; differentiable in them.

            embeddings = record.encode("a car and a tree")
            record.daam_from(embeddings)["car"]  # (H, W)

        `max_bytes` bounds the attention probabilities held at a time. Raises ValueError for another width, or if the
        record holds no queries (`store="linear"`).
        """
        if self.layers[0].queries is None:
            raise ValueError(
                'DAAM needs the queries of every step, this record holds none (it was made with store="linear" or '
                '"maps", or collapsed): trace with store="queries", or use ldaam'
            )
        values = check_embeddings(embeddings, self.d_text, self.device)
        return _named(self.finite(daam(self.layers, values, self.grid, max_bytes), values), embeddings)

    def ldaam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Return linear DAAM of (m, d_text) embeddings, differentiable in them. Raises ValueError for another width.

        record.ldaam_from(record.encode("car")["car"]).values  # (tokens, H, W)
        """
        values = check_embeddings(embeddings, self.d_text, self.device)
        return _named(self.finite(self._linear_map(values), values), embeddings)

    def linear_map(self) -> LinearMap | NormedLinearMap:
        """Return LDAAM collapsed to one tensor (H, W, d_text), computed once; `daamlib.attention.ldaam` derives it.

            record.linear_map()(record.encode("car")["car"])  # (tokens, H, W)

        Of a model that normalises its keys, to one tensor a layer. It is a copy, free to be changed.
        """
        return self._linear_map.clone()

    def finite(self, maps: torch.Tensor, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Return maps that were read from this record with these embeddings.

        Raises ValueError if they hold NaN or infinite values, naming the layer and the step where these begin.
        """
        if maps.isfinite().all():
            return maps
        if embeddings is not None and not embeddings.isfinite().all():
            raise ValueError("the text's embeddings hold NaN or infinite values: look at the text encoder's dtype")
        begins = {layer.name: layer.first_not_finite() for layer in self.layers}
        name = min(begins, key=lambda layer: begins[layer])
        where = f"in {name}" if begins[name] < math.inf else "in no single layer, but in their products"
        if begins[name] < math.inf and self.layers[0].queries is not None:
            where += f" at step {begins[name]} (timestep {self.timesteps[int(begins[name])]})"
        raise ValueError(
            f"the maps hold NaN or infinite values, which begin {where}: the attention overflowed there, as in "
            "float16. Generate the image in bfloat16 or float32"
        )

    @functools.cached_property
    @torch.inference_mode(False)  # it is kept, and a tensor of inference mode can never be differentiated through
    def _linear_map(self) -> LinearMap | NormedLinearMap:
        linear = collapse(self.layers, self.grid) if self.kept_map is None else self.kept_map
        for part in linear.maps if isinstance(linear, NormedLinearMap) else (linear,):
            self.finite(part.weight)
        return linear

    def collapsed(self) -> "AttentionRecord":
        """Return a record with the `linear_map` in the place of the layers' queries, their sums and maps.

            record.collapsed().ldaam("car")

        Of many layers of one grid that is much smaller: of PixArt-Sigma at 1024 px 19 MB in the place of the 528 MB of
        `store="linear"`. It reads LDAAM and its tokens as before. There is no DAAM, and no layer, step or head can be
        chosen any more. Raises ValueError for a model that normalises its keys: its map is as large as the sums.
        """
        linear = self._linear_map
        if not isinstance(linear, LinearMap):
            raise ValueError(
                "this model normalises its keys, so that its layers do not collapse to one map: keep the record as it "
                'is, with store="linear"'
            )
        layers = tuple(replace(layer, queries=None, query_sum=None, maps={}) for layer in self.layers)
        return replace(self, layers=layers, texts={}, kept_map=linear)

    def refine(self, heat_maps: HeatMaps, *, iterations: int = 1) -> HeatMaps:
        """Propagate maps along the image's self-attention, so that the parts of an object share their values.

            record.refine(record.daam())["car"]

        M <- A M, `iterations` times, on the self-attention's grid (`daamlib.attention.self_attention`). A map keeps its
        range, and a constant map stays constant. Differentiable in the maps.

        Args:
            heat_maps: (m, H, W) on the record's grid, such as `daam`'s, or probabilities as HeatMaps.
            iterations: how often; one is mostly best (notebook 08).

        Returns:
            New maps of the same tokens, (m, H, W).

        Raises:
            ValueError: the record holds no self-attention, the maps are of another grid, or iterations is below 1.
        """
        attention = self.self_attention
        if attention is None:
            raise ValueError("this record holds no self-attention: trace with self_attention=True")
        if tuple(heat_maps.values.shape[1:]) != self.grid:
            raise ValueError(f"expected maps of the record's grid {self.grid}, got {tuple(heat_maps.values.shape[1:])}")
        if iterations < 1:
            raise ValueError(f"iterations must be 1 or more, got {iterations}")
        maps = F.adaptive_avg_pool2d(heat_maps.values[None], attention.grid)[0].flatten(1)
        for _ in range(iterations):
            maps = attention.propagate(maps)
        if not maps.isfinite().all() and heat_maps.values.isfinite().all():
            raise ValueError(
                "the self-attention holds NaN or infinite values, it overflowed as in float16: generate the image in "
                "bfloat16 or float32"
            )
        return replace(heat_maps, values=upsample(maps.unflatten(1, attention.grid), self.grid))

    def select(
        self,
        *,
        layers: Callable[[Layer], bool] | None = None,
        steps: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> "AttentionRecord":
        """Return a record of only some layers, steps and heads, for looking into the sum.

            record.select(layers=lambda layer: layer.name.startswith("up_blocks"), steps=[0]).daam()["car"]

        Steps and heads are given by number. Maps keep the full `grid` only while a layer of that grid is left. Raises
        ValueError if nothing is left, if the record is `collapsed`, or holds no steps but their sum.
        """
        if self.kept_map is not None:
            raise ValueError(
                "this record was collapsed to one map: its layers, steps and heads cannot be taken apart. Select before"
            )
        kept = [layer for layer in self.layers if layers is None or layers(layer)]
        if not kept or (steps is not None and not len(steps)) or (heads is not None and not len(heads)):
            names = [f"{layer.name} {layer.grid}" for layer in self.layers]
            raise ValueError(f"nothing is left of {len(self.timesteps)} steps and the layers {names}")
        if steps is not None and kept[0].queries is None:
            raise ValueError('steps cannot be taken apart: this record holds sums, made with store="linear" or "maps"')
        return replace(
            self,
            layers=tuple(layer.select(steps, heads) for layer in kept),
            timesteps=self.timesteps if steps is None else [self.timesteps[step] for step in steps],
        )

    def to(self, device: str | torch.device) -> "AttentionRecord":
        """Return the record with all its tensors on `device`, where its maps are then computed; the pipeline stays.

        record.to("cpu").daam()["car"].numpy()
        """
        device = torch.device(device)
        return replace(
            self,
            prompt_embeddings=self.prompt_embeddings.to(device),
            encoder_check=None if self.encoder_check is None else self.encoder_check.to(device),
            layers=tuple(layer.to(device) for layer in self.layers),
            texts={text: embeddings.to(device) for text, embeddings in self.texts.items()},
            self_attention=None if self.self_attention is None else self.self_attention.to(device),
            kept_map=None if self.kept_map is None else self.kept_map.to(device),
        )

    def text_embeddings(self, text: str | None = None, *, padding: bool = True) -> TokenEmbeddings:
        """Return the embeddings of the prompt (None, or its words), which need no pipeline, or of any other text."""
        if text is None or text == self.prompt:
            prompt = self.prompt_embeddings
            return replace(prompt, values=prompt.values.clone()) if padding else prompt.without_padding()
        return self.encode(text, padding=padding and not self.masked)

    def save(self, path: str | Path) -> None:
        """Write the record to one `.safetensors` file; a file of that name is replaced only when all is written.

        record.save("car.safetensors")
        again = daamlib.AttentionRecord.load("car.safetensors", pipe=pipe)
        """
        record_file.write(self, path)

    @classmethod
    @torch.inference_mode(False)  # its tensors may be differentiated through wherever it was loaded
    def load(cls, path: str | Path, *, pipe: Any = None, device: str | torch.device | None = None) -> "AttentionRecord":
        """Read a saved record, as `save` shows.

        Args:
            path: of the file.
            pipe: the pipeline that made it, which lets it embed further texts.
            device: where its tensors go and its maps are computed; None: where `pipe` computes, without one the CPU.

        Returns:
            The record.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no record, is damaged, or is of another model.
        """
        record = record_file.read(path, cls)
        return replace(placed(record, path, pipe, device, record._fingerprint_of), pipe=pipe)

    def __repr__(self) -> str:
        return (
            f"AttentionRecord({self.prompt!r}, grid={self.grid}, steps={len(self.timesteps)}, "
            f"layers={len(self.layers)}, {self.nbytes / 2**20:.1f} MiB)"
        )


def _named(maps: torch.Tensor, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
    """The maps with the tokens and words of their embeddings; bare tensors get numbers."""
    if isinstance(embeddings, TokenEmbeddings):
        return HeatMaps(maps, embeddings.tokens, embeddings.words)
    return HeatMaps.unnamed(maps)


def _without_padding(maps: HeatMaps, embeddings: TokenEmbeddings) -> HeatMaps:
    named = embeddings.without_padding()
    return HeatMaps(maps.values[embeddings.rows], named.tokens, named.words)


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
