"""The hooks of one trace: what a pipeline call is, and what is kept of it."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..pipeline import uncompiled
from .batches import Batch, Encoding, halves, known_batch, own_batch
from .collectors import Collector, OnlineMaps, Queries, QuerySum
from .layers import KeyProjection, Layer
from .readers import reader_of
from .readers.sites import Pass, Site
from .readers.words import check_text
from .record import AttentionRecord
from .self_attention import LARGEST, LATE, SelfAttention, SelfAttentionCollector, together
from .text import TokenEmbeddings, options_of_images, texts_of_images
from .watch import watch

log = logging.getLogger("daamlib")

Branch = Literal["conditional", "unconditional"]
Store = Literal["queries", "linear", "maps"]


class EmptyTraceError(IndexError, ValueError):
    """No image was generated inside the `with`, or none of that number."""


class Trace(Sequence[AttentionRecord]):
    """The records of the images generated inside a `trace`, in order of generation; also after the `with`."""

    def __init__(self) -> None:
        self.records: list[Any] = []  # of joint models, JointRecords
        self.unfinished = 0  # calls that left no record
        self.bytes_needed = 0  # by the latest call, when it is complete: its queries, sums or maps of all images

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        count = len(self)
        if not isinstance(index, slice) and not -count <= index < count:
            calls = f"; {self.unfinished} calls did not end and left no record" if self.unfinished else ""
            reason = (
                f"no record {index}: the trace holds {count}"
                if count
                else "the trace is empty: no image was generated to its end inside the `with` block, by the traced "
                "pipeline or a loop of one's own over its denoiser"
            )
            raise EmptyTraceError(reason + calls)
        return self.records[index]

    def __repr__(self) -> str:
        return f"Trace({len(self)} records, {self.bytes_needed / 2**20:.1f} MiB in the latest call)"


@dataclass(frozen=True)
class Keep:
    """What `trace` was asked to keep."""

    store: Store
    texts: tuple[str, ...]
    device: torch.device | None
    self_attention: bool


@dataclass(eq=False)
class Call:
    """One pipeline call, or one loop of one's own, in the making."""

    by_pipeline: bool
    batch: Batch
    prompts: Sequence[str | None]  # of each image, the text that its passes read
    embeddings: Sequence[TokenEmbeddings]  # of these, as the passes receive them
    latent: tuple[int, int]
    plan: Any  # the scheduler's timesteps, a new object in every call
    expected: int | None  # passes, if they are known
    text: torch.Tensor  # of the latest pass, its rows, and how they were read
    rows: int
    latest: Batch
    texts: Mapping[str, TokenEmbeddings]  # to keep maps of
    collectors: dict[str, Collector] = field(default_factory=dict)
    keys: dict[str, KeyProjection] = field(default_factory=dict)
    self_attention: dict[str, SelfAttentionCollector] = field(default_factory=dict)
    self_positions: dict[str, int] = field(default_factory=dict)  # of each of these
    timesteps: list[Any] = field(default_factory=list)
    previous: Pass | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept of the call's images."""
        beside = sum(collector.nbytes for collector in self.self_attention.values())
        return beside + sum(collector.nbytes for collector in self.collectors.values())


