"""Collecting the queries while a pipeline generates.

A forward hook on each cross-attention's `to_q` sees the queries under every attention processor (SDPA, sliced,
xformers, IP-Adapter, LoRA) and cannot change the image; hooks on the U-Net mark the steps. All are removed when the
`with` ends, also by an exception. What is kept is made outside inference mode: a tensor of that mode can never be
differentiated through, and the embeddings of records are optimised.
"""

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..pipeline import unet_of
from .fingerprint import Fingerprint
from .layers import Layer
from .record import AttentionRecord
from .text import PAD, TokenEmbeddings, prompt_tokens

log = logging.getLogger("daamlib")

Branch = Literal["conditional", "unconditional"]
Store = Literal["queries", "linear"]


class EmptyTraceError(IndexError, ValueError):
    """No image was generated inside the `with`, or none of that number."""


@dataclass
class _Call:
    """One pipeline call in the making. Buffers are (image, step, h*w, channel), or (image, h*w, channel) sums."""

    prompts: list[str | None]
    embeddings: torch.Tensor  # (image, token, d_text), conditional half
    latent: tuple[int, int]
    steps: int  # that the pipeline announced
    plan: Any  # the scheduler's timesteps, a new object in every call
    timesteps: list[Any] = field(default_factory=list)
    done: int = 0  # U-Net passes that ended
    rows: slice | None = None  # of the U-Net's batch in the pass under way: the wanted half
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, torch.Tensor] = field(default_factory=dict)


