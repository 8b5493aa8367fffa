"""The life of a traced call, which all recorders share: where it begins, whose images its rows are, where it ends.

A pass of the denoiser belongs to a call of the traced pipeline or to a custom loop that `trace.loop` announces; any
other pass is refused. A call of the pipeline shows itself by methods that pipelines call on their way: `check_inputs`,
`encode_prompt`, which is also where a prompt's embeddings are seen, and `maybe_free_model_hooks` at the end.

What cannot be read is refused in the first step, before work is lost. What goes wrong later leaves the images alone:
the call ends without a record, with a warning that says why.
"""

import abc
import functools
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch

from ..pipeline import denoiser_of, uncompiled
from .batches import Encoding, Rows
from .text import options_of_images, texts_of_images
from .watch import is_running, watch

log = logging.getLogger("daamlib")

Branch = Literal["conditional", "unconditional"]
Store = Literal["queries", "linear", "maps"]
SAME_LEVEL, SAME_LEVEL_IN_HALF = 1e-4, 2**-8  # relative differences of one noise level, as bfloat16 rounds it
EMBED = ("encode_prompt", "_encode_prompt")  # methods that embed prompts; an older pipeline has the second alone


_ALONE: ContextVar[Any] = ContextVar("alone", default=None)  # a recorder whose passes no other trace is to see


class EmptyTraceError(IndexError, ValueError):
    """No image was generated inside the `with`, or none of that number."""


@dataclass(frozen=True)
class Options:
    """What `trace` was asked to read and store; see there."""

    branch: Branch = "conditional"
    store: Store = "queries"
    texts: tuple[str, ...] = ()
    device: torch.device | None = None
    self_attention: bool = False
    middle: bool = False
    stream: str | None = None
    words: tuple[str, ...] = ()


class Trace(Sequence[Any]):
    """The records of the images generated inside a `trace`, in order of generation; also after the `with`."""

    def __init__(self, recorder: "Recorder") -> None:
        self._recorder: Recorder | None = recorder  # while the `with` is open
        self.records: list[Any] = []
        self.problems: list[str] = []  # why calls left no record
        self.bytes_needed = 0  # by the latest call, when it is complete: its queries, sums or maps of all images

    @contextmanager
    def loop(
        self,
        prompts: str | Sequence[str | None],
        *,
        num_images_per_prompt: int = 1,
        rows: slice | Sequence[int] | None = None,
        prompt_embeds: torch.Tensor | None = None,
    ) -> Iterator["Loop"]:
        """Announce a custom denoising loop: whose images its passes make. It leaves one record for each image.

            text, _ = pipe.encode_prompt("a car", pipe.device, 1, do_classifier_free_guidance=False)
            latents = torch.randn(1, 4, 32, 32)
            pipe.scheduler.set_timesteps(2)
            with torch.no_grad(), daamlib.trace(pipe) as trace, trace.loop("a car"):
                for t in pipe.scheduler.timesteps:
                    noise = pipe.unet(latents, t, encoder_hidden_states=text).sample
                    latents = pipe.scheduler.step(noise, t, latents).prev_sample
            trace[0].daam()["car"]  # (H, W)

        Around a call of the pipeline that is given `prompt_embeds` it names the texts that these stand for.

        Args:
            prompts: the text of each image, which names the tokens of its embeddings; None for an unnamed one.
            num_images_per_prompt: how many images in a row have each text.
            rows: which rows of each pass of the denoiser are the images. By default all; or, of twice as many rows with
                the same latents in both halves, the last half, as diffusers orders guidance (the first half for a trace
                of the unconditional branch).
            prompt_embeds: (image, token, width) embeddings as the denoiser receives them. With these the images' rows
                are those with this text, and a pass under other texts alone is no step, as where a guider makes a pass
                for each text.

        Yields:
            The loop; `with loop.pause():` around passes of the denoiser that are no denoising step of these images.

        Raises:
            ValueError: the trace has ended, a loop or a call is under way, or no pass was made.
            TypeError: `prompts` is no text or list of texts.
        """
        if self._recorder is None:
            raise ValueError("the trace has ended: open the loop inside its `with` block")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not listed or not all(isinstance(prompt, str | None) for prompt in listed) or num_images_per_prompt < 1:
            raise TypeError(f"prompts must be a text or a list of texts, one for each image, got {prompts!r}")
        names = texts_of_images(listed, len(listed) * num_images_per_prompt)
        with self._recorder.looping(Loop(names, rows, prompt_embeds)) as loop:
            yield loop

    def __len__(self) -> int:
        if self._recorder is not None:
            self._recorder.complete()
        return len(self.records)

    def __getitem__(self, index):
        count = len(self)
        if not isinstance(index, slice) and not -count <= index < count:
            calls = f"; {len(self.problems)} calls left no record: {self.problems[-1]}" if self.problems else ""
            reason = (
                f"no record {index}: the trace holds {count}"
                if count
                else "the trace is empty: no image was generated to its end inside the `with` block, by the traced "
                "pipeline or a loop that trace.loop announced"
            )
            raise EmptyTraceError(reason + calls)
        return self.records[index]

    def __repr__(self) -> str:
        return f"Trace({len(self)} records, {self.bytes_needed / 2**20:.1f} MiB in the latest call)"

    def close(self) -> None:
        """Let go of the pipeline."""
        self._recorder = None


