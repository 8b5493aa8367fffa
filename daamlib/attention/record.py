"""The record of one image: everything any later text needs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from .daam import daam
from .fingerprint import Fingerprint
from .heatmaps import HeatMaps, upsample
from .image_record import ImageRecord
from .layers import Layer
from .ldaam import LinearMap, NormedLinearMap, collapse
from .readers import fingerprint_of, reader_of
from .readers.words import CHECK_TEXT
from .self_attention import SelfAttention
from .softmax import MAX_BYTES
from .text import TokenEmbeddings, check_embeddings

ENCODER_TOLERANCE = 0.01  # of the prompt's embeddings, between float16 or float32 calls of one text encoder
ROUGH_TOLERANCE = 0.05  # where a call is in bfloat16, or its precision cannot be read off the embeddings


@dataclass(frozen=True, eq=False)
class AttentionRecord(ImageRecord):
    """The cross-attention of one image, from `trace`, `trace_image` or `load`.

        record.daam()["car"]  # (H, W): where the image's positions attend to the word
        record.daam("a tree and a road")["tree"]  # of any other text

    `ImageRecord` says what its further fields hold.
    """

    layers: tuple[Layer, ...]
    branch: str = "conditional"  # the half of classifier-free guidance that was read
    stream: str | None = None  # the text that was read, where the denoiser is given several
    texts: Mapping[str, TokenEmbeddings] = field(default_factory=dict)  # whose DAAM is stored in `Layer.maps`
    self_attention: SelfAttention | None = None  # what `refine` propagates maps along, if `trace` was asked for it
    kept_map: LinearMap | None = None  # of a record that was `collapsed`, what it reads LDAAM from

    FORMAT: ClassVar[str] = "daamlib-record-3"

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the largest cross-attention map, which all maps are up-sampled to."""
        return max((layer.grid for layer in self.layers), key=math.prod)

    @property
    def d_text(self) -> int:
        """The width of the text embeddings."""
        return self.layers[0].to_k.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the record's tensors, where its maps are computed."""
        return self.layers[0].to_k.weight.device

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the model that made the record, by the key weights it was made with."""
        return Fingerprint.of_keys({layer.name: layer.project for layer in self.layers}, self.d_text)

    def fingerprint_of(self, pipe: Any) -> Fingerprint:
        """Measure a pipeline's model at the LoRA scale of this record's passes."""
        scale = self.embedded_with.get("lora_scale")
        return fingerprint_of(pipe, middle=True, stream=self.stream, lora_scale=1.0 if scale is None else scale)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored of the image, and of its `linear_map` once that was computed.

        The key weights, which the records of a trace share, come on top.
        """
        linear = self.kept_map or vars(self).get("_linear_map")
        return sum(part.nbytes for part in (*self.layers, self.self_attention, linear) if part is not None)

    def encode(self, text: str, *, padding: bool = False) -> TokenEmbeddings:
        """Embed any text with the model's own text encoder, as the prompt was (`embedded_with`).

            record.encode("a traffic light")["traffic light"]  # (tokens, d_text)

        The values are (m, d_text) on the record's device: start token ... end token, with `padding` all rows of the
        context. Raises TypeError if `text` is no string; ValueError if it is too long, the record has no pipeline (any
        more), or the pipeline embeds the prompt in another way than while generating, as after a LoRA was unloaded.
        """
        pipe = self.require_pipe("or give embeddings to daam_from / ldaam_from")
        reader = reader_of(pipe, stream=self.stream)
        embeddings = reader.encode(text, padding=padding, options=self.embedded_with)
        if self.encoder_check is not None:
            _require_same_encoder(TokenEmbeddings.unnamed(self.encoder_check), CHECK_TEXT, reader, self.embedded_with)
        elif self.prompt is not None:
            _require_same_encoder(self.prompt_embeddings, self.prompt, reader, self.embedded_with)
        return embeddings.to(self.device)

    def daam(self, text: str | None = None, *, padding: bool = True) -> HeatMaps:
        """Return DAAM of the prompt, or of any other text (OV-DAAM, thesis: D(X')), see `daamlib.attention.daam`.

            record.daam()["car"]  # a word of the prompt, (H, W)
            record.daam("a car and a tree")["tree"]

        Maps are (m, H, W), of start token ... end token, up-sampled to `grid`, summed over steps, layers and heads.
        With `padding` the softmax is over the whole context, as while generating; without, over the text's own tokens
        (as OVAM). Raises ValueError if the record does not hold what the text needs (`store`), or as `encode`.
        """
        if self.layers[0].queries is None and self.layers[0].maps:
            maps, embeddings = self._stored_maps(text, padding)
        else:
            embeddings = self.text_embeddings(text, padding=padding)
            maps = self.daam_from(embeddings).values
        named = embeddings.without_padding()
        return HeatMaps(maps[embeddings.rows], named.tokens, named.words)

    def _stored_maps(self, text: str | None, padding: bool) -> tuple[torch.Tensor, TokenEmbeddings]:
        """Return DAAM that a trace with `store="maps"` computed, and the text's embeddings."""
        known: dict[str | None, TokenEmbeddings] = {self.prompt: self.prompt_embeddings}
        known |= {name: embeddings for name, embeddings in self.texts.items() if name != self.prompt}
        text = self.prompt if text is None else text
        if text not in known or not padding:
            raise ValueError(
                f'this record was made with store="maps" and keeps DAAM, with padding, of {list(known)}; got {text!r} '
                f'with padding={padding}: name the text in trace(pipe, store="maps", texts=...), or use store="queries"'
            )
        number = 0 if text == self.prompt else 1 + list(self.texts).index(text or "")
        maps = functools.reduce(torch.add, [upsample(layer.maps[number], self.grid) for layer in self.layers])
        return self.finite(maps), known[text]

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
        return HeatMaps.of(self.finite(daam(self.layers, values, self.grid, max_bytes), values), embeddings)

    def ldaam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Return linear DAAM (thesis: LD(x)) of (m, d_text) embeddings: the sums of DAAM without the softmax.

            record.ldaam_from(record.encode("car")["car"]).values  # (tokens, H, W), differentiable in the embeddings

        Raises ValueError for another width.
        """
        values = check_embeddings(embeddings, self.d_text, self.device)
        return HeatMaps.of(self.finite(self._linear_map(values), values), embeddings)

    def linear_map(self) -> LinearMap | NormedLinearMap:
        """Return LDAAM collapsed to one tensor (H, W, d_text), computed once; `daamlib.attention.ldaam` derives it.

            record.linear_map()(record.encode("car")["car"])  # (tokens, H, W)

        Of a model that normalises its keys, to one tensor a layer. It is a copy.
        """
        return self._linear_map.clone()

    @functools.cached_property
    @torch.inference_mode(False)  # a tensor of inference mode can never be differentiated through
    def _linear_map(self) -> LinearMap | NormedLinearMap:
        linear = collapse(self.layers, self.grid) if self.kept_map is None else self.kept_map
        for part in linear.maps if isinstance(linear, NormedLinearMap) else (linear,):
            self.finite(part.weight)
        return linear

    def finite(self, maps: torch.Tensor, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Return maps that were read from this record with these embeddings.

        Raises ValueError, naming the layer and the step where they begin, for NaN or infinite values.
        """
        if maps.isfinite().all():
            return maps
        if embeddings is not None and not embeddings.isfinite().all():
            raise ValueError("the text's embeddings hold NaN or infinite values: look at the text encoder's dtype")
        raise ValueError(
            f"the maps hold NaN or infinite values, which begin {_where_not_finite(self.layers, self.timesteps)}: the "
            "attention overflowed there, as in float16. Generate the image in bfloat16 or float32"
        )

    def collapsed(self) -> Self:
        """Return a record with the `linear_map` in the place of the layers' queries, their sums and maps.

            record.collapsed().ldaam("car")

        Of many layers of one grid that is much smaller: of PixArt-Sigma at 1024 px 19 MB in the place of the 528 MB of
        `store="linear"`. It reads LDAAM and its tokens, but no DAAM, and nothing can be selected. Raises ValueError for
        a model that normalises its keys: its map is as large as the sums.
        """
        linear = self._linear_map
        if not isinstance(linear, LinearMap):
            raise ValueError('this model normalises its keys: its layers do not collapse, keep store="linear" as it is')
        layers = tuple(replace(layer, queries=None, query_sum=None, maps=()) for layer in self.layers)
        return replace(self, layers=layers, texts={}, kept_map=linear)

    def refine(self, heat_maps: HeatMaps, *, iterations: int = 1) -> HeatMaps:
        """Propagate maps along the image's self-attention, so that the parts of an object share their values.

            record.refine(record.daam())["car"]

        M <- A M, `iterations` times, on the self-attention's grid (`daamlib.attention.self_attention`), one mostly best
        (notebook 08). A map keeps its range, and a constant map stays constant. Differentiable in the maps. Raises
        ValueError if the record holds no self-attention, for maps of another grid, or iterations below 1.
        """
        if self.self_attention is None:
            raise ValueError("this record holds no self-attention: trace with self_attention=True")
        if tuple(heat_maps.values.shape[1:]) != self.grid:
            raise ValueError(f"expected maps of the record's grid {self.grid}, got {tuple(heat_maps.values.shape[1:])}")
        if iterations < 1:
            raise ValueError(f"iterations must be 1 or more, got {iterations}")
        return replace(heat_maps, values=self.self_attention.refine(heat_maps.values, iterations))

    def select(
        self,
        *,
        layers: Callable[[Layer], bool] | None = None,
        steps: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Self:
        """Return a record of only some layers, steps and heads, for looking into the sum.

            record.select(layers=lambda layer: layer.name.startswith("up_blocks"), steps=[0]).daam()["car"]

        Steps and heads are given by number. Maps keep the full `grid` only while a layer of that grid is left. Raises
        ValueError if nothing is left, if the record is `collapsed`, or holds no steps but their sum.
        """
        if self.kept_map is not None:
            raise ValueError("this record was collapsed to one map: select layers, steps and heads before collapsed()")
        chosen = [layer for layer in self.layers if layers is None or layers(layer)]
        if not chosen or (steps is not None and not len(steps)) or (heads is not None and not len(heads)):
            names = [f"{layer.name} {layer.grid}" for layer in self.layers]
            raise ValueError(f"nothing is left of {len(self.timesteps)} steps and the layers {names}")
        if steps is not None and chosen[0].queries is None:
            raise ValueError('steps cannot be taken apart: this record holds sums, made with store="linear" or "maps"')
        if steps is not None and len({range(len(self.timesteps))[step] for step in steps}) < len(steps):
            raise ValueError(f"a step is selected once, got steps={list(steps)}")
        return replace(
            self,
            layers=tuple(layer.select(steps, heads) for layer in chosen),
            timesteps=self.timesteps if steps is None else [self.timesteps[step] for step in steps],
        )

    def check(self) -> None:
        """ValueError if the parts of a record that was read from a file do not fit each other."""
        if not self.layers:
            raise ValueError("it holds no layers")
        if not all(map(math.isfinite, self.timesteps)):
            raise ValueError(f"its timesteps are {self.timesteps}")
        for layer in self.layers:
            layer.check(self.prompt_embeddings.values.shape[1], len(self.timesteps) if self.kept_map is None else None)
        if self.kept_map is not None:
            self.kept_map.check(self.grid, self.d_text)

    def __repr__(self) -> str:
        parts = f"grid={self.grid}, steps={len(self.timesteps)}, layers={len(self.layers)}"
        return f"AttentionRecord({self.prompt!r}, {parts}, {self.nbytes / 2**20:.1f} MiB)"


def _require_same_encoder(given: TokenEmbeddings, text: str, reader: Any, options: Mapping[str, Any]) -> None:
    """ValueError if a text that was embedded while generating has other embeddings now.

    What the encoder computes is compared, not its weights: a LoRA, its scale, a copied average of weights or a textual
    inversion may change it without a trace in them.
    """
    rows, count = given.rows, len(given.tokens)
    then, now = given.values[rows], reader.embed(text, options)
    # a reader's embeddings end with the text or with its padding; a mask may have left out rows of the record's
    places = [now[rows]] if len(now) == count else [now[: len(rows)], now[-len(rows) :]]
    errors = [(each.to(then.device).float() - then.float()).norm() for each in places if len(each) == len(then)]
    error = min(errors) / then.float().norm() if errors else 1.0
    rough = reader.rough or any(torch.equal(each.bfloat16().to(each), each) for each in (then, now))
    if not error <= (ROUGH_TOLERANCE if rough else ENCODER_TOLERANCE):
        raise ValueError(
            "the pipeline's text encoder is not the one that embedded this record's prompt, whose embeddings "
            f"differ by {error:.1%} now: a new text would not fit the record's keys. Was a LoRA loaded, unloaded "
            "or scaled since, were weights averaged, a textual inversion replaced, or the prompt's embeddings "
            "weighted? Bring the pipeline back to what it was, or give embeddings to daam_from / ldaam_from"
        )


def _where_not_finite(layers: Sequence[Layer], timesteps: Sequence[float]) -> str:
    """Return the layer and the step where NaN or infinite values begin."""
    begins = {layer.name: layer.first_not_finite() for layer in layers}
    name = min(begins, key=lambda layer: begins[layer])
    if begins[name] == math.inf:
        return "in no single layer, but in their products"
    step = int(begins[name])
    return f"in {name}" + (f" at step {step} (timestep {timesteps[step]})" if layers[0].queries is not None else "")


def require_same_model(records: Sequence[Any]) -> None:
    """Check that all records come from one model.

        daamlib.require_same_model(records)

    Raises ValueError unless they have the same layers with the same key weights.
    """
    first, *others = records
    for number, other in enumerate(others, start=1):
        if difference := first.fingerprint.difference(other.fingerprint):
            raise ValueError(f"record {number} and record 0 have {difference}: use one model, with the same LoRA")
