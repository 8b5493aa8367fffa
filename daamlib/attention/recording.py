"""The life of a traced call, which all recorders share: where it begins, whose images its rows are, where it ends.

A pass of the denoiser belongs to a call of the traced pipeline or to a custom loop that `trace.loop` announces; any
other pass is refused. A call of the pipeline shows itself by methods that pipelines call on their way: `check_inputs`,
`encode_prompt`, which is also where a prompt's embeddings are seen, and `maybe_free_model_hooks` at the end.

What cannot be read is refused in the first step, before work is lost. What goes wrong later leaves the images alone:
the call ends without a record, with a warning that says why.
"""

import abc
import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch

from ..pipeline import denoiser_of, uncompiled
from .batches import Encoding, Rows, rows_of_images
from .calls import Call, Loop, LoopPlan, Options, Pass, Plan, Trace
from .placement import free_bytes
from .readers.sites import EMBED
from .readers.words import check_text
from .text import options_of_images
from .watch import is_running, see_output, watch, who_is_alone

log = logging.getLogger("daamlib")

BY_ITSELF = (
    "trace cannot know whose images its rows are. Announce the loop: `with trace.loop(prompts) as loop:` around it, "
    "and `with loop.pause():` around passes that are no denoising step"
)
NO_STEP = (
    "trace cannot tell which passes are the steps of one image, as with tiles, several stages or perturbed passes. "
    "Announce each custom loop of its own, and put passes that are no step in `with loop.pause():`"
)


class ModelHooks(abc.ABC):
    """Work of the recorder of one kind of model at the moments that `Recorder` finds."""

    @abc.abstractmethod
    def register(self, stack: ExitStack) -> None:
        """Register the hooks on the attentions, to be removed with the stack."""

    @abc.abstractmethod
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        """Return the inputs of a pass. ValueError if they are not those of images."""

    @abc.abstractmethod
    def encoding_of(self, arguments: Mapping[str, Any], result: Any) -> Encoding:
        """Return what a call of `encode_prompt` took and returned."""

    @abc.abstractmethod
    def open_call(self, call: Call, inputs: Pass, rows: Rows) -> Any:
        """Return what to collect a call with, at the beginning of its first pass."""

    @abc.abstractmethod
    def begin_pass(self, call: Call, inputs: Pass, rows: Rows) -> None:
        """Prepare for a pass that is a step."""

    @abc.abstractmethod
    def end_pass(self, call: Call) -> str | None:
        """Check a pass that was made; return why the call cannot be read any further."""

    @abc.abstractmethod
    def make_records(self, call: Call) -> list[Any]:
        """Return a record of each image. ValueError if they would break a law."""


