"""The record of one image of a joint model: its maps, and the passes to re-run for further ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from typing_extensions import Self

from ...pipeline import denoiser_of
from ..fingerprint import Fingerprint
from ..heatmaps import HeatMaps
from ..image_record import ImageRecord
from ..ldaam import LinearMap
from ..placement import bytes_of
from ..readers.sites import place_of
from ..readers.words import CHECK_TEXT
from ..text import TokenEmbeddings, check_embeddings
from .encoding import JointTexts, averages, check_words, encode_words
from .families import NOT_LINEAR, Family, family_of
from .maps import Formula, Formulae, JointAttention, Sums, concept_map, lone_word, open_vocabulary_daam
from .reading import CONCEPTS, PROMPT, WORDS, Calls, rerun, while_generating
from .stream import attentions


class Block(NamedTuple):
    """An attention of a joint model, as `JointRecord.select` is asked about it."""

    name: str
    grid: tuple[int, int]
    heads: int


@dataclass(frozen=True, eq=False)
class JointRecord(ImageRecord):
    """The joint attention of one image of SD 3, SD 3.5, Flux.1 or Qwen-Image, from `trace`, `trace_image` or `load`.

        with daamlib.trace(pipe, words=["car", "road"]) as trace:
            pipe("a red car and a traffic light, sky", height=32, width=48, num_inference_steps=2)
        trace[0].daam(["car", "road"])["car"]  # (H, W)

    It holds the prompt's DAAM and the maps of the words that `trace` was given. Any other text has no keys that could
    be stored, for its state depends on the image, block by block: reading it needs the model, which re-runs the stored
    passes (four steps of the pipeline, and about as much once more for the text). All maps are sums over these passes,
    whose `timesteps` are 0 ... 1000. `ImageRecord` has the further fields.
    """

    grid: tuple[int, int]  # (H, W) of the maps, which all blocks share
    calls: Calls  # the denoiser's arguments of each stored pass
    words: tuple[str, ...]  # those that were read while the image was generated
    maps: Mapping[str, torch.Tensor]  # "prompt" (m, H, W), and with words "daam" and "concept_map" (K, H, W)
    fingerprint: Fingerprint  # what tells the model that made it from others
    computed: torch.Tensor  # numbers of what each pass computed in each block, which a re-run pass must reproduce
    prompts: Mapping[str, str] | None  # of each text encoder, by the argument of `encode_prompt`; None for embeddings
    selected: tuple[str, ...] | None = None  # names of the attentions that are read; None for all

    FORMAT: ClassVar[str] = "daamlib-joint-record-3"
    self_attention: ClassVar[None] = None  # is not stored of a joint model

    @property
    def layers(self) -> tuple[Block, ...]:
        """The first joint attention of each block that is read. ValueError for a record without a pipeline."""
        family, denoiser = self._family(), denoiser_of(self.pipe)
        names = {module: name.replace("_orig_mod.", "") for name, module in denoiser.named_modules()}
        first = [attentions(block)[0] for part in family.blocks for block in getattr(denoiser, part)]
        blocks = (Block(names[module], self.grid, module.heads) for module in first)
        return tuple(block for block in blocks if self.selected is None or block.name in self.selected)

    @property
    def device(self) -> torch.device:
        """Device of the record's tensors; passes are re-run where the pipeline computes."""
        return self.maps[PROMPT].device

    @property
    def nbytes(self) -> int:
        """Bytes of the maps and of the stored arguments; those that passes share count once."""
        return bytes_of(self.calls, self.maps)

    def fingerprint_of(self, pipe: Any) -> Fingerprint:
        """Measure a pipeline's model, see `fingerprint_of_joint`."""
        return fingerprint_of_joint(pipe)

    def to(self, device: str | torch.device) -> Self:
        """Return the record with its tensors on `device`, see `ImageRecord.to`."""
        return replace(super().to(device), computed=self.computed)  # compared on the CPU

    def encode(self, text: str, *, padding: bool = False) -> TokenEmbeddings:
        """Embed any text as the prompt was (`embedded_with`), always without padding.

            record.encode("a tree").tokens  # of SD 3 those of CLIP, start and end token included, and then T5's

        Raises TypeError if `text` is no string, ValueError if it is too long, or if the record has no pipeline, or one
        whose text encoders embed the prompt in another way now, as after a LoRA was unloaded.
        """
        return self._texts().encode(text, self.embedded_with)

    def daam(self, text: str | Sequence[str] | None = None, *, padding: bool = True) -> HeatMaps:
        """Return DAAM of the prompt, or open-vocabulary DAAM of a text or of words (`joint.maps`).

            record.daam()["car"]  # (H, W), the probabilities of the model's own joint softmax
            record.daam("a tree and a road")["tree"]  # a text is run as a whole, and its tokens compete
            record.daam(["tree", "road"])["tree"]  # words are embedded one by one, and compete

        The prompt's (None) is exact: the image's positions take part in its softmax. Any other text is re-run with the
        image, without padding, and the softmax is over the text alone. Maps are (m, H, W), a row a token, or a word of
        a list, whose tokens' keys are averaged. The prompt and the words that `trace` was given need no model. Raises
        TypeError or ValueError as `encode`, or for fewer than two words.
        """
        if text is None or text == self.prompt:
            names = self.prompt_embeddings.without_padding()
            return HeatMaps(_finite(self.maps[PROMPT][self.prompt_embeddings.rows]), names.tokens, names.words)
        return self.daam_from(self.encode(text)) if isinstance(text, str) else self._of_words(WORDS, check_words(text))

    def daam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Return open-vocabulary DAAM of (m, d_text) embeddings, the softmax over exactly these; without gradients.

            record.daam_from(record.encode(record.prompt))["car"]  # the prompt's words compete with each other alone

        Raises TypeError for no floating-point tensor, ValueError for another width, embeddings that require gradients,
        or a record without a pipeline.
        """
        return self._of_tokens(embeddings, open_vocabulary_daam)

    def concept_map(self, words: Sequence[str]) -> HeatMaps:
        """Return the concept map of words: <o_image, o_word> in the attention's output space, softmax over the words.

            record.concept_map(["car", "road"])["car"]  # (H, W); sums over the stored passes and blocks

        ConceptAttention (Helbling et al., ICML 2025); `joint.maps.concept_map` says where this differs. Words compete,
        so name what else is in the image. Those of `trace` need no model. Raises TypeError for no list of strings, and
        ValueError as `encode`, or for fewer than two.
        """
        return self._of_words(CONCEPTS, check_words(words))

    def ldaam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Return the scores of a lone text's embeddings without a softmax, (m, H, W) maps of any sign.

            record.ldaam_from(record.encode("tree"))["tree"]

        Like linear DAAM they depend on no other text. Unlike it, they are NOT linear in the embedding, but in the keys
        that the blocks before made of the embedding and the image (`joint.maps.lone_word`). The tokens of a text see
        each other. Raises TypeError or ValueError as `daam_from`.
        """
        return self._of_tokens(embeddings, lone_word)

    def linear_map(self) -> NoReturn:
        """Raise ValueError: there is no LDAAM that collapses to one tensor."""
        raise ValueError(NOT_LINEAR)

    def collapsed(self) -> NoReturn:
        """Raise ValueError: there is no linear map to keep."""
        raise ValueError(NOT_LINEAR)

    def refine(self, heat_maps: HeatMaps, *, iterations: int = 1) -> NoReturn:
        """Raise ValueError: the image's self-attention, which maps would be propagated along, is not stored."""
        raise ValueError(
            "a joint model's record holds no self-attention to refine maps along: in its one softmax image and text "
            "share the probabilities. Use the maps as they are, as in label_map(record, words, iterations=0)"
        )

    def select(
        self,
        *,
        layers: Callable[[Block], bool] | None = None,
        steps: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Self:
        """Return a record of only some blocks and passes, which the model re-runs.

            record.select(layers=lambda block: "0" in block.name, steps=[0]).daam()["car"]

        `layers` is a predicate of a `Block`, `steps` are numbers of passes. Raises ValueError if nothing is left, heads
        are given, which cannot be taken apart, or the record has no pipeline; IndexError for an unknown number.
        """
        if heads is not None:
            raise ValueError("the heads of a joint model cannot be taken apart: select layers or steps")
        blocks, every = self.layers, list(range(len(self.timesteps)))
        names = tuple(block.name for block in blocks if layers is None or layers(block))
        numbers = every if steps is None else list(steps)
        if not names or not numbers:
            raise ValueError(f"nothing is left of {len(every)} passes and {[block.name for block in blocks]}")
        part = replace(
            self,
            timesteps=[self.timesteps[number] for number in numbers],
            calls=Calls.of([self.calls[number] for number in numbers]),
            computed=torch.stack([self.computed[number] for number in numbers]),
            selected=names,
        )
        if numbers == every and len(names) == len(blocks):
            return part
        words = [self._encode_words(self.words)] if self.words else []
        sums = part._run(words, while_generating(words[0] if words else None))
        return replace(part, maps={name: self._on_grid(values) for name, values in sums.items()})

    def probe_map(self, layers: Sequence[str] | None = None) -> LinearMap:
        """Return the map of a probe token: P(v) = sum over blocks l of < sum over passes t of o_image[t, l], v_l >.

            record.probe_map().weight  # (H, W, blocks * channels), the blocks in their order

        Exactly linear in the free vectors v_l, side by side in one row (`daamlib.optimize_probe`). No text is known
        that leads to given v_l in all blocks, so a probe token cannot be typed into a prompt. `layers` are names as
        `layer_names` lists; a block of Flux.1 at 1024 px takes 50 MB. Raises ValueError if the record has no pipeline,
        or a layer is unknown.
        """
        chosen = chosen_layers(self, layers)
        sums = self._run([], lambda image, _: {image.name: image.image_vectors.float()} if image.name in chosen else {})
        weight = torch.cat([sums[name][0].to(self.device) for name in chosen], dim=1)
        return LinearMap(weight.unflatten(0, self.grid))

    def check(self) -> None:
        """ValueError if the parts of a record that was read from a file do not fit each other."""
        sizes = {tuple(values.shape[1:]) for values in self.maps.values()}
        if sizes != {self.grid} or len(self.maps[PROMPT]) != len(self.prompt_embeddings.tokens):
            raise ValueError(f"its maps of {sizes} do not fit the grid {self.grid} and the prompt's tokens")

    def __repr__(self) -> str:
        parts = f"grid={self.grid}, timesteps={self.timesteps}, words={list(self.words)}"
        return f"JointRecord({self.prompt!r}, {parts}, {self.nbytes / 2**20:.1f} MiB)"

    def _family(self) -> Family:
        family = family_of(self.require_pipe(f"without, it knows the prompt and {list(self.words)}"))
        assert family is not None  # a pipeline of another kind is refused
        return family

    def _texts(self) -> JointTexts:
        """Return what embeds texts. ValueError if it embeds the prompt, or the check text, in another way now."""
        texts = JointTexts(self.pipe, self._family())
        if self.encoder_check is not None:
            given = TokenEmbeddings.unnamed(self.encoder_check)
            texts.require_same(given, {"prompt": CHECK_TEXT}, self.embedded_with)
        elif self.prompts is not None:
            texts.require_same(self.prompt_embeddings, self.prompts, self.embedded_with)
        return texts

    def _encode_words(self, words: Sequence[str]) -> TokenEmbeddings:
        texts = self._texts()
        return encode_words(texts.pipe, texts.family, words, self.embedded_with)

    def _run(self, texts: Sequence[TokenEmbeddings], formulae: Formulae) -> Sums:
        """Return what `rerun` makes of the blocks that are read."""
        family, values = self._family(), [text.values for text in texts]

        def of_selected(image: JointAttention, further: tuple[JointAttention, ...]) -> Mapping[str, Any]:
            return formulae(image, further) if self.selected is None or image.name in self.selected else {}

        return rerun(self.pipe, family, self.calls, values, of_selected, self.computed)

    def _of_tokens(self, embeddings: torch.Tensor | TokenEmbeddings, formula: Formula) -> HeatMaps:
        """Return the map that a formula makes of each token of a text."""
        values = check_embeddings(embeddings, self.d_text, self.device)
        if values.requires_grad:
            raise ValueError("maps of a joint model are not differentiable in the embeddings: give them detached")
        text = embeddings if isinstance(embeddings, TokenEmbeddings) else TokenEmbeddings.unnamed(values)
        return HeatMaps.of(self._maps(text, torch.eye(len(values)), formula), text)

    def _of_words(self, name: str, words: tuple[str, ...]) -> HeatMaps:
        if words == self.words and name in self.maps:
            return HeatMaps.of_words(_finite(self.maps[name]).clone(), words)
        text = self._encode_words(words)
        formula = open_vocabulary_daam if name == WORDS else concept_map
        return HeatMaps.of_words(self._maps(text, averages(text), formula), words)

    def _maps(self, text: TokenEmbeddings, pool: torch.Tensor, formula: Formula) -> torch.Tensor:
        sums = self._run([text], lambda image, texts: {WORDS: formula(image, texts[0], pool)})
        if not sums:
            raise ValueError(f"the blocks {self.layer_names()} make no vectors of a text: they have no concept map")
        return self._on_grid(sums[WORDS])

    def _on_grid(self, maps: torch.Tensor) -> torch.Tensor:
        """Return (1, m, h * w) maps as (m, H, W) where the record lies."""
        return _finite(maps[0].unflatten(1, self.grid).to(self.device))


def _finite(maps: torch.Tensor) -> torch.Tensor:
    """Return the maps; ValueError for NaN or infinite values."""
    if not maps.isfinite().all():
        raise ValueError("the maps hold NaN or infinite values, as float16 overflows: generate in bfloat16 or float32")
    return maps


def chosen_layers(record: JointRecord, layers: Sequence[str] | None) -> list[str]:
    """Return the names of these attentions, in the order of the blocks; ValueError for an unknown one."""
    known = record.layer_names()
    if layers is not None and (not len(layers) or set(layers) - set(known)):
        raise ValueError(f"the layers are {known}, got {list(layers)}")
    return [name for name in known if layers is None or name in layers]


def fingerprint_of_joint(pipe: Any) -> Fingerprint:
    """Return the fingerprint of a pipeline as it is now, by all its linear layers. ValueError for another kind.

    Whatever changes the state of image or text changes what a text reads; so all layers count, not the keys' alone.
    """
    if family_of(pipe) is None:
        raise ValueError(f"the record is of a joint model, {type(pipe).__name__} is none that is read")
    denoiser = denoiser_of(pipe)
    layers: dict[str, tuple[float, ...]] = {}
    for name, module in _linear_layers(denoiser):

        def project(values: torch.Tensor, module: Any = module) -> torch.Tensor:
            return module.forward(values.to(place_of(module, pipe), denoiser.dtype))  # past the hooks of others

        layers |= Fingerprint.of_keys({name: project}, module.in_features).layers
    return Fingerprint(layers)


def _linear_layers(module: torch.nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the linear layers of a module by name, each with the LoRA in it."""
    for part, child in module.named_children():
        path = f"{name}.{part}" if name else part
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            yield path.replace("_orig_mod.", ""), child
        else:
            yield from _linear_layers(child, path)