class Recorder:
    """The hooks of one `trace`, and the call that they are told of."""

    def __init__(self, pipe: Any, branch: Branch, keep: Keep, middle: bool, stream: str | None = None):
        self.trace = Trace()
        self._pipe, self._branch, self._keep = pipe, branch, keep
        self._reader = reader_of(pipe, middle=middle, stream=stream)
        self._sites = self._reader.sites  # an error before anything is hooked if it has none
        self._encodings: list[Encoding] = []
        self._in_pipeline = False  # between `check_inputs` and `maybe_free_model_hooks`
        self._embedding = False  # texts of our own
        self._call: Call | None = None
        self._pass: tuple[Pass, slice | None] | None = None  # under way, and its rows to keep
        self._broken_plan: Any = None  # of a loop of one's own that did not end
        self._self_queries: dict[str, torch.Tensor] = {}  # whose keys are about to come
        self._keys: dict[str, KeyProjection] = {}  # the latest, shared by the records

    def attach(self, stack: ExitStack) -> None:
        """Register all hooks, to be removed with the stack."""
        stack.enter_context(uncompiled(self._pipe))
        # where a call begins and ends, and the only place where a prompt's text can be seen
        stack.enter_context(watch(self._pipe, "check_inputs", self._after_check))
        stack.enter_context(watch(self._pipe, "encode_prompt", self._after_prompt))
        stack.enter_context(watch(self._pipe, "maybe_free_model_hooks", self._after_pipeline))
        for site in self._sites:
            hook = lambda module, args, output, site=site: self._after_queries(site, output)  # noqa: E731
            stack.callback(site.queries.register_forward_hook(hook).remove)
        if self._keep.self_attention:
            for site in self._reader.self_sites:
                hook = lambda module, args, output, site=site: self._after_self_queries(site, output)  # noqa: E731
                stack.callback(site.queries.register_forward_hook(hook).remove)
                hook = lambda module, args, output, site=site: self._after_self_keys(site, output)  # noqa: E731
                stack.callback(site.keys.register_forward_hook(hook).remove)
        denoiser = self._reader.denoiser
        stack.callback(denoiser.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(lambda *_: self._after_pass()).remove)

    # -- the pipeline --------------------------------------------------------------------------------------------

    def _after_check(self, arguments: dict, result: Any) -> None:
        self._warn_of_unfinished()
        self._in_pipeline = True
        self._encodings.clear()  # it embeds its prompts anew

    @torch.inference_mode(False)  # what is kept would else never be differentiable
    @torch.no_grad()
    def _after_prompt(self, arguments: dict, result: tuple) -> None:
        if self._embedding:
            return
        positive, mask, negative = map(_copy, self._reader.prompt_of(result))
        assert positive is not None
        guided = arguments.get("do_classifier_free_guidance", negative is not None)
        if guided and negative is None:  # both texts are returned as one batch, the negative ones first
            negative, positive = positive.chunk(2)
            mask = None if mask is None else mask.chunk(2)[1]
        names = texts_of_images(arguments.get("prompt"), len(positive))
        unread = negative is None or not negative.any() or arguments.get("negative_prompt_embeds") is not None
        negatives = texts_of_images(None if unread else arguments.get("negative_prompt") or "", len(positive))
        if self._branch == "unconditional":  # the negative text has a second one too, and no instruction (Sana)
            arguments = arguments | {
                "prompt_2": arguments.get("negative_prompt_2"),
                "complex_human_instruction": None,
            }
        options = {name: arguments[name] for name in self._reader.options if arguments.get(name) is not None}
        texts = self._embed_texts(options)
        encoding = Encoding(names, positive, negative, bool(guided), options, texts, mask, negatives)
        self._encodings = [*self._encodings[-7:], encoding]

    def _embed_texts(self, options: Mapping[str, Any]) -> dict[str, TokenEmbeddings]:
        """The texts to keep maps of, padding included, embedded as the prompt was."""
        self._embedding = True
        try:
            return {text: self._reader.encode(text, padding=True, options=options) for text in self._keep.texts}
        finally:
            self._embedding = False

    def _after_pipeline(self, arguments: dict, result: Any) -> None:
        """The pipeline's last act; an interrupted call has made fewer passes than announced."""
        self._finish()
        self._in_pipeline = False

    # -- the denoiser --------------------------------------------------------------------------------------------

    def _before_pass(self, denoiser, args: tuple, kwargs: dict) -> None:
        try:
            self._pass = self._begin_pass(args, kwargs)
        except ValueError:
            self.abandon()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin_pass(self, args: tuple, kwargs: dict) -> tuple[Pass, slice | None]:
        if self._pass is not None:  # the one before failed; made again, it would be counted twice
            self._broken_plan = self._pipe.scheduler.timesteps
            self._warn_of_unfinished()
        told, plan = self._reader.read(args, kwargs), self._pipe.scheduler.timesteps
        if self._call is not None and self._restarts(self._call, told, plan):
            self._warn_of_unfinished()
        batch = self._batch(told)
        rows = getattr(batch, self._branch)
        call = self._call
        if call is not None and not call.by_pipeline and _of_others(batch.prompts, call.batch.prompts):
            self._finish()
        if self._call is None and rows is not None:
            self._call = self._begin_call(told, batch, plan)
        if self._call is not None and not self._call.by_pipeline:
            self._follow(self._call, told, rows)
        return told, rows

    def _batch(self, told: Pass) -> Batch:
        """Which rows of this pass are which, and of which prompts. ValueError where nothing tells."""
        call, rows = self._call, len(told.sample)
        if call is not None and call.by_pipeline and told.text is call.text and rows == call.rows:
            return call.latest  # comparing tensors makes a GPU's host wait
        batch = known_batch(told.text, self._encodings)
        if batch is None and not self._in_pipeline:
            batch = own_batch(told.sample, told.text, self._encodings)
        elif batch is None:  # the pipeline, or a callback, has changed the text
            encoding = call.batch.encoding if call is not None else next(reversed(self._encodings), None)
            if encoding is None:
                raise ValueError(
                    f"{type(self._pipe).__name__} does not embed its prompts by `encode_prompt`: trace cannot tell "
                    "which rows of its batches are the images' prompts"
                )
            images = len(encoding.positive)
            if rows not in (images, 2 * images):
                raise ValueError(
                    f"the denoiser was called with {rows} latents for {images} images: it mixes other passes in, trace "
                    "cannot tell them apart"
                )
            batch = Batch(*halves(rows, rows == 2 * images), encoding, encoding.prompts)
        if self._in_pipeline and self._branch == "unconditional" and batch.unconditional is None:
            raise ValueError(
                'branch="unconditional" needs classifier-free guidance, which is off in this call or pass '
                f'({rows} latents): give guidance_scale > 1, or trace branch="conditional"'
            )
        if call is not None:
            call.text, call.rows, call.latest = told.text, rows, batch
        return batch

    @staticmethod
    def _restarts(call: Call, told: Pass, plan: Any) -> bool:
        """Whether this pass belongs to another call than the one under way, by its latents or noise levels."""
        if call.plan is not plan or call.latent != tuple(told.sample.shape[-2:]):
            return True
        if call.by_pipeline or call.expected is not None or len(call.timesteps) < 2:
            return False
        first, second, last, now = (_level(t) for t in (*call.timesteps[:2], call.timesteps[-1], told.timestep))
        return (second - first) * (now - last) < 0  # the noise levels turn round

    def _begin_call(self, told: Pass, batch: Batch, plan: Any) -> Call | None:
        broken = not self._in_pipeline and plan is not None and plan is self._broken_plan
        if broken and _level(told.timestep) != _level(plan[0]):
            return None  # the rest of a loop whose earlier pass failed
        self._broken_plan = None
        if any(site.module.to_q is not site.to_q for site in self._sites):
            raise ValueError("layers of the denoiser were replaced inside the `with`, as a LoRA does: load it before")
        rows = getattr(batch, self._branch)
        text, mask = told.text[rows].detach().clone(), None if told.mask is None else told.mask[rows]
        prompts = batch.prompts
        if self._branch == "unconditional":
            prompts = batch.encoding.negative_prompts if batch.encoding else (None,) * len(text)
        options = batch.encoding.options if batch.encoding else {}
        planned = None if plan is None else len(plan)  # some schedulers have none before their first `set_timesteps`
        expected = getattr(self._pipe, "num_timesteps", None) if self._in_pipeline else planned
        return Call(
            by_pipeline=self._in_pipeline,
            batch=batch,
            prompts=prompts,
            embeddings=[
                self._reader.named([prompt], text[i : i + 1], None if mask is None else mask[i : i + 1], own)[0]
                for i, (prompt, own) in enumerate(zip(prompts, options_of_images(options, len(prompts)), strict=True))
            ],
            latent=(told.sample.shape[-2], told.sample.shape[-1]),
            plan=plan,
            expected=expected,
            text=told.text,
            rows=len(told.sample),
            latest=batch,
            texts=batch.encoding.texts if batch.encoding else self._embed_texts({}),
        )

    def _follow(self, call: Call, told: Pass, rows: slice | None) -> None:
        """Look whether a loop of one's own follows the scheduler, and whether its texts can be told apart."""
        done, before = len(call.timesteps), call.previous
        if rows is not None and call.expected is not None:
            follows = done < len(call.plan) and _level(told.timestep) == _level(call.plan[done])
            call.expected = call.expected if follows else None
        if before is not None and rows is not None and call.batch.encoding is None:
            if torch.equal(before.sample, told.sample) and not torch.equal(before.text, told.text):
                raise ValueError(
                    "the same latents were denoised under two texts, and nothing tells which is the negative one: "
                    "embed both inside the `with`, by one pipe.encode_prompt(..., do_classifier_free_guidance=True)"
                )
        call.previous = told

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_queries(self, site: Site, output: torch.Tensor) -> None:
        call, under_way = self._call, self._pass
        if call is None or under_way is None:
            return  # a cross-attention called by itself, outside the denoiser
        told, rows = under_way
        if len(output) != len(told.sample):
            raise ValueError(
                f"{site.name} made queries for a batch of {len(output)}, the denoiser was called with "
                f"{len(told.sample)} latents: its positions are not those of one image"
            )
        if rows is None:
            return
        queries = output.detach()[rows]
        if site.name not in call.collectors:
            call.keys[site.name] = self._key_projection(site, output)
            call.collectors[site.name] = self._collector(call, site, queries)
        call.collectors[site.name].add(queries)

    def _key_projection(self, site: Site, like: torch.Tensor) -> KeyProjection:
        """What makes the keys now; the one that is kept already, if it is the same."""
        to_k, known = site.key_projection(like).to(self._keep.device or like.device), self._keys.get(site.name)
        if known is None or not known.equals(to_k):
            self._keys[site.name] = to_k
        return self._keys[site.name]

    def _collector(self, call: Call, site: Site, queries: torch.Tensor) -> Collector:
        device = self._keep.device
        if self._keep.store == "queries":
            planned = len(call.plan) if call.by_pipeline and call.plan is not None else 4
            return Queries(min(call.expected or planned, 128), device)
        if self._keep.store == "linear":
            return QuerySum(device)
        layer = self._layer(call, site, queries.shape[1])

        def keys(values: torch.Tensor) -> torch.Tensor:
            return layer.keys(values.to(layer.key_weight.device, torch.float32)).to(queries.device)

        known: dict[str | None, torch.Tensor] = {text: keys(each.values) for text, each in call.texts.items()}
        by_image = [{None: keys(own.values), **known} for own in call.embeddings]
        return OnlineMaps(by_image, layer.grid, device)

    def _after_self_queries(self, site: Site, output: torch.Tensor) -> None:
        self._self_queries[site.name] = output

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_self_keys(self, site: Site, output: torch.Tensor) -> None:
        call, under_way, positions = self._call, self._pass, output.shape[1]
        queries = self._self_queries.pop(site.name, None)
        if queries is None or call is None or under_way is None or under_way[1] is None or positions > LARGEST:
            return
        if call.timesteps and positions != max(call.self_positions.values()):
            return  # of a smaller grid than is read
        told, rows = under_way
        if site.name not in call.self_attention:
            mean = self._keep.store != "queries"
            collector = SelfAttentionCollector(
                site.heads, site.scale, linear=site.linear, mean=mean, device=self._keep.device
            )
            call.self_attention[site.name], call.self_positions[site.name] = collector, positions
        late = _level(told.timestep) <= LATE * self._pipe.scheduler.config.num_train_timesteps
        call.self_attention[site.name].add(queries.detach()[rows].clone(), output.detach()[rows].clone(), late=late)

    def _after_pass(self) -> None:
        call, under_way, self._pass = self._call, self._pass, None
        if call is None or under_way is None or under_way[1] is None:
            return
        told, _ = under_way
        call.timesteps.append(told.timestep)
        if len(call.timesteps) == 1:
            self._check_first_pass(call)
        if len(call.timesteps) == call.expected:
            self._finish()

    def _check_first_pass(self, call: Call) -> None:
        missing = [site.name for site in self._sites if site.name not in call.collectors]
        if self._keep.self_attention and not call.self_attention:
            raise ValueError(
                f"self_attention=True needs a self-attention with at most {LARGEST} positions, of which this model has "
                f"none that can be read at latents of {call.latent}"
            )
        if missing:
            self.abandon()
            raise ValueError(f"these layers made no queries through `to_q`, their processors skip it: {missing}")
        self.trace.bytes_needed = call.nbytes
        if self._keep.store == "queries":
            log.info("queries of %d images: %.1f MiB", len(call.embeddings), self.trace.bytes_needed / 2**20)

    # -- records -------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _finish(self) -> None:
        """Turn the call into records."""
        call, self._call, self._pass = self._call, None, None
        if call is None or not call.timesteps:
            return
        timesteps = [round(_level(timestep)) for timestep in call.timesteps]
        options = dict(call.batch.encoding.options) if call.batch.encoding else {}
        device = self._keep.device or call.embeddings[0].values.device
        texts = {text: embeddings.to(device) for text, embeddings in call.texts.items()}
        by_image = options_of_images(options, len(call.prompts))
        check = None
        if None in call.prompts:
            self._embedding = True
            check = check_text(self._reader, options)
            self._embedding = False
        for image, (prompt, own) in enumerate(zip(call.prompts, call.embeddings, strict=True)):
            layers = []
            for site in self._sites:
                kept = call.collectors[site.name].kept(image)
                positions = next(iter(kept.values())).shape[-2]
                layers.append(self._layer(call, site, positions, **kept))
            record = AttentionRecord(
                prompt=prompt,
                prompt_embeddings=own.to(device),
                timesteps=timesteps,
                layers=tuple(layers),
                branch=self._branch,
                stream=self._reader.stream,
                texts=texts,
                self_attention=self._self_attention(call, image),
                embedded_with=by_image[image],
                encoder_check=check if prompt is None else None,
                pipe=self._pipe,
            )
            self.trace.records.append(record)
        self.trace.bytes_needed = call.nbytes

    def _self_attention(self, call: Call, image: int) -> SelfAttention | None:
        if not call.self_attention:
            return None
        positions = max(call.self_positions.values())
        names = [name for name, found in call.self_positions.items() if found == positions]
        site = next(site for site in self._reader.self_sites if site.name == names[0])
        grid = self._reader.grid(call.latent, positions)
        kept = [call.self_attention[name] for name in names]
        return together(kept, grid, site.heads, site.scale, image, linear=site.linear)

    def _layer(self, call: Call, site: Site, positions: int, **kept: Any) -> Layer:
        grid = self._reader.grid(call.latent, positions)
        return Layer(site.name, grid, site.heads, site.scale, call.keys[site.name], **kept)

    def abandon(self) -> None:
        """Drop the call under way."""
        self.trace.unfinished += self._call is not None
        self._call = self._pass = None
        self._in_pipeline = False
        self.trace.bytes_needed = 0

    def _warn_of_unfinished(self) -> None:
        """A loop of one's own is finished by what comes after it; a pipeline's call, or a failed pass, is not."""
        if self._call is None:
            self._pass = None
        elif self._call.by_pipeline or self._pass is not None:
            self.abandon()
            warnings.warn("an earlier call inside this trace did not end: it left no record", stacklevel=2)
        else:
            self._finish()

    def close(self) -> None:
        """The end of the `with`."""
        self._warn_of_unfinished()
        self._encodings.clear()


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _level(timestep: Any) -> float:
    """The noise level of a pass, which all rows of a batch share."""
    return float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)


def _of_others(prompts: Sequence[str | None], call: Sequence[str | None]) -> bool:
    """Whether a loop of one's own goes on with other images."""
    return len(prompts) != len(call) or (None not in (*prompts, *call) and tuple(prompts) != tuple(call))
