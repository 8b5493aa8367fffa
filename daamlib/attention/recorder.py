"""The recorder of models whose image reads a text that it does not change: U-Nets and cross-attention transformers.

A forward hook on each cross-attention's `to_q` sees the queries under every attention processor and cannot change the
image. Hooks on the other projections check, in the first pass, that the layer computes softmax(q k) v of this very
text, and in later ones that it makes the same keys: a map is what the model computes, or there is no record.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override

from .batches import Encoding, Rows
from .calls import Call, Loop, Options, Pass, Recorder
from .collectors import Collector, OnlineMaps, Queries, QuerySum
from .layers import KeyProjection, Layer
from .readers import Reader
from .readers.sites import Site, refuse_caches
from .readers.words import check_text
from .real_images import add_noise, check_levels, latents_of, noise_levels
from .record import AttentionRecord
from .self_attention import LARGEST, LATE, SelfAttention, SelfAttentionCollector, together
from .text import TokenEmbeddings, texts_of_images
from .watch import unwatched

MOST_PASSES = 128  # that room is made for at once
CLOSE = {torch.float16: 0.03, torch.bfloat16: 0.1}  # relative differences that rounding explains
CLOSE_IN_FLOAT32 = 1e-3
UNMOVED = {torch.float16: 2**-9, torch.bfloat16: 2**-6}  # of one text's keys in batches of other sizes: two roundings
PROBED = 4  # positions of a pass whose attention is compared with what the layer computed


@dataclass(eq=False)
class Kept:
    """What is collected of one call.

    Attributes:
        embeddings: the text of each image, as the attentions receive it.
        text: (image, token, d_text), the same with the tokens that a mask leaves out.
        latent: (h, w) of the latents.
        texts: further texts to make maps of.
        masked: whether a mask leaves padding out.
        check: of embeddings that `encode_prompt` did not return, what shows the text encoder as it is (`check_text`).
        collectors: by the site's name; likewise `keys`, what makes the keys, and `made`, the keys of the first pass.
        moved: how far later passes' keys were from those, largest absolute difference.
        seen: how many queries each site made in the pass under way, at how many `positions` in each.
        probe: queries of some positions, keys and values of the pass under way, by the site's name.
        errors: how far a layer's output was from softmax(q k) v there, of the largest value.
        self_attention: by the site's name, with the number of its positions in `self_positions`.
        self_queries: of the pass under way, whose keys are about to come.
    """

    embeddings: list[TokenEmbeddings]
    text: torch.Tensor
    latent: tuple[int, int]
    texts: Mapping[str, TokenEmbeddings]
    masked: bool = False
    check: torch.Tensor | None = None
    collectors: dict[str, Collector] = field(default_factory=dict)
    keys: dict[str, KeyProjection] = field(default_factory=dict)
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    probe: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    errors: dict[str, torch.Tensor] = field(default_factory=dict)
    self_attention: dict[str, SelfAttentionCollector] = field(default_factory=dict)
    self_positions: dict[str, int] = field(default_factory=dict)
    self_queries: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all that the records will hold."""
        own = sum(collector.nbytes for collector in self.collectors.values())
        return own + sum(collector.nbytes for collector in self.self_attention.values())


