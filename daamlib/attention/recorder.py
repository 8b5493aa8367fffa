"""The recorder of models whose image reads a text that it does not change: U-Nets and cross-attention transformers.

A forward hook on each cross-attention's `to_q` sees the queries under every attention processor and cannot change the
image. Hooks on the other projections check, in the first pass, that the layer computes softmax(q k) v of this very
text, and in later ones that it makes the same keys: a map is what the model computes, or there is no record.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .batches import Encoding, Rows
from .calls import Call, Loop, Options, Pass
from .collectors import Collector, OnlineMaps, Queries, QuerySum
from .layers import KeyProjection, Layer
from .placement import on_device
from .readers import Reader
from .readers.sites import Site, refuse_caches
from .real_images import add_noise, check_levels, latents_of, noise_levels
from .record import AttentionRecord
from .recording import Recorder, break_off
from .self_attention import LARGEST, LATE, SelfAttentions
from .softmax import attention_error
from .text import TokenEmbeddings, texts_of_images
from .watch import alone, see_input, see_output, unwatched

CLOSE = {torch.float16: 0.03, torch.bfloat16: 0.1}  # relative differences that rounding explains
CLOSE_IN_FLOAT32 = 1e-3
UNMOVED = {torch.float16: 2**-9, torch.bfloat16: 2**-6}  # of one text's keys in batches of other sizes: two roundings
PROBED = 4  # positions of a pass whose attention is compared with what the layer computed


@dataclass(eq=False)
class Reading:
    """Values that are collected of one cross-attention in a call."""

    site: Site
    keys: KeyProjection
    collector: Collector
    positions: int  # number of queries in each pass
    made: Tensor | None = None  # (image, token, channels), the keys of the first pass
    moved: Tensor | None = None  # how far later passes' keys were from those, largest absolute difference
    error: Tensor | None = None  # how far the output was from softmax(q k) v, largest relative difference
    seen: int = 0  # how often queries were made in the pass under way
    probe: dict[str, Tensor] = field(default_factory=dict)  # queries of some positions, keys and values of that pass

    def see_keys(self, keys: Tensor, text: Tensor, *, first: bool) -> None:
        """Take the (image, token, channels) keys of a pass. ValueError if the first are not those of the text."""
        self.probe["keys"] = keys
        if self.made is not None and not first:
            same = keys.shape == self.made.shape
            moved = (keys - self.made).abs().amax() if same else keys.new_tensor(torch.inf)
            self.moved = moved if self.moved is None else torch.maximum(self.moved, moved)
            return
        self.made = keys.clone()
        if _differ(keys.flatten(0, 1), self.keys(text.flatten(0, 1).to(self.keys.weight))):
            raise ValueError(f"{self.site.name} makes other keys than its `to_k` of the text: its maps are not DAAM's")

    def see_output(self, output: Tensor, mask: Tensor | None, *, first: bool) -> None:
        """Compare the output at some positions with softmax(q k) v: ValueError in the first pass, else at the end."""
        q, k, v = (self.probe[name].unflatten(-1, (self.site.heads, -1)) for name in ("queries", "keys", "values"))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        error = attention_error(q, k, v, output, self.site.scale, mask).nan_to_num()  # NaN is an error where it is read
        self.error = error if self.error is None else torch.maximum(self.error, error)
        if first and not output.isfinite().all():
            values = f"NaN or infinite values: the model overflows in {output.dtype}"
            raise ValueError(f"{self.site.name} computes {values}. Load it in bfloat16 or float32")
        if first and error > CLOSE.get(output.dtype, CLOSE_IN_FLOAT32):
            raise ValueError(
                f"{self.site.name} does not compute softmax(q k) v of its text: its processor {_processor(self.site)} "
                "masks, re-weights or re-uses the attention. Its maps are not DAAM's"
            )


@dataclass(eq=False)
class CallData:
    """Values that are collected of one call."""

    embeddings: list[TokenEmbeddings]  # the text of each image, as the attentions receive it
    text: Tensor  # (image, token, d_text), the same with the tokens that a mask leaves out
    latent: tuple[int, int]  # (h, w)
    texts: Mapping[str, TokenEmbeddings]  # further texts to make maps of
    masked: bool  # whether a mask leaves padding out
    check: Tensor | None  # `check_text`, of embeddings that `encode_prompt` did not return
    self_attention: SelfAttentions
    sites: dict[str, Reading] = field(default_factory=dict)  # by name, of the cross-attentions

    @property
    def nbytes(self) -> int:
        """Bytes of all that the records will hold."""
        return self.self_attention.nbytes + sum(reading.collector.nbytes for reading in self.sites.values())


class AttentionRecorder(Recorder):
    """The hooks of one trace on a model's cross-attentions. ValueError if there is none that can be read."""

    def __init__(self, reader: Reader, options: Options):
        super().__init__(reader.pipe, reader.denoiser, options)
        self._reader, self._sites = reader, reader.sites
        self._keys: dict[str, KeyProjection] = {}  # the latest, shared by the records

    @override
    def register(self, stack: ExitStack) -> None:
        def after(module: Any, react: Callable, site: Site) -> None:
            see_output(stack, module, partial(self._react, react, site))

        def before(module: Any, react: Callable, site: Site) -> None:
            see_input(stack, module, partial(self._react, react, site))

        for site in self._sites:
            after(site.queries, self._after_queries, site)
            before(site.module.to_k, self._before_keys, site)
            after(site.keys, self._after_keys, site)
            after(site.module.to_v, self._after_values, site)
            before(site.module.to_out[0], self._before_output, site)
        for site in self._reader.self_sites if self.options.self_attention else ():
            after(site.queries, self._after_self_queries, site)
            after(site.keys, self._after_self_keys, site)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _react(self, react: Callable, site: Site, value: Tensor) -> None:
        """Show a hook's value to a method, unless the attention is called by itself."""
        if self.under_way is not None and self.call is not None and self.call.data is not None:
            react(self.call, self.call.data, site, value.detach())

    @override
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        return self._reader.read(args, kwargs)

    @override
    def encoding_of(self, arguments: Mapping[str, Any], result: Any) -> Encoding:
        guided = arguments.get("do_classifier_free_guidance")
        positive, negative = self._reader.prompt_of(result, guided=bool(guided))
        guided = negative is not None if guided is None else guided
        if guided and negative is None:  # both texts are returned as one batch, the negative ones first
            negative, positive = positive.chunk(2)
        # zeros stand for no text
        unread = negative is None or not negative.any() or arguments.get("negative_prompt_embeds") is not None
        negatives = None if unread else arguments.get("negative_prompt") or ""
        if self.options.branch == "unconditional":  # the negative text has a second one too, and no instruction (Sana)
            second = arguments.get("negative_prompt_2")
            arguments = {**arguments, "prompt_2": second, "complex_human_instruction": None}
        return Encoding(
            positive=positive.detach().clone(),
            negative=None if negative is None else negative.detach().clone(),
            prompts=texts_of_images(arguments.get("prompt"), len(positive)),
            negatives=texts_of_images(negatives, len(positive)),
            guided=bool(guided),
            options={name: arguments[name] for name in self._reader.options if arguments.get(name) is not None},
        )

    # -- passes --------------------------------------------------------------------------------------------------

    @override
    def open_call(self, call: Call, inputs: Pass, rows: Rows) -> CallData:
        if any(site.module.to_q is not site.to_q for site in self._sites):
            raise ValueError("layers of the denoiser were replaced inside the `with`, as a LoRA does: load it before")
        refuse_caches(self.denoiser)
        text, mask = inputs.text[rows].detach().clone(), None if inputs.mask is None else inputs.mask[rows].clone()
        named, embed = self._reader.named, self._reader.encode
        return CallData(
            embeddings=[
                named(prompt, text[i].clone(), None if mask is None else mask[i], options)
                for i, (prompt, options) in enumerate(zip(call.prompts, call.options, strict=True))
            ],
            text=self._reader.project(text),
            latent=(inputs.sample.shape[-2], inputs.sample.shape[-1]),
            texts={text: embed(text, padding=mask is None, options=call.options[0]) for text in self.options.texts},
            masked=mask is not None,
            check=self.check_text(self._reader, text, call.options[0]),
            self_attention=SelfAttentions(self.options.store != "queries", self.options.device),
        )

    @override
    def begin_pass(self, call: Call, inputs: Pass, rows: Rows) -> None:
        latent = tuple(inputs.sample.shape[-2:])
        for reading in call.data.sites.values():
            reading.seen = 0
        if latent != call.data.latent:
            break_off(call, f"latents of {latent} followed those of {call.data.latent}: maps are of one size")

    def _after_queries(self, call: Call, data: CallData, site: Site, output: Tensor) -> None:
        inputs, rows = self._under_way
        reading = data.sites.get(site.name)
        positions = output.shape[1] if reading is None else reading.positions
        if len(output) != len(inputs.sample) or output.shape[1] != positions:
            break_off(
                call,
                f"{site.name} made queries of shape {tuple(output.shape)} for {len(inputs.sample)} latents, in pass 1 "
                f"at {positions} positions: its positions are not those of one image, as where they are tiles or are "
                "merged",
            )
            return
        queries = output[rows]
        if reading is None:
            self._reader.grid(data.latent, positions)  # ValueError if positions were merged
            keys = self._key_projection(site, output)
            collector = self._collector(call, site, queries, keys)
            reading = data.sites[site.name] = Reading(site, keys, collector, positions)
        reading.seen += 1
        reading.probe = {"queries": queries[:, _probed(positions, call)].clone()}
        reading.collector.add(queries)

    def _before_keys(self, call: Call, data: CallData, site: Site, received: Tensor) -> None:
        if call.timesteps:
            return
        _, rows = self._under_way
        if received.ndim != 3 or received.shape[1:] != data.text.shape[1:] or _differ(received[rows], data.text):
            raise ValueError(
                f"the keys of {site.name} are made of {tuple(received.shape[1:])} values that are not the text of the "
                f"pass, {tuple(data.text.shape[1:])}: its processor {_processor(site)} reads a part of it, or image "
                "rows after it as the first IP-Adapter does. Its maps are not DAAM's"
            )

    def _after_keys(self, call: Call, data: CallData, site: Site, output: Tensor) -> None:
        if site.name in data.sites:
            data.sites[site.name].see_keys(output[self._under_way[1]], data.text, first=not call.timesteps)

    def _after_values(self, call: Call, data: CallData, site: Site, output: Tensor) -> None:
        if site.name in data.sites:
            data.sites[site.name].probe["values"] = output[self._under_way[1]]

    def _before_output(self, call: Call, data: CallData, site: Site, received: Tensor) -> None:
        (inputs, rows), reading = self._under_way, data.sites.get(site.name)
        if reading is None or not {"keys", "values"} <= reading.probe.keys():
            return
        mask = None if inputs.mask is None else inputs.mask[rows].bool().to(received.device)
        if not _adds_images(site.module.processor):
            reading.see_output(received[rows][:, _probed(received.shape[1], call)], mask, first=not call.timesteps)
        reading.probe = {}

    @property
    def _under_way(self) -> tuple[Pass, Rows]:
        assert self.under_way is not None  # `_react` asks
        return self.under_way

    def _key_projection(self, site: Site, like: Tensor) -> KeyProjection:
        """Return what makes the keys now; the stored object if nothing changed."""
        to_k = on_device(site.key_projection(like), self.options.device or like.device)
        known = self._keys.get(site.name)
        if known is None or not known.equals(to_k):
            self._keys[site.name] = to_k
        return self._keys[site.name]

    def _collector(self, call: Call, site: Site, queries: Tensor, to_k: KeyProjection) -> Collector:
        device, data = self.options.device, call.data
        if self.options.store == "queries":
            return Queries(call.planned or 1, device)
        if self.options.store == "linear":
            return QuerySum(device)
        layer = Layer(site.name, self._reader.grid(data.latent, queries.shape[1]), site.heads, site.scale, to_k)

        def keys(text: TokenEmbeddings) -> Tensor:
            return layer.keys(text.values.to(to_k.weight.device, torch.float32)).to(queries.device)

        further = [keys(text) for text in data.texts.values()]
        return OnlineMaps([[keys(own), *further] for own in data.embeddings], layer.grid, device)

    @override
    def end_pass(self, call: Call) -> str | None:
        data, first = call.data, len(call.timesteps) == 1
        how = {site.name: data.sites[site.name].seen if site.name in data.sites else 0 for site in self._sites}
        how = {name: seen for name, seen in how.items() if seen != 1}
        if how:
            return (
                f"these layers made no queries through `to_q`, or made them several times in one pass: {list(how)} "
                f"({how} in pass {len(call.timesteps)}): their processors skip it, or a cache re-uses attention"
            )
        if first and (names := sorted(name for name, reading in data.sites.items() if reading.made is None)):
            return f"these layers made no keys through `to_k`: {names}. Undo fused projections before tracing"
        if first and self.options.self_attention and not data.self_attention.collectors:
            return (
                f"self_attention=True needs a self-attention with at most {LARGEST} positions, of which this model has "
                f"none that can be read at latents of {data.latent}"
            )
        self.trace.bytes_needed = data.nbytes + (data.self_attention.expected(call.planned or 1) if first else 0)
        return None

    def _after_self_queries(self, call: Call, data: CallData, site: Site, output: Tensor) -> None:
        data.self_attention.queries[site.name] = output

    def _after_self_keys(self, call: Call, data: CallData, site: Site, output: Tensor) -> None:
        inputs, rows = self._under_way
        late = inputs.level <= LATE * self.pipe.scheduler.config.num_train_timesteps
        data.self_attention.see_keys(site, output, rows, first=not call.timesteps, late=late)

    # -- records -------------------------------------------------------------------------------------------------

    @override
    def make_records(self, call: Call) -> list[AttentionRecord]:
        data: CallData = call.data
        _check_readings(data.sites)
        timesteps = [int(level) if level == int(level) else level for level in call.timesteps]
        device = self.options.device or data.embeddings[0].values.device
        records = []
        for image, (prompt, own) in enumerate(zip(call.prompts, data.embeddings, strict=True)):
            layers = []
            for site in self._sites:
                reading = data.sites[site.name]
                grid, stored = self._reader.grid(data.latent, reading.positions), reading.collector.of_image(image)
                layers.append(Layer(site.name, grid, site.heads, site.scale, reading.keys, **stored))
            record = AttentionRecord(
                prompt=prompt,
                prompt_embeddings=own.to(device),
                timesteps=timesteps,
                layers=tuple(layers),
                branch=self.options.branch,
                stream=self._reader.stream,
                texts=on_device(data.texts, device),
                self_attention=data.self_attention.of_image(image, partial(self._reader.grid, data.latent)),
                embedded_with=call.options[image],
                masked=data.masked,
                encoder_check=on_device(data.check, device),
                pipe=self.pipe,
            )
            records.append(record)
        self.trace.bytes_needed = data.nbytes
        return records

    # -- real images ---------------------------------------------------------------------------------------------

    @property
    def sides(self) -> int:
        """Number that the sides of a real image must be multiples of."""
        return self._reader.image_factor

    def read_image(self, pixels: Tensor, prompt: str, timesteps: Sequence[int], seed: int) -> AttentionRecord:
        """Return the record of a real image: a pass of the denoiser at each noise level, as a custom loop."""
        pipe, device = self.pipe, self.pipe._execution_device
        self._reader.check_image_model()
        check_levels(timesteps, pipe.scheduler.config.num_train_timesteps - 1)
        factors = [noise_levels(pipe.scheduler, step, device) for step in timesteps]
        noisy = add_noise(latents_of(pipe.vae, pixels.to(device)), factors, seed)
        options, size = self._reader.defaults(), (pixels.shape[-2], pixels.shape[-1])
        with self.attached() as trace, alone(self), self.looping(Loop((prompt,), options=options)):
            levels = list(zip(timesteps, noisy, strict=True))
            for args, kwargs in self._reader.passes(prompt, options, levels, size):
                self.denoiser(*args, **kwargs)
        # as at the end of the pipeline's own call: off-loaded models go back
        unwatched(pipe, "maybe_free_model_hooks")()
        return trace.records[0]


