"""The record of one image of a joint model: its maps, and the passes to re-run for further ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from PIL import Image

from ...io import load_tensors, save_tensors
from ...pipeline import denoiser_of
from ..fingerprint import Fingerprint, placed
from ..heatmaps import HeatMaps
from ..ldaam import LinearMap
from ..pictures import overlay
from ..readers.sites import place_of
from ..readers.words import CHECK_TEXT
from ..text import TokenEmbeddings, check_embeddings
from ..weak import Weakly
from .encoding import JointTexts, check_words, encode_words
from .families import NOT_LINEAR, Family, family_of
from .maps import TOLERANCE, Formula, Formulae, JointAttention, Sums, concept_map, lone_word, open_vocabulary_daam
from .reading import CONCEPTS, PROMPT, WORDS, make_again, while_generating
from .stream import attentions
from .text import averages

FORMAT = "daamlib-joint-record-2"


class Block(NamedTuple):
    """An attention of a joint model, as `JointRecord.select` is asked about it."""

    name: str
    grid: tuple[int, int]
    heads: int


@dataclass(frozen=True, eq=False)
class JointRecord:
    """The joint attention of one image of SD 3, SD 3.5, Flux.1 or Qwen-Image, from `trace`, `trace_image` or `load`.

        with daamlib.trace(pipe, words=["car", "road"]) as trace:
            pipe("a red car and a traffic light, sky", height=32, width=48, num_inference_steps=2)
        trace[0].daam(["car", "road"])["car"]  # (H, W)

    It holds the prompt's DAAM and the maps of the words that `trace` was given. Any other text has no keys that could
    be stored, for its state depends on the image, block by block: reading it needs the model, which re-runs the stored
    passes (four steps of the pipeline, and about as much once more for the text). All maps are sums over these passes.

    Attributes:
        prompt: the text that generated the image, None if it was given as embeddings.
        prompt_embeddings: the prompt's embeddings as the denoiser saw them, padding included.
        timesteps: of each stored pass, 0 ... 1000 (in the units of the scheduler).
        grid: (H, W) of the maps, which all blocks share.
        calls: the denoiser's arguments of each stored pass.
        words: those that were read while the image was generated.
        maps: the sums of these passes: "prompt" (m, H, W), and with words "daam" and "concept_map" (K, H, W).
        fingerprint: what tells the model that made it from others.
        computed: a few numbers of what each pass computed in each block, which a re-run pass must reproduce.
        prompts: the prompt of each text encoder, by the argument of `encode_prompt`; None for given embeddings.
        selected: names of the attentions that are read; None for all.
        embedded_with: the arguments of `encode_prompt` that the prompt was embedded with.
        encoder_check: of a prompt that was given as embeddings, those of `readers.words.CHECK_TEXT` by the text
            encoders as they were while generating; None where they could not be asked.
        pipe: the pipeline, which a record does not keep alive: None once nothing else holds it, of copies and pickles,
            and of a record that was loaded without one. Such a record knows only `maps`. See `with_pipe`.
    """

    prompt: str | None
    prompt_embeddings: TokenEmbeddings
    timesteps: list[float]
    grid: tuple[int, int]
    calls: tuple[Mapping[str, Any], ...]
    words: tuple[str, ...]
    maps: Mapping[str, torch.Tensor]
    fingerprint: Fingerprint
    computed: torch.Tensor
    prompts: Mapping[str, str] | None
    selected: tuple[str, ...] | None = None
    embedded_with: Mapping[str, Any] = field(default_factory=dict)
    encoder_check: torch.Tensor | None = None
    pipe: Any = Weakly()
    self_attention: ClassVar[None] = None  # is not kept of a joint model

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without the pipeline; see `with_pipe`."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "pipe"}

    @property
    def d_text(self) -> int:
        """The width of the text embeddings."""
        return self.prompt_embeddings.values.shape[1]

    @property
    def layers(self) -> tuple[Block, ...]:
        """The joint attention of each block that is read. ValueError for a record without a pipeline."""
        family = self._family()
        found = _attentions(denoiser_of(self.pipe), family)
        blocks = (Block(name, self.grid, module.heads) for name, module in found.items())
        return tuple(block for block in blocks if self.selected is None or block.name in self.selected)

    def layer_names(self) -> list[str]:
        """The names of the attentions that are read. ValueError for a record without a pipeline."""
        return [block.name for block in self.layers]

    @property
    def device(self) -> torch.device:
        """Where the record's tensors lie; passes are re-run where the pipeline computes."""
        return self.maps[PROMPT].device

    @property
    def nbytes(self) -> int:
        """Bytes of the maps and of the stored arguments; those that passes share count once."""
        tensors = [value for call in self.calls for value in call.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in {id(t): t for t in [*tensors, *self.maps.values()]}.values())

    @property
    def summands(self) -> int:
        """How many terms `daam` and `ldaam` sum in a cell: heads x blocks x passes. ValueError without a pipeline."""
        return len(self.timesteps) * sum(block.heads for block in self.layers)

    def encode(self, text: str, *, padding: bool = False) -> TokenEmbeddings:
        """Embed any text as the prompt was (`embedded_with`); without padding, which is of no meaning here.

            record.encode("a tree").tokens  # of SD 3 those of CLIP, start and end token included, and then T5's

        Raises TypeError if `text` is no string, ValueError if it is too long, or if the record has no pipeline, or one
        whose text encoders embed the prompt in another way now, as after a LoRA was unloaded.
        """
        return self._texts().encode(text, self.embedded_with)

    def text_embeddings(self, text: str | None = None, *, padding: bool = True) -> TokenEmbeddings:
        """Return the embeddings of the prompt (None, or its words) or of any other text.

            record.text_embeddings().values  # (rows, d_text), a copy

        Those of the prompt need no pipeline.
        """
        if text is None or text == self.prompt:
            prompt = self.prompt_embeddings
            return replace(prompt, values=prompt.values.clone()) if padding else prompt.without_padding()
        return self.encode(text, padding=padding)

    def daam(self, text: str | Sequence[str] | None = None, *, padding: bool = True) -> HeatMaps:
        """DAAM of the prompt, or open-vocabulary DAAM of a text or of words (`joint.maps`).

            record.daam()["car"]  # (H, W), the probabilities of the model's own joint softmax
            record.daam("a tree and a road")["tree"]  # a text is run as a whole, and its tokens compete
            record.daam(["tree", "road"])["tree"]  # words are embedded one by one, and compete

        The prompt's (None) is exact: the image's positions take part in its softmax. Any other text is re-run with the
        image, and the softmax is over the text alone. The keys of a listed word's tokens are averaged.

        Args:
            text: see above. The prompt itself and the words that `trace` was given need no model.
            padding: of no meaning here, where a text is run without it.

        Returns:
            (m, H, W) maps, a row a token, or a row a word of a list; sums over the stored passes, blocks and heads.

        Raises:
            TypeError: `text` is neither.
            ValueError: see `encode`; or fewer than two words are listed.
        """
        if text is None or text == self.prompt:
            names = self.prompt_embeddings.without_padding()
            return HeatMaps(_finite(self.maps[PROMPT][self.prompt_embeddings.rows]), names.tokens, names.words)
        return self.daam_from(self.encode(text)) if isinstance(text, str) else self._of_words(WORDS, check_words(text))

    def overlay(
        self, word: str, image: Any, *, text: str | Sequence[str] | None = None, opacity: float = 0.65
    ) -> Image.Image:
        """Return the image under DAAM of a word of the prompt, or of `text`.

            record.overlay("car", image).save("car.png")

        Raises what `daam` and `pictures.overlay` raise.
        """
        return overlay(image, self.daam(text)[word], opacity=opacity)

    def daam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """Open-vocabulary DAAM of (m, d_text) embeddings, the softmax over exactly these tokens; without gradients.

            record.daam_from(record.encode(record.prompt))["car"]  # the prompt's words compete with each other alone

        Raises TypeError for no floating-point tensor, ValueError for another width, embeddings that require gradients,
        or a record without a pipeline.
        """
        return self._of_tokens(embeddings, open_vocabulary_daam)

    def concept_map(self, words: Sequence[str]) -> HeatMaps:
        """The concept map of some words: <o_image, o_word> in the attention's output space, softmax over the words.

            record.concept_map(["car", "road"])["car"]  # (H, W); sums over the stored passes and blocks

        ConceptAttention (Helbling et al., ICML 2025); `joint.maps.concept_map` says where this differs. Words compete,
        so name what else is in the image. Those of `trace` need no model. Blocks whose text vectors the model does not
        use, the last one of SD 3, have none. Raises TypeError for no list of strings, and ValueError as `encode`, or
        for fewer than two.
        """
        return self._of_words(CONCEPTS, check_words(words))

    def ldaam(self, word: str | None = None) -> HeatMaps:
        """The scores of a lone word without a softmax, (m, H, W) maps of any sign (`joint.maps.lone_word`).

            record.ldaam("traffic light")["traffic light"]

        Like linear DAAM it depends on no other word. Unlike it, it is NOT linear in the word's embedding: it is linear
        in the word's keys in each block, which the blocks before made of the embedding and the image. The tokens of a
        text see each other. None: the prompt's. Raises TypeError or ValueError as `encode`.
        """
        return self.ldaam_from(self.text_embeddings(word, padding=False))

    def ldaam_from(self, embeddings: torch.Tensor | TokenEmbeddings) -> HeatMaps:
        """`ldaam` of a text's embeddings.

            record.ldaam_from(record.encode("tree"))["tree"]

        Raises TypeError or ValueError as `daam_from`.
        """
        return self._of_tokens(embeddings, lone_word)

    def linear_map(self) -> NoReturn:
        """LDAAM collapsed to one tensor, which a joint model has not. Raises ValueError, with the reason."""
        raise ValueError(NOT_LINEAR)

    def collapsed(self) -> NoReturn:
        """A record of the `linear_map` alone, which a joint model has not. Raises ValueError, with the reason."""
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
    ) -> "JointRecord":
        """Return a record of only some blocks and passes, which the model re-runs; this one stays as it is.

            record.select(layers=lambda block: "0" in block.name, steps=[0]).daam()["car"]

        Args:
            layers: a predicate of a `Block`.
            steps: numbers of passes.
            heads: must be None: a record of a joint model reads all heads of a block.

        Returns:
            A new record.

        Raises:
            ValueError: nothing is left, heads are given, or the record has no pipeline.
            IndexError: a number does not exist.
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
            calls=tuple(self.calls[number] for number in numbers),
            computed=torch.stack([self.computed[number] for number in numbers]),
            selected=names,
        )
        if numbers == every and len(names) == len(blocks):
            return part
        words = [self._encode_words(self.words)] if self.words else []
        sums = part._run(words, while_generating(averages(words[0]) if words else None))
        return replace(part, maps={name: self._on_grid(values) for name, values in sums.items()})

    def probe_map(self, layers: Sequence[str] | None = None) -> LinearMap:
        """The map of a probe token: P(v) = sum over blocks l of < sum over passes t of o_image[t, l], v_l >.

            record.probe_map().weight  # (H, W, blocks * channels), the blocks in their order

        Exactly linear in the free vectors v_l, side by side in one row: fitted to masks it is a convex problem
        (`daamlib.optimize_probe`). No text is known that leads to given v_l in all blocks, so a probe token cannot be
        typed into a prompt. `layers` are names as `layer_names` lists; a block of Flux.1 at 1024 px takes 50 MB.
        Raises ValueError if the record has no pipeline, or a layer is unknown.
        """
        chosen = chosen_layers(self, layers)
        sums = self._run([], lambda image, _: {image.name: image.image_vectors.float()} if image.name in chosen else {})
        weight = torch.cat([sums[name][0].to(self.device) for name in chosen], dim=1)
        return LinearMap(weight.unflatten(0, self.grid))

    def with_pipe(self, pipe: Any) -> "JointRecord":
        """Return the record with a pipeline of the model that made it, which the caller keeps alive.

            record.with_pipe(pipe).daam("a tree")["tree"]

        Raises ValueError for the pipeline of another model.
        """
        return replace(placed(self, "this record", pipe, self.device, fingerprint_of_joint), pipe=pipe)

    def to(self, device: str | torch.device) -> "JointRecord":
        """Return a record with all its tensors on `device`.

            record.to("cpu").device

        The pipeline stays where it is.
        """
        device = torch.device(device)
        moved: dict[int, torch.Tensor] = {}  # what passes share stays shared

        def on(value: Any) -> Any:
            return moved.setdefault(id(value), value.to(device)) if isinstance(value, torch.Tensor) else value

        return replace(
            self,
            prompt_embeddings=self.prompt_embeddings.to(device),
            encoder_check=on(self.encoder_check),
            calls=tuple({name: on(value) for name, value in call.items()} for call in self.calls),
            maps={name: on(value) for name, value in self.maps.items()},
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the record to one `.safetensors` file.

            record.save("joint.safetensors")

        It holds the maps, and the arguments of the passes.
        """
        tensors = {"prompt_embeddings": self.prompt_embeddings.values, "computed": self.computed}
        tensors |= {f"maps.{name}": values for name, values in self.maps.items()}
        if self.encoder_check is not None:
            tensors["encoder_check"] = self.encoder_check
        stored: dict[int, str] = {}  # a tensor that passes share is written once
        calls: list[dict[str, Any]] = [{} for _ in self.calls]
        for number, call in enumerate(self.calls):
            for name, value in call.items():
                if isinstance(value, torch.Tensor):
                    key = stored.setdefault(id(value), f"{number}.{name}")
                    tensors[key] = value
                    calls[number][name] = {"tensor": key}
                else:
                    calls[number][name] = {"value": value}
        header = {name: getattr(self, name) for name in ("prompt", "timesteps", "grid", "words", "selected")} | {
            "tokens": self.prompt_embeddings.tokens,
            "named": self.prompt_embeddings.words,
            "prompts": self.prompts and dict(self.prompts),
            "embedded_with": dict(self.embedded_with),
            "fingerprint": dict(self.fingerprint.layers),
            "calls": calls,
        }
        save_tensors(path, tensors, header, FORMAT)

    @classmethod
    def load(cls, path: str | Path, *, pipe: Any = None, device: str | torch.device | None = None) -> "JointRecord":
        """Read a saved record.

            record.save("joint.safetensors")
            JointRecord.load("joint.safetensors", pipe=pipe).daam("a tree")["tree"]

        Args:
            path: of the file.
            pipe: the pipeline that made it, which reads further texts; the caller keeps it alive.
            device: where its tensors go; None: where `pipe` computes, without one the CPU.

        Returns:
            The record.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no record, is damaged, or is of another model.
        """
        tensors, header = load_tensors(path, FORMAT)
        try:
            embeddings = TokenEmbeddings.stored(tensors["prompt_embeddings"], header["tokens"], header["named"])

            def argument(held: Mapping[str, Any]) -> Any:
                return tensors[held["tensor"]] if "tensor" in held else _tuples(held["value"])

            record = cls(
                prompt=header["prompt"],
                prompt_embeddings=embeddings,
                timesteps=[t if isinstance(t, int) else float(t) for t in header["timesteps"]],
                grid=(int(header["grid"][0]), int(header["grid"][1])),
                calls=tuple({name: argument(held) for name, held in call.items()} for call in header["calls"]),
                words=tuple(header["words"]),
                maps={name.removeprefix("maps."): values for name, values in tensors.items() if name[:5] == "maps."},
                fingerprint=Fingerprint({name: tuple(of) for name, of in header["fingerprint"].items()}),
                computed=tensors["computed"],
                prompts=header["prompts"],
                selected=header["selected"] and tuple(header["selected"]),
                embedded_with=header["embedded_with"],
                encoder_check=tensors.get("encoder_check"),
                pipe=pipe,
            )
            sizes = {tuple(values.shape[1:]) for values in record.maps.values()}
            if sizes != {record.grid} or len(record.maps[PROMPT]) != len(embeddings.tokens):
                raise ValueError(f"its maps of {sizes} do not fit the grid {record.grid} and the prompt's tokens")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable record, or is damaged: {error}") from error
        return placed(record, path, pipe, device, fingerprint_of_joint)

    def __repr__(self) -> str:
        return (
            f"JointRecord({self.prompt!r}, grid={self.grid}, timesteps={self.timesteps}, words={list(self.words)}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    # -- reading -------------------------------------------------------------------------------------------------

    def _family(self) -> Family:
        family = family_of(self.pipe)
        if family is None:
            raise ValueError(
                "this record has no model: a text of a joint model has keys only where it runs along with the image. "
                f"Load it with JointRecord.load(path, pipe=pipe), or use record.with_pipe(pipe); without, it knows the "
                f"prompt and {list(self.words)}"
            )
        return family

    def _texts(self) -> JointTexts:
        """Return what embeds texts. ValueError if it embeds the prompt, or the check text, in another way now."""
        texts = JointTexts(self.pipe, self._family())
        prompts, then = self.prompts, self.prompt_embeddings
        if self.encoder_check is not None:
            prompts, then = {"prompt": CHECK_TEXT}, TokenEmbeddings.unnamed(self.encoder_check)
        if prompts is None:
            return texts
        now = texts.encode_prompt(prompts, self.embedded_with)[0][0]
        rows = [row for row in then.rows if row < len(now)]
        own, tolerance = then.values[rows].float(), max(TOLERANCE[values.dtype] for values in (then.values, now)) / 2
        same = (now[rows].to(own) - own).norm(dim=1) <= tolerance * own.norm(dim=1)  # of each token: of each encoder
        if len(rows) < then.length or not same.all():
            raise ValueError(
                "the pipeline's text encoders do not embed this record's prompt as they did (was a LoRA loaded or "
                "unloaded since, or is it another model?): a new text would not fit the image. Bring the pipeline back "
                "to what it was"
            )
        return texts

    def _encode_words(self, words: Sequence[str]) -> TokenEmbeddings:
        texts = self._texts()
        return encode_words(texts.pipe, texts.family, words, self.embedded_with)

    def _run(self, texts: Sequence[TokenEmbeddings], formulae: Formulae) -> Sums:
        """Return what `make_again` makes of the blocks that are read."""
        family, values = self._family(), [text.values for text in texts]

        def of_selected(image: JointAttention, along: tuple[JointAttention, ...]) -> Mapping[str, torch.Tensor | None]:
            return formulae(image, along) if self.selected is None or image.name in self.selected else {}

        return make_again(self.pipe, family, self.calls, values, of_selected, self.computed)

    def _of_tokens(self, embeddings: torch.Tensor | TokenEmbeddings, formula: Formula) -> HeatMaps:
        """Return the map that a formula makes of each token of a text."""
        values = check_embeddings(embeddings, self.d_text, self.device)
        if values.requires_grad:
            raise ValueError("maps of a joint model are not differentiable in the embeddings: give them detached")
        text = embeddings if isinstance(embeddings, TokenEmbeddings) else TokenEmbeddings.unnamed(values)
        return HeatMaps(self._maps(text, torch.eye(len(values)), formula), text.tokens, text.words)

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
        """(1, m, h * w) -> (m, H, W) where the record lies."""
        return _finite(maps[0].unflatten(1, self.grid).to(self.device))


def _finite(maps: torch.Tensor) -> torch.Tensor:
    """The maps; ValueError for NaN or infinite values."""
    if not maps.isfinite().all():
        raise ValueError(
            "the maps hold NaN or infinite values: the attention overflowed, as in float16. Generate the image in "
            "bfloat16 or float32"
        )
    return maps


def _tuples(value: Any) -> Any:
    """JSON's lists of sizes as the tuples they were, as in Qwen-Image's `img_shapes`."""
    if not isinstance(value, list):
        return value
    return tuple(value) if all(isinstance(part, int) for part in value) else [_tuples(part) for part in value]


def chosen_layers(record: JointRecord, layers: Sequence[str] | None) -> list[str]:
    """The attentions of these names, in the order of the blocks; ValueError for an unknown one."""
    known = record.layer_names()
    if layers is not None and (not len(layers) or set(layers) - set(known)):
        raise ValueError(f"the layers are {known}, got {list(layers)}")
    return [name for name in known if layers is None or name in layers]


def _attentions(denoiser: Any, family: Family) -> dict[str, Any]:
    """The joint attention of each block, the first in it, by name."""
    names = {module: name.replace("_orig_mod.", "") for name, module in denoiser.named_modules()}
    first = [attentions(block)[0] for part in family.blocks for block in getattr(denoiser, part)]
    return {names[module]: module for module in first}


def fingerprint_of_joint(pipe: Any) -> Fingerprint:
    """The fingerprint of a pipeline as it is now, by all its linear layers. ValueError if it is no such pipeline.

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
    """The linear layers of a module by name, each with the LoRA in it."""
    for part, child in module.named_children():
        path = f"{name}.{part}" if name else part
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            yield path.replace("_orig_mod.", ""), child
        else:
            yield from _linear_layers(child, path)