class Recorder(ModelHooks):
    """The hooks of one trace on a pipeline and its denoiser, and the call that they see."""

    def __init__(self, pipe: Any, denoiser: Any, options: Options):
        self.trace = Trace(self)
        self.pipe, self.denoiser, self.options = pipe, denoiser, options
        self.encodings: list[Encoding] = []
        self.frame: FrameType | None = None  # of the pipeline's function that makes the call
        self._says_end = False  # whether that function, or one that it led through, calls `maybe_free_model_hooks`
        self.loop: Loop | None = None
        self.call: Call | None = None
        self.under_way: tuple[Pass, Rows] | None = None  # and its rows to read
        self._latest: tuple[Any, Any] = (None, None)  # a text of this call, and what its rows are
        self._gradients: set[float] = set()  # noise levels of this call's passes with gradients of the latents

    # -- the `with` ----------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[Trace]:
        """Hold all hooks while the `with` lasts."""
        with ExitStack() as stack:
            stack.callback(self._end)
            stack.enter_context(uncompiled(self.pipe))
            stack.enter_context(watch(self.pipe, "check_inputs", self._after_check))
            sizes = getattr(self.pipe, "image_processor", None)  # of PixArt and Sana
            stack.enter_context(watch(sizes, "classify_height_width_bin", _refuse_rounding))
            embed = next((name for name in EMBED if hasattr(self.pipe, name)), EMBED[0])
            stack.enter_context(watch(self.pipe, embed, self._after_prompt))
            stack.enter_context(watch(self.pipe, "maybe_free_model_hooks", self._after_call))
            self.register(stack)
            stack.callback(self.denoiser.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove)
            see_output(stack, self.denoiser, self._after_pass)
            try:
                yield self.trace
            except BaseException:
                self._drop(None)
                raise
            self._close()

    def _end(self) -> None:
        self.encodings, self.frame, self._latest = [], None, (None, None)
        self.trace.close()

    @contextmanager
    def looping(self, loop: Loop) -> Iterator[Loop]:
        """Hold a custom loop open. ValueError inside another loop or a call, or if no pass was made."""
        if self.loop is not None or is_running(self.frame):
            raise ValueError("a loop or a call of the pipeline is under way: announce one loop after the other")
        self._close()
        self.loop, self._latest = loop, (None, None)
        try:
            yield loop
            if not loop.used:
                raise ValueError("no pass of the denoiser was made inside trace.loop that is a step of its images")
            self._finish()
        except BaseException:
            self._drop(None)
            raise
        finally:
            self.loop, self._latest = None, (None, None)

    # -- the pipeline --------------------------------------------------------------------------------------------

    def _enter(self, caller: FrameType) -> None:
        """Begin a call, if a function of the pipeline led to the call of the watched method."""
        frame, says_end = (None, False) if is_running(self.frame) else _call_of(self.pipe, caller)
        if frame is None:
            return
        self._close()
        self.encodings, self.frame, self._says_end = [], frame, says_end
        self._latest, self._gradients = (None, None), set()
        if denoiser_of(self.pipe) is not self.denoiser:
            raise ValueError(
                "the pipeline's denoiser was replaced inside the `with`: its passes cannot be seen. Replace it "
                "before tracing, and trace each denoiser by a `with` of its own"
            )

    def _after_check(self, caller: FrameType, arguments: dict, result: Any) -> None:
        self._enter(caller)
        if arguments.get("padding_mask_crop") is not None:
            raise ValueError(
                "padding_mask_crop: the denoiser sees a crop of the image, its maps would not lie where the image's "
                "pixels are. Crop the image and the mask yourself, and trace the call of the crop"
            )

    @torch.inference_mode(False)  # what is stored would else never be differentiable
    @torch.no_grad()
    def _after_prompt(self, caller: FrameType, arguments: dict, result: Any) -> None:
        self._enter(caller)
        if arguments.get("prompt_embeds") is not None:  # then no text was embedded
            arguments = {**arguments, "prompt": None, "prompt_2": None}
        self.encodings = [*self.encodings[-7:], self.encoding_of(arguments, result)]

    def _after_call(self, caller: FrameType, arguments: dict, result: Any) -> None:
        """End the pipeline's call; an interrupted call has made fewer passes than planned."""
        if not is_running(self.frame):
            return
        if levels := self._gradients.difference(() if self.call is None else self.call.timesteps):
            self._drop(
                f"all its passes at the noise levels {sorted(levels, reverse=True)} computed gradients, so that "
                "none is known for a step: announce a custom loop"
            )
        self._finish()
        self.frame = None

    # -- the denoiser --------------------------------------------------------------------------------------------

    def _before_pass(self, denoiser: Any, args: tuple, kwargs: dict) -> None:
        try:
            self.under_way = self._next_pass(args, kwargs, torch.is_grad_enabled())
        except (ValueError, TypeError):
            self._drop(None)
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def _next_pass(self, args: tuple, kwargs: dict, gradients: bool) -> tuple[Pass, Rows] | None:
        """Return the pass that begins and its rows, None if it is no step of the call under way."""
        if who_is_alone() not in (None, self):
            return None
        failed, self.under_way, inside = self.under_way is not None, None, is_running(self.frame)
        if failed and self.call is not None:
            self.call.broken = "a pass of the denoiser failed"
        if not inside and self.loop is None:
            self._close()
            kind = type(self.pipe).__name__
            raise ValueError(f"the denoiser was called by itself, outside of a call of the traced {kind}: {BY_ITSELF}")
        if not inside and self.loop is not None and self.loop.paused:
            return None
        inputs = self.read(args, kwargs)
        if inside and gradients and inputs.sample.requires_grad:  # to steer the latents, as in Attend-and-Excite
            self._gradients.add(inputs.level)
            return None
        if self.call is not None and self.call.broken:
            return None
        rows, encoding = self.rows_of_call(inputs) if inside else self._rows_of_loop(inputs)
        if rows is None or not inputs.is_step:
            return None
        call = self.call = self.call or _begin_call(self, len(inputs.sample[rows]), encoding, inside)
        problem: str | None = "several noise levels at once"
        if len(set(inputs.levels)) == 1:
            latents = inputs.sample[rows][:, : self._channels]
            problem = None if call.plan is None else call.plan.problem(inputs, latents)
        if problem:
            where = f"under the images' text (noise level {inputs.level:g}, pass {len(call.timesteps) + 1})"
            break_off(call, f"the denoiser was called at {problem} {where}: {NO_STEP}", after=2)
            return None
        if call.data is None:
            call.data = self.open_call(call, inputs, rows)
            call.limit = _limit(self.options, inputs.sample.device)
        self.begin_pass(call, inputs, rows)
        return inputs, rows

    def rows_of_call(self, inputs: Pass) -> tuple[Rows | None, Encoding | None]:
        """Return the rows of the images in a pass of the pipeline, None if it has none, and whose text they have."""
        text, known = self._latest
        if text is not None and text[0] is inputs.text and text[1] == _version(inputs.text):
            return known  # comparing tensors makes a GPU's host wait
        branch, perturbed = self.options.branch, bool(getattr(self.pipe, "do_perturbed_attention_guidance", False))
        try:
            if not self.encodings:
                raise ValueError(
                    f"{type(self.pipe).__name__} does not embed its prompts by `encode_prompt`: trace cannot tell "
                    "which rows of its batches are the images' prompts"
                )
            rows, encoding = rows_of_images(inputs, self.encodings, branch, self._channels, perturbed=perturbed)
        except ValueError as error:
            break_off(self.call, str(error))
            return None, None
        if branch == "unconditional" and encoding.negative is None and not encoding.guided:
            raise ValueError(
                'branch="unconditional" needs classifier-free guidance, which is off in this call or pass '
                f'({len(inputs.sample)} latents): give guidance_scale > 1, or trace branch="conditional"'
            )
        self._latest = ((inputs.text, _version(inputs.text)), (rows, encoding))
        return rows, encoding

    def check_text(self, reader: Any, texts: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor | None:
        """Return what shows the text encoder as it is, if one of the texts was not returned by `encode_prompt`."""
        given = any(all(encoding.text_of(row) is None for encoding in self.encodings) for row in texts)
        return check_text(reader, options) if given else None

    @property
    def _channels(self) -> int | None:
        """The number of noisy channels of the latents, before those of an image that is given with them."""
        return getattr(self.denoiser.config, "out_channels", None)

    def _rows_of_loop(self, inputs: Pass) -> tuple[Rows | None, Encoding | None]:
        assert self.loop is not None
        rows = self.loop.find(inputs, self.options.branch)
        return rows, None if rows is None else self.loop.encoding(inputs, rows, self.encodings, self.options.branch)

    def _after_pass(self, output: Any) -> None:
        under_way, self.under_way, call = self.under_way, None, self.call
        if under_way is None or call is None or call.broken:
            return
        call.timesteps.append(under_way[0].level)
        try:
            if problem := self.end_pass(call) or _too_large(call, self.trace.bytes_needed):
                break_off(call, problem, after=2)
        except ValueError:
            self._drop(None)
            raise
        if len(call.timesteps) == 1 and self.options.store == "queries":
            log.info("queries of %d images: %.1f MiB", len(call.prompts), self.trace.bytes_needed / 2**20)

    # -- the end -------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _finish(self) -> None:
        """Turn the call into records, or say why it leaves none."""
        call, self.call, self.under_way = self.call, None, None
        if call is None or not call.timesteps:
            return
        try:
            records = [] if call.broken else self.make_records(call)
        except (ValueError, TypeError, RuntimeError) as error:  # the images are made: they must not be lost
            call.broken = str(error)
        if call.broken:
            self._drop(call.broken)
        else:
            self.trace.records += records

    def complete(self) -> None:
        """Finish a call that made all its passes and has returned without saying so."""
        whole = self.call is not None and len(self.call.timesteps) == self.call.planned and self.under_way is None
        if whole and self.loop is None and not self._says_end and not is_running(self.frame):
            self._finish()

    def _close(self) -> None:
        """End the call of a pipeline that comes to nothing any more: an exception ended it."""
        self.complete()
        if self.call is not None:
            self._drop("an earlier call inside this trace did not end")
        self.frame = None

    def _drop(self, problem: str | None) -> None:
        """Leave the call under way without a record, with a warning if it is not an exception that says why."""
        if self.call is not None and problem is None:
            self.trace.problems.append("an exception ended it")
        if problem is not None:
            self.trace.problems.append(problem)
            warnings.warn(f"a call leaves no record: {problem}", stacklevel=2)
        self.call = self.under_way = None
        self.trace.bytes_needed = 0


def _begin_call(recorder: Recorder, images: int, encoding: Encoding | None, inside: bool) -> Call:
    """Return a new call of the pipeline (`inside`), or of a custom loop, of so many images."""
    pipe, loop, branch = recorder.pipe, recorder.loop, recorder.options.branch
    prompts: tuple[str | None, ...] = (None,) * images
    if inside:
        assert encoding is not None
        prompts = encoding.prompts if branch == "conditional" else encoding.negatives
    if loop is not None:
        loop.used = True
        if inside and len(loop.prompts) != images:
            raise ValueError(f"trace.loop announced {len(loop.prompts)} images, the call makes {images}")
        if branch == "conditional" and set(prompts) == {None}:
            prompts = loop.prompts
    options = encoding.options if encoding is not None else {} if loop is None else loop.options
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)  # None before `set_timesteps`
    number = getattr(pipe, "num_timesteps", None) or (0 if timesteps is None else len(timesteps))
    plan = Plan(timesteps) if inside else None if who_is_alone() is recorder else LoopPlan(scheduler)
    return Call(prompts, options_of_images(options, images), plan, number if inside else None, in_loop=not inside)