class AttentionRecorder(Recorder):
    """The hooks of one trace on a model's cross-attentions.

    Args:
        reader: of the pipeline's model family.
        options: what was asked for.

    Raises:
        ValueError: the denoiser has no cross-attention that can be read, or a cache that re-uses attention.
    """

    def __init__(self, reader: Reader, options: Options):
        super().__init__(reader.pipe, reader.denoiser, options)
        self._reader, self._sites = reader, reader.sites
        self._keys: dict[str, KeyProjection] = {}  # the latest, shared by the records

    @override
    def register(self, stack: ExitStack) -> None:
        def after(module: Any, react: Any, site: Site) -> None:
            stack.callback(module.register_forward_hook(lambda _, args, output: react(site, output)).remove)

        def before(module: Any, react: Any, site: Site) -> None:
            stack.callback(module.register_forward_pre_hook(lambda _, args: react(site, args[0])).remove)

        for site in self._sites:
            after(site.queries, self._after_queries, site)
            before(site.module.to_k, self._before_keys, site)
            after(site.keys, self._after_keys, site)
            after(site.module.to_v, self._after_values, site)
            before(site.module.to_out[0], self._before_output, site)
        for site in self._reader.self_sites if self.options.self_attention else ():
            after(site.queries, self._after_self_queries, site)
            after(site.keys, self._after_self_keys, site)

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
            arguments = {**arguments} | {
                "prompt_2": arguments.get("negative_prompt_2"),
                "complex_human_instruction": None,
            }
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
    def open_call(self, call: Call, told: Pass, rows: Rows) -> Kept:
        if any(site.module.to_q is not site.to_q for site in self._sites):
            raise ValueError("layers of the denoiser were replaced inside the `with`, as a LoRA does: load it before")
        refuse_caches(self.denoiser)
        text, mask = told.text[rows].detach().clone(), None if told.mask is None else told.mask[rows].clone()
        embed = self._reader.encode
        given = any(all(encoding.text_of(row) is None for encoding in self.encodings) for row in text)
        return Kept(
            embeddings=[
                self._reader.named(prompt, text[i].clone(), None if mask is None else mask[i], options)
                for i, (prompt, options) in enumerate(zip(call.prompts, call.options, strict=True))
            ],
            text=self._reader.project(text),
            latent=(told.sample.shape[-2], told.sample.shape[-1]),
            texts={text: embed(text, padding=mask is None, options=call.options[0]) for text in self.options.texts},
            masked=mask is not None,
            check=check_text(self._reader, call.options[0]) if given and self._reader.embeds else None,
        )

    @override
    def begin_pass(self, call: Call, told: Pass, rows: Rows) -> None:
        call.kept.seen, latent = {}, tuple(told.sample.shape[-2:])
        if latent != call.kept.latent:
            self.break_off(call, f"latents of {latent} followed those of {call.kept.latent}: maps are of one size")

    def _under_way(self) -> tuple[Call, Kept, Pass, Rows] | None:
        """The call and pass that a hook belongs to; None for an attention that is called by itself."""
        call = self.call
        return (
            None if self.under_way is None or call is None or call.kept is None else (call, call.kept, *self.under_way)
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_queries(self, site: Site, output: torch.Tensor) -> None:
        if (now := self._under_way()) is None:
            return
        call, kept, told, rows = now
        if len(output) != len(told.sample) or output.shape[1] != kept.positions.setdefault(site.name, output.shape[1]):
            self.break_off(
                call,
                f"{site.name} made queries of shape {tuple(output.shape)} for {len(told.sample)} latents, in pass 1 "
                f"at {kept.positions.get(site.name)} positions: its positions are not those of one image, as where "
                "they are tiles or are merged",
            )
            return
        kept.seen[site.name] = kept.seen.get(site.name, 0) + 1
        queries = output.detach()[rows]
        if site.name not in kept.collectors:
            self._reader.grid(kept.latent, queries.shape[1])  # ValueError if positions were merged
            kept.keys[site.name] = self._key_projection(site, output)
            kept.collectors[site.name] = self._collector(call, site, queries)
        kept.probe[site.name] = {"queries": queries[:, _positions(queries.shape[1], call)].clone()}
        kept.collectors[site.name].add(queries)

    @torch.no_grad()
    def _before_keys(self, site: Site, received: torch.Tensor) -> None:
        if (now := self._under_way()) is None or now[0].timesteps:
            return
        _, kept, _, rows = now
        if received.ndim != 3 or received.shape[1:] != kept.text.shape[1:] or _differ(received[rows], kept.text):
            raise ValueError(
                f"the keys of {site.name} are made of {tuple(received.shape[1:])} values that are not the text of the "
                f"pass, {tuple(kept.text.shape[1:])}: its processor {_processor(site)} reads a part of it, or image "
                "rows beside it as the first IP-Adapter does. Its maps are not DAAM's"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_keys(self, site: Site, output: torch.Tensor) -> None:
        if (now := self._under_way()) is None:
            return
        call, kept, _, rows = now
        keys, first = output.detach()[rows], kept.made.get(site.name)
        kept.probe.get(site.name, {})["keys"] = keys
        if call.timesteps and first is not None:
            moved = (keys - first).abs().amax() if keys.shape == first.shape else keys.new_tensor(torch.inf)
            kept.moved[site.name] = torch.maximum(kept.moved[site.name], moved)
            return
        kept.made[site.name], kept.moved[site.name] = keys.clone(), keys.new_zeros(())
        expected = kept.keys[site.name](kept.text.flatten(0, 1).to(kept.keys[site.name].weight))
        if _differ(keys.flatten(0, 1), expected):
            raise ValueError(f"{site.name} makes other keys than its `to_k` does of the text: its maps are not DAAM's")

    def _after_values(self, site: Site, output: torch.Tensor) -> None:
        if (now := self._under_way()) is not None and site.name in now[1].probe:
            now[1].probe[site.name]["values"] = output.detach()[now[3]]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _before_output(self, site: Site, received: torch.Tensor) -> None:
        """Compare what the layer computed at some positions with softmax(q k) v; of later passes at the call's end."""
        if (now := self._under_way()) is None:
            return
        call, kept, told, rows = now
        parts = kept.probe.pop(site.name, {})
        if "values" not in parts or "keys" not in parts or _adds_images(site.module.processor):
            return
        queries, keys, values = (  # (image, position or token, head, d_head)
            parts[name].float().unflatten(-1, (site.heads, -1)) for name in ("queries", "keys", "values")
        )
        logits = torch.einsum("nphd,nmhd->nphm", queries, keys) * site.scale
        if told.mask is not None:
            logits = logits.masked_fill(~told.mask[rows].bool().to(logits.device)[:, None, None], -torch.inf)
        expected = torch.einsum("nphm,nmhd->nphd", logits.softmax(dim=-1), values).flatten(2)
        output = received.detach()[rows][:, _positions(received.shape[1], call)].float()
        error = (output - expected).abs().amax() / output.abs().amax()
        if call.timesteps:  # NaN is told of where it is read
            kept.errors[site.name] = torch.maximum(kept.errors[site.name], error.nan_to_num())
            return
        kept.errors[site.name] = error.nan_to_num()
        if not output.isfinite().all():
            raise ValueError(
                f"{site.name} computes NaN or infinite values: the model overflows in {received.dtype}. Load it in "
                "bfloat16 or float32"
            )
        if error > CLOSE.get(received.dtype, CLOSE_IN_FLOAT32):
            raise ValueError(
                f"{site.name} does not compute softmax(q k) v of its text: its processor {_processor(site)} masks, "
                "re-weights or re-uses the attention. Its maps are not DAAM's"
            )

    def _key_projection(self, site: Site, like: torch.Tensor) -> KeyProjection:
        """What makes the keys now; the stored object if nothing changed."""
        to_k, known = site.key_projection(like).to(self.options.device or like.device), self._keys.get(site.name)
        if known is None or not known.equals(to_k):
            self._keys[site.name] = to_k
        return self._keys[site.name]

    def _collector(self, call: Call, site: Site, queries: torch.Tensor) -> Collector:
        device, kept = self.options.device, call.kept
        if self.options.store == "queries":
            return Queries(min(call.planned or 4, MOST_PASSES), device)
        if self.options.store == "linear":
            return QuerySum(device)
        layer = self._layer(kept, site, queries.shape[1])

        def keys(values: torch.Tensor) -> torch.Tensor:
            return layer.keys(values.to(layer.key_weight.device, torch.float32)).to(queries.device)

        known = [keys(each.values) for each in kept.texts.values()]
        by_image = [[keys(own.values), *known] for own in kept.embeddings]
        return OnlineMaps(by_image, layer.grid, device)

    @override
    def end_pass(self, call: Call) -> str | None:
        kept, first = call.kept, len(call.timesteps) == 1
        missing = [site.name for site in self._sites if kept.seen.get(site.name) != 1]
        if missing:
            how = {name: kept.seen.get(name, 0) for name in missing}
            return (
                f"these layers made no queries through `to_q`, or made them several times in one pass: {missing} "
                f"({how} in pass {len(call.timesteps)}): their processors skip it, or a cache re-uses attention"
            )
        if first and kept.made.keys() != kept.collectors.keys():
            names = sorted(kept.collectors.keys() - kept.made.keys())
            return f"these layers made no keys through `to_k`: {names}. Undo fused projections before tracing"
        if first and self.options.self_attention and not kept.self_attention:
            return (
                f"self_attention=True needs a self-attention with at most {LARGEST} positions, of which this model has "
                f"none that can be read at latents of {kept.latent}"
            )
        self.trace.bytes_needed = kept.nbytes
        return None

    # -- real images ---------------------------------------------------------------------------------------------

    @property
    def sides(self) -> int:
        """What the sides of a real image must be multiples of."""
        return self._reader.image_factor

    def read_image(self, pixels: torch.Tensor, prompt: str, timesteps: Sequence[int], seed: int) -> AttentionRecord:
        """Return the record of a real image: a pass of the denoiser at each noise level, as a custom loop."""
        pipe, device = self.pipe, self.pipe._execution_device
        self._reader.check_image_model()
        check_levels(timesteps, pipe.scheduler.config.num_train_timesteps - 1)
        factors = [noise_levels(pipe.scheduler, step, device) for step in timesteps]
        noisy = add_noise(latents_of(pipe.vae, pixels.to(device)), factors, seed)
        options, size = self._reader.defaults(), (pixels.shape[-2], pixels.shape[-1])
        with self.attached() as trace, self.alone(), self.looping(Loop((prompt,), options=options)):
            levels = list(zip(timesteps, noisy, strict=True))
            for args, kwargs in self._reader.passes(prompt, options, levels, size):
                self.denoiser(*args, **kwargs)
        # as at the end of the pipeline's own call: off-loaded models go back
        unwatched(pipe, "maybe_free_model_hooks")()
        return trace.records[0]

    # -- self-attention ------------------------------------------------------------------------------------------

    def _after_self_queries(self, site: Site, output: torch.Tensor) -> None:
        if (now := self._under_way()) is not None:
            now[1].self_queries[site.name] = output

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_self_keys(self, site: Site, output: torch.Tensor) -> None:
        if (now := self._under_way()) is None or output.shape[1] > LARGEST:
            return
        call, kept, told, rows = now
        queries, positions = kept.self_queries.pop(site.name, None), output.shape[1]
        if queries is None or (call.timesteps and positions != max(kept.self_positions.values())):
            return  # of a smaller grid than is read
        if site.name not in kept.self_attention:
            mean = self.options.store != "queries"
            collector = SelfAttentionCollector(
                site.heads, site.scale, linear=site.linear, mean=mean, device=self.options.device
            )
            kept.self_attention[site.name], kept.self_positions[site.name] = collector, positions
        late = told.level <= LATE * self.pipe.scheduler.config.num_train_timesteps
        kept.self_attention[site.name].add(queries.detach()[rows].clone(), output.detach()[rows].clone(), late=late)

    def _self_attention(self, kept: Kept, image: int) -> SelfAttention | None:
        if not kept.self_attention:
            return None
        positions = max(kept.self_positions.values())
        names = [name for name, found in kept.self_positions.items() if found == positions]
        site = next(site for site in self._reader.self_sites if site.name == names[0])
        grid = self._reader.grid(kept.latent, positions)
        collected = [kept.self_attention[name] for name in names]
        return together(collected, grid, site.heads, site.scale, image, linear=site.linear)

    # -- records -------------------------------------------------------------------------------------------------

    @override
    def make_records(self, call: Call) -> list[AttentionRecord]:
        kept, device = call.kept, self.options.device or call.kept.embeddings[0].values.device
        moved = [name for name, far in kept.moved.items() if _is_far(float(far), kept.made[name], UNMOVED)]
        if moved:
            raise ValueError(
                f"the keys of {moved[0]} ({len(moved)} layers in all) changed between passes, as when a callback swaps "
                "the prompt or sets a LoRA's weight: no map holds for all passes. Trace each part as a call of its own"
            )
        close = {name: CLOSE.get(kept.made[name].dtype, CLOSE_IN_FLOAT32) for name in kept.errors}
        wrong = [name for name, error in kept.errors.items() if float(error) > close[name]]
        if wrong:
            raise ValueError(
                f"{wrong[0]} ({len(wrong)} layers in all) did not compute softmax(q k) v of its text in every pass: "
                "its processor masks, re-weights or re-uses the attention. Its maps are not DAAM's"
            )
        texts = {text: embeddings.to(device) for text, embeddings in kept.texts.items()}
        timesteps = [int(level) if level == int(level) else level for level in call.timesteps]
        records = []
        for image, (prompt, own) in enumerate(zip(call.prompts, kept.embeddings, strict=True)):
            layers = []
            for site in self._sites:
                fields = kept.collectors[site.name].kept(image)
                layers.append(self._layer(kept, site, next(iter(fields.values())).shape[-2], **fields))
            record = AttentionRecord(
                prompt=prompt,
                prompt_embeddings=own.to(device),
                timesteps=timesteps,
                layers=tuple(layers),
                branch=self.options.branch,
                stream=self._reader.stream,
                texts=texts,
                self_attention=self._self_attention(kept, image),
                embedded_with=call.options[image],
                masked=kept.masked,
                encoder_check=None if kept.check is None else kept.check.to(device),
                pipe=self.pipe,
            )
            records.append(record)
        self.trace.bytes_needed = kept.nbytes
        return records

    def _layer(self, kept: Kept, site: Site, positions: int, **fields: Any) -> Layer:
        grid = self._reader.grid(kept.latent, positions)
        return Layer(site.name, grid, site.heads, site.scale, kept.keys[site.name], **fields)


def _positions(count: int, call: Call) -> list[int]:
    """Return the positions whose attention is compared: a few, others in each pass."""
    return sorted({(start + 7 * len(call.timesteps)) % count for start in range(0, count, max(1, count // PROBED))})


def _processor(site: Site) -> str:
    return type(site.module.processor).__name__


def _adds_images(processor: Any) -> bool:
    """Return whether it is diffusers' own IP-Adapter, which adds what it reads of images to what the text gives."""
    return hasattr(processor, "to_k_ip") and type(processor).__module__.startswith("diffusers.")


def _is_far(difference: float, like: torch.Tensor, close: Mapping[torch.dtype, float] = CLOSE) -> bool:
    """Return whether a largest absolute difference is more than rounding in the type of `like` explains."""
    return not difference <= close.get(like.dtype, CLOSE_IN_FLOAT32) * float(like.abs().amax())


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    other = other.to(one.device)
    return _is_far(float((one.float() - other.float()).abs().amax()), one)