class Loop:
    """A custom denoising loop, see `Trace.loop`."""

    def __init__(
        self,
        prompts: tuple[str | None, ...],
        rows: Any = None,
        prompt_embeds: torch.Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        if prompt_embeds is not None and (prompt_embeds.ndim != 3 or len(prompt_embeds) != len(prompts)):
            raise ValueError(
                f"expected prompt_embeds of shape ({len(prompts)}, token, width), one for each image, got "
                f"{tuple(prompt_embeds.shape)}"
            )
        self.prompts, self.options, self.paused, self.used = prompts, options or {}, False, False
        self._rows, self._embeds = rows, prompt_embeds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out passes that are no denoising step of the loop's images: a negative text's, an inversion's."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def find(self, told: "Pass", branch: Branch) -> Rows | None:
        """Return the images' rows of a pass; None if it is no step of theirs. ValueError if nothing tells."""
        batch, n = len(told.sample), len(self.prompts)
        if self._embeds is not None:
            own = self._embeds
            alike = [i for i in range(batch - n + 1) if torch.equal(told.text[i : i + n], own.to(told.text))]
            if own.shape[1:] == told.text.shape[1:] and len(alike) == 1:
                return slice(alike[0], alike[0] + n)
            if len(alike) > 1:
                raise ValueError(f"the loop's prompt_embeds are the text of {len(alike)} places in a batch of {batch}")
            return None
        if self._rows is not None:
            try:
                found = torch.arange(batch)[self._rows].flatten().tolist()
            except (IndexError, TypeError) as error:
                raise ValueError(f"rows={self._rows!r} do not fit a pass of {batch} rows: {error}") from error
            if len(set(found)) != n:
                raise ValueError(f"rows={self._rows!r} are {len(set(found))} of the pass' {batch} rows, for {n} images")
            return found
        if batch == n and branch == "conditional":
            return slice(0, n)
        if batch == 2 * n:
            if torch.equal(told.sample[:n], told.sample[n:]):
                return slice(n, batch) if branch == "conditional" else slice(0, n)
            what = "the latents of its two halves differ, as those of other images do"
        else:
            what = "expected one row for each image, or two under guidance"
        raise ValueError(
            f"the denoiser was called with {batch} rows in a loop of {n} images: {what}. Say which rows are the "
            "images, trace.loop(prompts, num_images_per_prompt=..., rows=...)"
        )


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of one call of the denoiser.

    Attributes:
        sample: (batch, ...) latents.
        timestep: the noise level in the scheduler's units, a number or a tensor.
        text: (batch, token, width) as `encode_prompt` returned it.
        mask: (batch, token), which tokens take part; None: all.
        is_step: whether it can be a denoising step, by its other inputs.
        arguments: all inputs by name, for recorders that run a pass again.
    """

    sample: torch.Tensor
    timestep: Any
    text: torch.Tensor
    mask: torch.Tensor | None = None
    is_step: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property  # reading a tensor makes a GPU's host wait
    def levels(self) -> list[float]:
        """The noise levels of its rows; one where it is one for all."""
        return torch.as_tensor(self.timestep).flatten().tolist()

    @property
    def level(self) -> float:
        """The noise level, which all rows share."""
        return float(self.levels[0])


class Plan:
    """The noise levels that the scheduler plans for a call, each of which is one step."""

    def __init__(self, timesteps: Any):
        self._levels = [] if timesteps is None else [float(t) for t in torch.as_tensor(timesteps).flatten()]
        self._at = -1
        self._last: float | None = None

    def problem(self, told: Pass) -> str | None:
        """Return why a pass is not the next step, None if it is."""
        level, last = told.level, self._last
        half = isinstance(told.timestep, torch.Tensor) and told.timestep.dtype in (torch.float16, torch.bfloat16)
        near = (SAME_LEVEL_IN_HALF if half else SAME_LEVEL) * max(abs(level), 1e-3)
        places = [i for i, planned in enumerate(self._levels) if abs(planned - level) <= near]
        if not places and self._at < 0:
            self._levels = []  # the denoiser is told its noise in units that are not the scheduler's
        self._last = level
        if not self._levels:
            if last is not None and level > last:
                return "a higher noise level, as in an inversion,"
            return "a noise level twice" if level == last else None
        following = [place for place in places if place > self._at]
        if not following:
            known = "a noise level twice" if places else "a noise level that the scheduler did not plan"
            return "an earlier noise level again" if places and self._at not in places else known
        self._at = following[0]
        return None


@dataclass(eq=False)
class Call:
    """A call of the pipeline, or a custom loop, in the making.

    Attributes:
        prompts: the text of each image that its passes read, None if unknown.
        options: what later texts are embedded with, of each image.
        plan: the scheduler's noise levels; None for a custom loop.
        planned: how many passes will be made, if that is known.
        kept: what the recorder collects.
        timesteps: of the passes made.
        broken: why it will leave no record.
        previous: the noisy latents and noise level of the loop's latest pass.
    """

    prompts: tuple[str | None, ...]
    options: list[dict[str, Any]]
    plan: Plan | None
    planned: int | None
    kept: Any = None
    timesteps: list[float] = field(default_factory=list)
    broken: str | None = None
    previous: tuple[torch.Tensor, float] | None = None


class Recorder(abc.ABC):
    """The hooks of one trace on a pipeline and its denoiser, and the call that they see.

    Args:
        pipe: the pipeline.
        denoiser: its denoiser.
        options: what was asked for.
    """

    def __init__(self, pipe: Any, denoiser: Any, options: Options):
        self.trace = Trace(self)
        self.pipe, self.denoiser, self.options = pipe, denoiser, options
        self.encodings: list[Encoding] = []
        self.frame: FrameType | None = None  # of the pipeline's function that makes the call
        self._says_end = False  # whether that function, or one that it led through, calls `maybe_free_model_hooks`
        self.loop: Loop | None = None
        self.call: Call | None = None
        self.under_way: tuple[Pass, Rows] | None = None  # under way, and its rows to read
        self._latest: tuple[Any, Any] = (None, None)  # a text of this call, and what its rows are
        self._gradients: set[float] = set()  # noise levels of this call's passes with gradients of the latents
        own = [inspect.unwrap(part) for kind in type(pipe).__mro__ for part in vars(kind).values() if callable(part)]
        self._methods = {part.__code__ for part in own if hasattr(part, "__code__")}

    # -- what a recorder of a kind of model does -----------------------------------------------------------------

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
    def open_call(self, call: Call, told: Pass, rows: Rows) -> Any:
        """Return what to collect a call with, at the beginning of its first pass."""

    @abc.abstractmethod
    def begin_pass(self, call: Call, told: Pass, rows: Rows) -> None:
        """Prepare for a pass that is a step."""

    @abc.abstractmethod
    def end_pass(self, call: Call) -> str | None:
        """Check a pass that was made; return why the call cannot be read any further."""

    @abc.abstractmethod
    def make_records(self, call: Call) -> list[Any]:
        """Return a record of each image. ValueError if they would break a law."""

    @property
    @abc.abstractmethod
    def sides(self) -> int:
        """What the sides of a real image in pixels must be multiples of."""

    @abc.abstractmethod
    def read_image(self, pixels: torch.Tensor, prompt: str, timesteps: Sequence[int], seed: int) -> Any:
        """Return the record of a real image, (1, 3, H, W) in [-1, 1], noised at each timestep."""

    # -- the `with` ----------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[Trace]:
        """Hold all hooks while the `with` lasts."""
        with ExitStack() as stack:
            stack.callback(self._end)
            stack.enter_context(uncompiled(self.pipe))
            stack.enter_context(watch(self.pipe, "check_inputs", self._after_check))
            sizes = getattr(self.pipe, "image_processor", None)  # of PixArt and Sana
            stack.enter_context(watch(sizes, "classify_height_width_bin", self._after_rounding))
            embed = next((name for name in EMBED if hasattr(self.pipe, name)), EMBED[0])
            stack.enter_context(watch(self.pipe, embed, self._after_prompt))
            stack.enter_context(watch(self.pipe, "maybe_free_model_hooks", self._after_call))
            self.register(stack)
            stack.callback(self.denoiser.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove)
            stack.callback(self.denoiser.register_forward_hook(lambda *_: self._after_pass()).remove)
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
        if is_running(self.frame):
            return
        frame: FrameType | None = caller
        outermost, says_end = None, False
        while frame is not None:
            # only a method's variables are looked at: looking keeps those of a frame alive until it ends
            if frame.f_code in self._methods and frame.f_locals.get("self") is self.pipe:
                outermost = frame
                says_end = says_end or "maybe_free_model_hooks" in frame.f_code.co_names
            frame = frame.f_back
        if outermost is not None:
            self._close()
            self.encodings, self.frame, self._says_end = [], outermost, says_end
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

    def _after_rounding(self, caller: FrameType, arguments: dict, result: tuple[int, int]) -> None:
        """ValueError if the image is made in a size of another ratio, and cut to the requested one afterwards."""
        height, width = arguments["height"], arguments["width"]
        scale = max(height / result[0], width / result[1])
        if int(result[0] * scale) > height or int(result[1] * scale) > width:
            raise ValueError(
                f"use_resolution_binning: an image of {height} x {width} is cut out of one of {result[0]} x "
                f"{result[1]}, its maps would not lie where its pixels are. Give height={result[0]}, width={result[1]} "
                "or use_resolution_binning=False"
            )

    @torch.inference_mode(False)  # what is kept would else never be differentiable
    @torch.no_grad()
    def _after_prompt(self, caller: FrameType, arguments: dict, result: Any) -> None:
        self._enter(caller)
        if arguments.get("prompt_embeds") is not None:  # then no text was embedded
            arguments = {**arguments, "prompt": None, "prompt_2": None}
        self.encodings = [*self.encodings[-7:], self.encoding_of(arguments, result)]

    def _after_call(self, caller: FrameType, arguments: dict, result: Any) -> None:
        """The last act of a pipeline's call; an interrupted call has made fewer passes than planned."""
        if is_running(self.frame):
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hide the passes made inside from the other traces of this thread."""
        before = _ALONE.set(self)
        try:
            yield
        finally:
            _ALONE.reset(before)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _next_pass(self, args: tuple, kwargs: dict, gradients: bool) -> tuple[Pass, Rows] | None:
        """Return the pass that begins and its rows, None if it is no step of the call under way."""
        if _ALONE.get() not in (None, self):
            return None
        failed, self.under_way, inside = self.under_way is not None, None, is_running(self.frame)
        if failed and self.call is not None:
            self.call.broken = "a pass of the denoiser failed"
        if not inside and self.loop is None:
            self._close()
            raise ValueError(
                f"the denoiser was called by itself, outside of a call of the traced {type(self.pipe).__name__}: "
                "trace cannot know whose images its rows are. Announce the loop: `with trace.loop(prompts) as loop:` "
                "around it, and `with loop.pause():` around passes that are no denoising step"
            )
        if not inside and self.loop is not None and self.loop.paused:
            return None
        told = self.read(args, kwargs)
        if inside and gradients and told.sample.requires_grad:  # to steer the latents, as in Attend-and-Excite
            self._gradients.add(told.level)
            return None
        if self.call is not None and self.call.broken:
            return None
        rows, encoding = self.rows_of_call(told) if inside else self._rows_of_loop(told)
        if rows is None or not told.is_step:
            return None
        call = self.call = self.call or self._begin_call(told, rows, encoding, inside)
        if len(set(told.levels)) > 1:
            problem: str | None = "several noise levels at once"
        else:
            problem = self._repeats(call, told, rows) if call.plan is None else call.plan.problem(told)
        if problem:
            self.break_off(
                call,
                f"the denoiser was called at {problem} under the images' text (noise level {told.level:g}, pass "
                f"{len(call.timesteps) + 1}): trace cannot tell which passes are the steps of one image, as with "
                "tiles, several stages or perturbed passes. Announce each custom loop of its own, and put passes that "
                "are no step in `with loop.pause():`",
                after=2,
            )
            return None
        if call.kept is None:
            call.kept = self.open_call(call, told, rows)
        self.begin_pass(call, told, rows)
        return told, rows

    @staticmethod
    def break_off(call: Call | None, problem: str, after: int = 1) -> None:
        """Raise a problem before `after` passes were made; a later one costs the call its record, not its images."""
        if call is None or len(call.timesteps) < after:
            raise ValueError(problem)
        call.broken, call.kept = problem, None

    def rows_of_call(self, told: Pass) -> tuple[Rows | None, Encoding | None]:
        """The rows of the images in a pass of the pipeline, None if it has none, and whose text they have."""
        text, known = self._latest
        if text is not None and text[0] is told.text and text[1] == _version(told.text):
            return known  # comparing tensors makes a GPU's host wait
        branch, perturbed = self.options.branch, bool(getattr(self.pipe, "do_perturbed_attention_guidance", False))
        halves, problem = None, self._unknown_text(told)
        for encoding in reversed(self.encodings):
            try:
                halves = encoding.halves(told.text, perturbed=perturbed)
            except ValueError as error:
                problem = str(error)
            if halves is not None:
                break
        if halves is not None and len(halves) == 2:
            one, other = (self._noisy(told, rows) for rows in halves.values())
            if not torch.equal(one, other):
                halves = None
                problem = (
                    "under guidance, the prompts' rows have other latents than the negative texts', as tiles of "
                    "several prompts do: trace cannot tell which rows are the images"
                )
        if halves is None:
            self.break_off(self.call, problem)
            return None, None
        if branch == "unconditional" and encoding.negative is None and not encoding.guided:
            raise ValueError(
                'branch="unconditional" needs classifier-free guidance, which is off in this call or pass '
                f'({len(told.sample)} latents): give guidance_scale > 1, or trace branch="conditional"'
            )
        known = halves.get(branch), encoding
        self._latest = ((told.text, _version(told.text)), known)
        return known

    def _noisy(self, told: Pass, rows: Rows) -> torch.Tensor:
        """Return the latents of some rows, without the channels of an image that is given with them."""
        return told.sample[rows][:, : getattr(self.denoiser.config, "out_channels", None)]

    def _repeats(self, call: Call, told: Pass, rows: Rows) -> str | None:
        """Return why a pass of a custom loop is no step of its images, None if it is one."""
        if call.previous is None or _ALONE.get() is self:  # the levels of a real image are the user's, in any order
            return None
        latents, level = call.previous
        if level == told.level:
            if torch.equal(latents, self._noisy(told, rows)):
                return "a noise level twice with the same latents"
            scheduler: Any = getattr(self.pipe, "scheduler", None)  # Heun's and others' plan a level twice
            planned = getattr(scheduler, "num_inference_steps", None) and [float(t) for t in scheduler.timesteps]
            return "a noise level twice that the scheduler planned once" if (planned or []).count(level) == 1 else None
        return "its first noise level again" if told.level == call.timesteps[0] else None

    def _unknown_text(self, told: Pass) -> str:
        if not self.encodings:
            return (
                f"{type(self.pipe).__name__} does not embed its prompts by `encode_prompt`: trace cannot tell which "
                "rows of its batches are the images' prompts"
            )
        images = len(self.encodings[-1].positive)
        return (
            f"the denoiser was called with {len(told.sample)} latents for {images} images, under a text that "
            "`encode_prompt` did not return: it mixes other passes in, or the prompt was changed on its way or by a "
            "callback; trace cannot tell the rows apart"
        )

    def _rows_of_loop(self, told: Pass) -> tuple[Rows | None, Encoding | None]:
        assert self.loop is not None
        rows = self.loop.find(told, self.options.branch)
        if rows is None:
            return None, None
        known = [[encoding.text_of(row) for encoding in self.encodings] for row in told.text[rows]]
        for row, (prompt, texts) in enumerate(zip(self.loop.prompts, known, strict=True)):
            others = [text for text in texts if text is not None]
            if self.options.branch == "conditional" and prompt is not None and others and prompt not in others:
                raise ValueError(
                    f"image {row} of the loop was announced as {prompt!r}, its row of the pass has the text "
                    f"{others[-1]!r}: say which rows are the images, trace.loop(prompts, rows=...), in their order; "
                    "put passes of other texts in loop.pause()"
                )
        return rows, next((each for each, text in zip(self.encodings, known[0], strict=True) if text is not None), None)

    def _begin_call(self, told: Pass, rows: Rows, encoding: Encoding | None, inside: bool) -> Call:
        images, branch = len(told.sample[rows]), self.options.branch
        prompts: tuple[str | None, ...] = (None,) * images
        if inside:
            assert encoding is not None
            prompts = encoding.prompts if branch == "conditional" else encoding.negatives
        if self.loop is not None:
            self.loop.used = True
            if inside and len(self.loop.prompts) != images:
                raise ValueError(f"trace.loop announced {len(self.loop.prompts)} images, the call makes {images}")
            if branch == "conditional" and set(prompts) == {None}:
                prompts = self.loop.prompts
        plan = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)  # None before `set_timesteps`
        options = encoding.options if encoding is not None else {} if self.loop is None else self.loop.options
        return Call(
            prompts=prompts,
            options=options_of_images(options, images),
            plan=Plan(plan) if inside else None,
            planned=getattr(self.pipe, "num_timesteps", None) or (0 if plan is None else len(plan)) if inside else None,
        )

    def _after_pass(self) -> None:
        under_way, self.under_way, call = self.under_way, None, self.call
        if under_way is None or call is None or call.broken:
            return
        told, rows = under_way
        call.timesteps.append(told.level)
        try:
            problem = self.end_pass(call)
            if problem:
                self.break_off(call, problem, after=2)
        except ValueError:
            self._drop(None)
            raise
        if call.plan is None:
            call.previous = self._noisy(told, rows).detach().clone(), told.level
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
            return
        self.trace.records += records

    def complete(self) -> None:
        """Finish a call that made all its passes and has returned without saying so."""
        call = self.call
        if call is not None and self.loop is None and not self._says_end and not is_running(self.frame):
            if self.under_way is None and len(call.timesteps) == call.planned:
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


def _version(text: torch.Tensor) -> int:
    """Return what changes when a tensor is written to."""
    return -1 if text.is_inference() else text._version