def _limit(options: Options, device: torch.device) -> float:
    """Return the bytes that a call's records may take, by `max_bytes`: a share of what is free, or a number."""
    most = math.inf if options.max_bytes is None else options.max_bytes
    return most if most > 1 else most * free_bytes(options.device or device)


def _too_large(call: Call, needed: int) -> str | None:
    """Return what to do if the records of a call take more bytes than they may."""
    if needed <= call.limit:
        return None
    size, steps = f"{needed / 2**30:.3g} GiB", max(call.planned or 0, len(call.timesteps))
    return (
        f"the records of this call, {len(call.prompts)} images of {steps} steps, take {size}, more than the "
        f'{call.limit / 2**30:.3g} GiB of max_bytes: give store="maps" or "linear", a pipeline in half precision, '
        'fewer images or steps in a call, store_device="cpu" to spare a GPU, or a larger max_bytes (None: no limit)'
    )


def break_off(call: Call | None, problem: str, after: int = 1) -> None:
    """Raise a problem before `after` passes were made; a later one costs the call its record, not its images."""
    if call is None or len(call.timesteps) < after:
        raise ValueError(problem)
    call.broken, call.data = problem, None


def _call_of(pipe: Any, caller: FrameType) -> tuple[FrameType | None, bool]:
    """Return the outermost function of the pipeline that led here, and whether one of them says where a call ends."""
    own = [inspect.unwrap(part) for kind in type(pipe).__mro__ for part in vars(kind).values() if callable(part)]
    methods = {part.__code__ for part in own if hasattr(part, "__code__")}
    frame: FrameType | None = caller
    outermost, says_end = None, False
    while frame is not None:
        # only a method's variables are looked at: looking keeps those of a frame alive until it ends
        if frame.f_code in methods and frame.f_locals.get("self") is pipe:
            outermost = frame
            says_end = says_end or "maybe_free_model_hooks" in frame.f_code.co_names
        frame = frame.f_back
    return outermost, says_end


def _refuse_rounding(caller: FrameType, arguments: dict, result: tuple[int, int]) -> None:
    """ValueError if the image is made in a size of another ratio, and cut to the requested one afterwards."""
    height, width = arguments["height"], arguments["width"]
    scale = max(height / result[0], width / result[1])
    if int(result[0] * scale) > height or int(result[1] * scale) > width:
        raise ValueError(
            f"use_resolution_binning: an image of {height} x {width} is cut out of one of {result[0]} x {result[1]}: "
            f"its maps lie elsewhere. Give height={result[0]}, width={result[1]} or use_resolution_binning=False"
        )


def _version(text: torch.Tensor) -> int:
    """Return what changes when a tensor is written to."""
    return -1 if text.is_inference() else text._version