class Trace(Sequence[AttentionRecord]):
    """The records of the images generated inside a `trace`, in order of generation; also after the `with`."""

    def __init__(self, pipe, branch: Branch, store: Store, middle: bool):
        self._pipe, self._branch, self._store = pipe, branch, store
        self._attentions = cross_attentions(pipe, middle=middle)
        self._queries = {name: attention.to_q for name, attention in self._attentions.items()}
        self._signature = inspect.signature(unet_of(pipe).forward)
        self._records: list[AttentionRecord] = []
        self._call: _Call | None = None
        self._prompts: list[str | None] | None = None  # of the call that is about to start
        self._keys: dict[str, torch.Tensor] = {}  # the latest key weights, shared by the records
        self._announced: int | None = None  # passes of a `trace_image`, which is no pipeline call

    def __len__(self) -> int:
        self._finish()
        return len(self._records)

    def __getitem__(self, index):
        self._finish()
        if not isinstance(index, slice) and not -len(self._records) <= index < len(self._records):
            count = len(self._records)
            raise EmptyTraceError(
                f"no record {index}: the trace holds {count}"
                if count
                else "the trace is empty: no image was "
                "generated inside the `with` block; call the traced pipeline there"
            )
        return self._records[index]

    def __repr__(self) -> str:
        return f"Trace({len(self)} records, {self.bytes_needed / 2**20:.1f} MiB in the latest call)"

    @property
    def bytes_needed(self) -> int:
        """Bytes that the latest call's queries (or sums) take when it is complete; 0 before its first step."""
        if self._call is None:
            return sum(record.nbytes for record in self._records[-1:])
        return sum(buffer.numel() * buffer.element_size() for buffer in self._call.buffers.values())

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _before_prompt(self, prompt=None, num_images_per_prompt=None, **_) -> None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self._prompts = None if prompts is None else [p for p in prompts for _ in range(num_images_per_prompt or 1)]

    def _before_end(self, **_) -> None:
        """The pipeline's last act, and the last chance to see that it was interrupted: the next call resets that."""
        if self._call is not None and self._call.done and getattr(self._pipe, "interrupt", False):
            self._call.steps = self._call.done
        self._finish()

    @torch.inference_mode(False)
    def _before_unet(self, unet, args: tuple, kwargs: dict) -> None:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        sample, text = arguments["sample"], arguments["encoder_hidden_states"]
        call, plan = self._call, self._pipe.scheduler.timesteps
        # a call goes on while its passes all ended and more are to come
        if call is None or call.plan is not plan or not len(call.timesteps) == call.done < call.steps:
            self._finish()
            if self._call is not None:
                self._call = None
                warnings.warn("an earlier pipeline call inside this trace did not end: it left no record", stacklevel=2)
            call = self._call = self._begin(sample, text[0] if isinstance(text, tuple) else text)
        call.rows = self._rows(len(sample), len(call.prompts))
        call.timesteps.append(arguments["timestep"])

    def _rows(self, batch: int, images: int) -> slice:
        """The wanted half of this pass; the conditional one is the last. A callback may end guidance half-way."""
        if batch == 2 * images:
            return slice(images, None) if self._branch == "conditional" else slice(0, images)
        if batch == images and self._branch == "conditional":
            return slice(None)
        raise ValueError(
            f"the U-Net was called with {batch} latents for {images} images: the {self._branch} half of guidance is "
            "not among them, or trace cannot tell which it is"
        )

    def _begin(self, sample: torch.Tensor, text: torch.Tensor) -> _Call:
        pipe = self._pipe
        guided = self._announced is None and bool(getattr(pipe, "do_classifier_free_guidance", False))
        if self._branch == "unconditional" and not guided:
            raise ValueError(
                'branch="unconditional" needs classifier-free guidance, which is off in this call: give '
                'guidance_scale > 1, or trace branch="conditional"'
            )
        images = len(sample) // (2 if guided else 1)
        prompts = self._prompts or [None] * images
        self._prompts = None
        if len(prompts) != images:
            raise ValueError(
                f"the U-Net was called with {len(sample)} latents for {len(prompts)} images"
                f"{' under guidance' if guided else ''}: it mixes other passes in, trace cannot tell them apart"
            )
        if any(attention.to_q is not self._queries[name] for name, attention in self._attentions.items()):
            raise ValueError("layers of the U-Net were replaced inside the `with`, as a LoRA does: load it before")
        return _Call(
            prompts=prompts,
            embeddings=text[-images:].detach().clone(),  # the conditional half is the last one
            latent=tuple(sample.shape[-2:]),
            steps=self._announced or getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps),
            plan=pipe.scheduler.timesteps,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_queries(self, name: str, output: torch.Tensor) -> None:
        call = self._call
        if call is None:
            return  # a cross-attention called by itself, outside the U-Net
        queries = output.detach()[call.rows]
        if name not in call.keys:
            call.keys[name] = self._key_weight(name, output)
            if self._store == "queries":
                call.buffers[name] = queries.new_empty((len(queries), call.steps, *queries.shape[1:]))
            else:
                call.buffers[name] = queries.new_zeros(queries.shape, dtype=torch.float32)
        if self._store == "queries":
            call.buffers[name][:, call.done] = queries
        else:
            call.buffers[name] += queries

    def _key_weight(self, name: str, queries: torch.Tensor) -> torch.Tensor:
        """(inner, d_text): W_k as it acts now. Asked of the layer itself, so LoRA, its scale and off-loading count."""
        d_text = self._call.embeddings.shape[-1]
        identity = torch.eye(d_text, dtype=queries.dtype, device=queries.device)
        weight = self._attentions[name].to_k(identity).T.contiguous()
        known = self._keys.get(name)
        if known is None or known.shape != weight.shape or not torch.equal(known, weight):
            self._keys[name] = weight
        return self._keys[name]

    def _after_unet(self) -> None:
        call = self._call
        call.done += 1
        if call.done == 1 and len(call.buffers) < len(self._attentions):
            missing = [name for name in self._attentions if name not in call.buffers]
            raise ValueError(f"these layers made no queries through `to_q`, their processors skip it: {missing}")
        if call.done == 1 and self._store == "queries":
            log.info("queries of %d images: %.1f MiB", len(call.prompts), self.bytes_needed / 2**20)

    def _close(self) -> None:
        self._finish()
        self._call = None  # an unfinished call keeps nothing alive

    # -- records -------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _finish(self) -> None:
        """Turn the call into records if it is complete."""
        call = self._call
        if call is None or call.done != call.steps:
            return
        self._records.extend(self._record(call, image) for image in range(len(call.prompts)))
        self._call = None

    def _record(self, call: _Call, image: int) -> AttentionRecord:
        prompt = call.prompts[image]
        values = call.embeddings[image]
        if prompt is None:
            tokens, words = tuple(str(i) for i in range(len(values))), ()
        else:
            tokens, words = prompt_tokens(self._pipe, prompt)
            tokens += (PAD,) * (len(values) - len(tokens))
        layers = []
        for name, attention in self._attentions.items():
            kept = call.buffers[name][image]
            kept = {"queries": kept[: call.done]} if self._store == "queries" else {"query_sum": kept}
            grid = layer_grid(call.latent, call.buffers[name].shape[-2])
            layers.append(Layer(name, grid, attention.heads, float(attention.scale), call.keys[name], **kept))
        timesteps = [round(float(t.flatten()[0] if isinstance(t, torch.Tensor) else t)) for t in call.timesteps]
        embeddings = TokenEmbeddings(values, tokens, words)
        return AttentionRecord(prompt, embeddings, timesteps, tuple(layers), self._branch, self._pipe)