def _check_readings(sites: Mapping[str, Reading]) -> None:
    """ValueError if keys moved, or an output was no softmax(q k) v, in a later pass."""
    moved, wrong = [], []
    for name, reading in sites.items():
        assert reading.made is not None  # `end_pass` asks
        if reading.moved is not None and _is_far(float(reading.moved), reading.made, UNMOVED):
            moved.append(name)
        if reading.error is not None and float(reading.error) > CLOSE.get(reading.made.dtype, CLOSE_IN_FLOAT32):
            wrong.append(name)
    if moved:
        raise ValueError(
            f"the keys of {moved[0]} ({len(moved)} layers in all) changed between passes, as when a callback swaps "
            "the prompt or sets a LoRA's weight: no map holds for all passes. Trace each part as a call of its own"
        )
    if wrong:
        raise ValueError(
            f"{wrong[0]} ({len(wrong)} layers in all) did not compute softmax(q k) v of its text in every pass: "
            "its processor masks, re-weights or re-uses the attention. Its maps are not DAAM's"
        )


def _probed(count: int, call: Call) -> list[int]:
    """Return the positions whose attention is compared: a few, others in each pass."""
    return sorted({(start + 7 * len(call.timesteps)) % count for start in range(0, count, max(1, count // PROBED))})


def _processor(site: Site) -> str:
    return type(site.module.processor).__name__


def _adds_images(processor: Any) -> bool:
    """Return whether it is diffusers' own IP-Adapter, which adds what it reads of images to what the text gives."""
    return hasattr(processor, "to_k_ip") and type(processor).__module__.startswith("diffusers.")


def _is_far(difference: float, like: Tensor, close: Mapping[torch.dtype, float] = CLOSE) -> bool:
    """Return whether a largest absolute difference is more than rounding in the type of `like` explains."""
    return not difference <= close.get(like.dtype, CLOSE_IN_FLOAT32) * float(like.abs().amax())


def _differ(one: Tensor, other: Tensor) -> bool:
    other = other.to(one.device)
    return _is_far(float((one.float() - other.float()).abs().amax()), one)
