"""Parts of a traced call: its records, its passes and their noise levels, and custom loops."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from .batches import Encoding, Rows
from .text import texts_of_images

Branch = Literal["conditional", "unconditional"]
Store = Literal["queries", "linear", "maps"]
SAME_LEVEL, SAME_LEVEL_IN_HALF = 1e-4, 2**-8  # relative differences of one noise level, as bfloat16 rounds it


class EmptyTraceError(IndexError, ValueError):
    """Error for a trace without an image, or without one of that number."""


@dataclass(frozen=True)
class Options:
    """The options of `trace`."""

    branch: Branch = "conditional"
    store: Store = "queries"
    texts: tuple[str, ...] = ()
    device: torch.device | None = None
    self_attention: bool = False
    middle: bool = False
    stream: str | None = None
    words: tuple[str, ...] = ()
    max_bytes: float | None = 0.5

    def __post_init__(self) -> None:
        for name, value, known in (("branch", self.branch, Branch), ("store", self.store, Store)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
        if self.max_bytes is not None and (isinstance(self.max_bytes, str) or not self.max_bytes > 0):
            raise ValueError(f"max_bytes must be a positive number, or None, got {self.max_bytes!r}")


class Trace(Sequence[Any]):
    """The records of the images generated inside a `trace`, in order of generation.

        with daamlib.trace(pipe) as trace:
            images = pipe(["a car", "a tree"]).images
        trace[1].daam()["tree"], len(trace)

    They stay after the `with`.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder: Any = recorder  # while the `with` is open
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
            rows: the images' rows in each pass of the denoiser. By default all; or, of twice as many rows with the same
                latents in both halves, the last half, as diffusers orders guidance (unconditional branch: the first).
            prompt_embeds: (image, token, width) as the denoiser receives them: the images' rows are then those with
                this text, and a pass under other texts alone is no step, as where a guider makes one for each text.

        Yields:
            The loop; `with loop.pause():` around passes that are no denoising step of these images.

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
            given = tuple(prompt_embeds.shape)
            raise ValueError(f"expected prompt_embeds of shape ({len(prompts)}, token, width), got {given}")
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

    def find(self, inputs: "Pass", branch: Branch) -> Rows | None:
        """Return the images' rows of a pass; None if it is no step of theirs. ValueError if nothing tells."""
        batch, n = len(inputs.sample), len(self.prompts)
        if self._embeds is not None:
            texts = self._embeds.to(inputs.text)
            alike = [i for i in range(batch - n + 1) if torch.equal(inputs.text[i : i + n], texts)]
            if len(alike) == 1:
                return slice(alike[0], alike[0] + n)
            if len(alike) > 1:
                raise ValueError(f"the loop's prompt_embeds are the text of {len(alike)} places in a batch of {batch}")
            return None
        if self._rows is not None:
            try:
                rows = torch.arange(batch)[self._rows].flatten().tolist()
            except (IndexError, TypeError) as error:
                raise ValueError(f"rows={self._rows!r} do not fit a pass of {batch} rows: {error}") from error
            if len(set(rows)) != n:
                raise ValueError(f"rows={self._rows!r} are {len(set(rows))} of the pass' {batch} rows, for {n} images")
            return rows
        if batch == n and branch == "conditional":
            return slice(0, n)
        if batch == 2 * n:
            if torch.equal(inputs.sample[:n], inputs.sample[n:]):
                return slice(n, batch) if branch == "conditional" else slice(0, n)
            what = "the latents of its two halves differ, as those of other images do"
        else:
            what = "expected one row for each image, or two under guidance"
        raise ValueError(
            f"the denoiser was called with {batch} rows in a loop of {n} images: {what}. Say which rows are the "
            "images, trace.loop(prompts, num_images_per_prompt=..., rows=...)"
        )

    def encoding(self, inputs: "Pass", rows: Rows, encodings: Sequence[Encoding], branch: Branch) -> Encoding | None:
        """Return the encoding with the first image's text. ValueError if a row has another text than was announced."""
        known = [[encoding.text_of(row) for encoding in encodings] for row in inputs.text[rows]]
        for row, (prompt, texts) in enumerate(zip(self.prompts, known, strict=True)):
            others = [text for text in texts if text is not None]
            if branch == "conditional" and prompt is not None and others and prompt not in others:
                raise ValueError(
                    f"image {row} of the loop was announced as {prompt!r}, its row of the pass has the text "
                    f"{others[-1]!r}: say which rows are the images, trace.loop(prompts, rows=...), in their order; "
                    "put passes of other texts in loop.pause()"
                )
        return next((each for each, text in zip(encodings, known[0], strict=True) if text is not None), None)


@dataclass(frozen=True, eq=False)
class Pass:
    """The inputs of one call of the denoiser."""

    sample: torch.Tensor  # (batch, ...) latents
    timestep: Any  # noise level in the scheduler's units, a number or a tensor
    text: torch.Tensor  # (batch, token, width) as `encode_prompt` returned it
    mask: torch.Tensor | None = None  # (batch, token), which tokens take part; None: all
    is_step: bool = True  # whether it can be a denoising step, by its other inputs
    arguments: Mapping[str, Any] = field(default_factory=dict)  # all inputs by name, for recorders that re-run a pass

    @functools.cached_property  # reading a tensor makes a GPU's host wait
    def levels(self) -> list[float]:
        """Noise levels of its rows; one where it is one for all."""
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

    def problem(self, inputs: Pass, latents: torch.Tensor) -> str | None:
        """Return why a pass is not the next step, None if it is."""
        level, last = inputs.level, self._last
        half = isinstance(inputs.timestep, torch.Tensor) and inputs.timestep.dtype in (torch.float16, torch.bfloat16)
        near = (SAME_LEVEL_IN_HALF if half else SAME_LEVEL) * max(abs(level), 1e-3)
        places = [i for i, planned in enumerate(self._levels) if abs(planned - level) <= near]
        if not places and self._at < 0:
            self._levels = []  # the denoiser is given its noise in units that are not the scheduler's
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


class LoopPlan:
    """The noise levels of a custom loop: none is known beforehand, but no step is made twice."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        self._first: float | None = None
        self._previous: tuple[torch.Tensor, float] | None = None  # noisy latents and noise level

    def problem(self, inputs: Pass, latents: torch.Tensor) -> str | None:
        """Return why a pass is no step of the loop's images, None if it is one."""
        before, level = self._previous or (None, None)
        if before is not None and level == inputs.level:
            if torch.equal(before, latents):
                return "a noise level twice with the same latents"
            planned = self._scheduler.timesteps if getattr(self._scheduler, "num_inference_steps", None) else ()
            if [float(each) for each in planned].count(level) == 1:  # Heun's and others plan a level twice
                return "a noise level twice that the scheduler planned once"
        elif inputs.level == self._first:
            return "its first noise level again"
        self._first = inputs.level if self._first is None else self._first
        self._previous = latents.detach().clone(), inputs.level
        return None


@dataclass(eq=False)
class Call:
    """A call of the pipeline, or a custom loop, under way."""

    prompts: tuple[str | None, ...]  # the text of each image that its passes read, None if unknown
    options: list[dict[str, Any]]  # what later texts are embedded with, of each image
    plan: Plan | LoopPlan | None  # says whether a pass is the next step; None for a real image, of any levels
    planned: int | None  # how many passes will be made, if that is known
    in_loop: bool  # whether it is a custom loop
    data: Any = None  # what the recorder collects
    timesteps: list[float] = field(default_factory=list)  # of the passes made
    limit: float = math.inf  # bytes that its records may take
    broken: str | None = None  # why it will leave no record