@contextmanager
def trace(pipe, *, branch: Branch = "conditional", store: Store = "queries", middle: bool = False) -> Iterator[Trace]:
    """Collect the cross-attention of every image that `pipe` generates inside the `with`.

        with daamlib.trace(pipe) as trace:
            images = pipe(["a car", "a person"], num_images_per_prompt=2).images
        trace[3].daam()["person"]  # (H, W)

    pipe: a diffusers pipeline with a U-Net with cross-attention (SD 1.x, SD 2.x, SDXL; also img2img, LoRA).
    branch: the half of classifier-free guidance to read. store: "queries" keeps what any later text needs:
    steps * sum over layers of (h*w * channels) numbers an image in the pipeline's dtype (logged after the first step,
    and `trace.bytes_needed`); "linear" only their float32 sums over the steps, enough for LDAAM. middle: read the
    middle block too, which DAAM leaves out.

    The image is the same bit for bit. A call that an exception ends before its last U-Net pass leaves no record, one
    that `pipe._interrupt` ends leaves that of the passes made; the records of the calls before stay. A U-Net that
    `torch.compile` has compiled runs uncompiled inside the `with`, as everything else that is compiled: code that was
    compiled before the hooks came would never call them. Its image is the uncompiled model's.

    Raises TypeError or ValueError for a pipeline without U-Net cross-attention or an unknown option.
    """
    for name, value, known in (("branch", branch, Branch), ("store", store, Store)):
        if value not in known.__args__:
            raise ValueError(f"{name} must be one of {known.__args__}, got {value!r}")
    tracer = Trace(pipe, branch, store, middle)
    with ExitStack() as stack:
        stack.callback(tracer._close)
        if _is_compiled(pipe.unet):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # the only places where a prompt's text and a call's end can be seen
        stack.enter_context(_watch(pipe, "encode_prompt", tracer._before_prompt))
        stack.enter_context(_watch(pipe, "maybe_free_model_hooks", tracer._before_end))
        for name, to_q in tracer._queries.items():
            hook = lambda module, args, output, name=name: tracer._after_queries(name, output)  # noqa: E731
            stack.callback(to_q.register_forward_hook(hook).remove)
        unet = unet_of(pipe)
        stack.callback(unet.register_forward_pre_hook(tracer._before_unet, with_kwargs=True).remove)
        stack.callback(unet.register_forward_hook(lambda *_: tracer._after_unet()).remove)
        yield tracer


@contextmanager
def _watch(pipe, method: str, before: Callable[..., None]) -> Iterator[None]:
    """Call `before` with the arguments of every `pipe.method(...)`, on this instance alone."""
    original = getattr(pipe, method, None)
    if original is None:
        yield
        return
    signature, shadowed = inspect.signature(original), vars(pipe).get(method)

    def watched(*args, **kwargs):
        before(**signature.bind(*args, **kwargs).arguments)
        return original(*args, **kwargs)

    watched.__signature__ = signature  # for a trace inside this one
    vars(pipe)[method] = watched
    try:
        yield
    finally:
        vars(pipe).pop(method, None)
        if shadowed is not None:
            vars(pipe)[method] = shadowed


def _is_compiled(unet: torch.nn.Module) -> bool:
    """Whether any of it is, by `torch.compile(unet)` or, in place, by a module's own `compile()`."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in unet.modules())


def cross_attentions(pipe, *, middle: bool) -> dict[str, torch.nn.Module]:
    """The U-Net's cross-attention modules by name. TypeError or ValueError if there are none that DAAM can read."""
    unet = unet_of(pipe)
    found = {
        name.replace("_orig_mod.", ""): module  # of a block that is compiled by itself
        for name, module in unet.named_modules()
        if name.endswith("attn2")
        and getattr(module, "is_cross_attention", False)
        and (middle or not name.startswith("mid_block"))
    }
    if not found:
        raise ValueError(
            f"the {type(unet).__name__} of this pipeline has no cross-attention (`attn2`) in its down and up blocks: "
            "only text-conditional U-Nets with CrossAttn blocks can be traced"
        )
    for name, module in found.items():
        odd = [part for part in ("norm_q", "norm_k", "norm_cross") if getattr(module, part, None)]
        if odd or getattr(module.to_k, "bias", None) is not None:
            raise ValueError(f"{name} normalises or shifts its keys ({odd or 'bias'}): its maps are not DAAM's")
    return found


def fingerprint_of(pipe, *, middle: bool = False) -> Fingerprint:
    """The fingerprint of a pipeline's U-Net as it is now, with the LoRA it holds; `middle`: the middle block too."""

    def project(to_k: torch.nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
        weight = next(to_k.parameters())
        # off-loaded layer by layer, weights are on `meta` and come to where the pipeline computes
        device = pipe._execution_device if weight.device.type == "meta" else weight.device
        return to_k(embeddings.to(device, weight.dtype))

    found = cross_attentions(pipe, middle=middle)
    d_text = next(iter(found.values())).cross_attention_dim
    return Fingerprint.of_keys({name: functools.partial(project, a.to_k) for name, a in found.items()}, d_text)


def layer_grid(latent: tuple[int, int], positions: int) -> tuple[int, int]:
    """(h, w) of a layer with `positions` = h * w: the latent's, halved (rounding up) as often as it takes."""
    h, w = latent
    while h * w > positions and h * w > 1:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != positions:
        raise ValueError(f"{positions} positions are no halving of the {latent[0]} x {latent[1]} latent")
    return h, w
