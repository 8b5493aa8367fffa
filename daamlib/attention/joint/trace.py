"""Reading a joint model's pipeline while it generates, and real images."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from ...pipeline import denoiser_of, uncompiled
from ..batches import Encoding, known_batch
from ..noise import add_noise
from ..recorder import Trace
from ..text import TokenEmbeddings
from ..watch import watch
from .encoding import EMBEDDED_WITH, EMBEDDING, check_words, embed_prompt, encode_words, name_prompt
from .families import Family
from .maps import Sums
from .reading import PROMPT, check_arguments, keep_arguments, make_again, passes_to_keep, while_generating
from .record import JointRecord, fingerprint_of_joint
from .stream import Stream, check_readable
from .text import averages

LEVELS = 1000  # noise levels of the training schedule: the timestep is 1000 times the share of noise


@dataclass(eq=False)
class Call:
    """One pipeline call in the making."""

    encodings: list[Encoding] = field(default_factory=list)  # the prompt's, then those of negative texts
    texts: list[torch.Tensor] = field(default_factory=list)  # what each of these returned, itself
    prompts: list[dict[str, str] | None] = field(default_factory=list)  # of each image, by argument
    words: TokenEmbeddings | None = None
    passes: int = 0  # of the conditional text
    timesteps: list[int] = field(default_factory=list)  # of the kept ones
    kept: list[list[dict[str, Any]]] = field(default_factory=list)  # of each image, the arguments of its passes
    grid: tuple[int, int] = (0, 0)
    sums: Sums | None = None


class JointRecorder:
    """The hooks of one trace of a joint model, and the pipeline call that they are told of.

    Args:
        pipe: the pipeline.
        family: its own.
        words: that run along while images are generated, none or two and more.
        device: where the records go; None: where they were made.

    Raises:
        TypeError: `words` is no list of strings.
        ValueError: the transformer's attention cannot be read, or the words cannot compete.
    """

    def __init__(self, pipe: Any, family: Family, words: Sequence[str], device: torch.device | None):
        self.trace = Trace()
        self._pipe, self._family, self._device = pipe, family, device
        self._words = check_words(words) if len(words) else ()
        self._denoiser = denoiser_of(pipe)
        self._stream = Stream(family, self._denoiser)
        self._signature = inspect.signature(self._denoiser.forward)
        self._made_by = fingerprint_of_joint(pipe)
        self._call: Call | None = None  # between `check_inputs` and `maybe_free_model_hooks`
        self._counts = False  # whether the pass under way is of the prompt

    def attach(self, stack: ExitStack) -> None:
        """Register all hooks, to be removed with the stack."""
        stack.enter_context(uncompiled(self._pipe))
        stack.enter_context(self._stream)
        stack.enter_context(watch(self._pipe, "check_inputs", self._after_check))
        stack.enter_context(watch(self._pipe, "encode_prompt", self._after_prompt))
        stack.enter_context(watch(self._pipe, "maybe_free_model_hooks", lambda *_: self._finish()))
        stack.callback(self._denoiser.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove)
        stack.callback(self._denoiser.register_forward_hook(lambda *_: self._after_pass()).remove)

    def _after_check(self, arguments: dict, result: Any) -> None:
        self.close()
        self._call = Call()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_prompt(self, arguments: dict, result: Sequence[Any]) -> None:
        call, family = self._call, self._family
        if call is None or EMBEDDING.get():
            return
        positive = result[0]
        negative = None if family.negative is None else result[family.negative]
        guided = bool(arguments.get("do_classifier_free_guidance", negative is not None)) and negative is not None
        options = {name: arguments[name] for name in EMBEDDED_WITH if arguments.get(name) is not None}
        names = _by_image(arguments, len(positive))
        prompts = tuple(None if texts is None else texts["prompt"] for texts in names)
        call.texts.append(positive)
        call.encodings.append(
            Encoding(prompts, positive.clone(), None if negative is None else negative.clone(), guided, options, {})
        )
        if len(call.encodings) > 1:
            return  # a negative text
        call.prompts = names
        if self._words:
            call.words = encode_words(self._pipe, family, self._words, options)

    def _before_pass(self, denoiser: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        try:
            self._begin_pass(dict(self._signature.bind_partial(*args, **kwargs).arguments))
        except ValueError:
            self.abandon()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin_pass(self, arguments: dict[str, Any]) -> None:
        call, self._counts = self._call, False
        self._stream.end()  # the pass before may have failed
        if call is None or not call.encodings:
            raise ValueError(
                f"the transformer was called by itself: of {self._family.name}, trace reads the calls of the pipeline. "
                "For latents of your own, see trace_image"
            )
        rows = self._rows(call, arguments)
        if rows is None:
            return
        self._counts = True
        call.grid = check_arguments(self._family, self._denoiser, arguments)
        planned = getattr(self._pipe, "num_timesteps", None) or len(self._pipe.scheduler.timesteps)
        if call.passes not in passes_to_keep(planned):
            return
        level = float(torch.as_tensor(arguments["timestep"]).flatten()[0]) * self._family.timestep
        call.timesteps.append(round(level))
        numbers = range(len(arguments["hidden_states"]))[rows]
        call.kept = call.kept or [[] for _ in numbers]
        for kept, row in zip(call.kept, numbers, strict=True):
            kept.append(keep_arguments(arguments, row, kept[-1] if kept else {}))
        words = call.words
        if call.sums is None:
            call.sums = Sums(while_generating(None if words is None else averages(words)))
        self._stream.begin(arguments, rows, [] if words is None else [words.values], call.sums.read)

    def _rows(self, call: Call, arguments: Mapping[str, Any]) -> slice | None:
        """The rows of the images' prompts in a pass; None for a pass of a negative text, or with blocks left out."""
        text = arguments["encoder_hidden_states"]
        if arguments.get("skip_layers") is not None or any(text is negative for negative in call.texts[1:]):
            return None
        batch = known_batch(text, call.encodings[:1])
        if batch is not None:
            return batch.conditional
        if known_batch(text, call.encodings[1:]) is None:
            raise ValueError(
                f"the transformer was called with a text of shape {tuple(text.shape)} that `encode_prompt` did not "
                "return: trace cannot tell which rows are the images' prompts"
            )
        return None

    def _after_pass(self) -> None:
        self._stream.finish()
        if self._call is not None:
            self._call.passes += self._counts

    @torch.inference_mode(False)
    @torch.no_grad()
    def _finish(self) -> None:
        """The pipeline's last act: turn the call into records; an interrupted one has made fewer passes."""
        call, self._call = self._call, None
        if call is None or call.sums is None:
            self.trace.unfinished += call is not None  # interrupted before the first pass that is read
            return
        encoding = call.encodings[0]
        for image, calls in enumerate(call.kept):
            record = JointRecord(
                prompt=encoding.prompts[image],
                prompt_embeddings=name_prompt(
                    self._pipe, self._family, call.prompts[image], encoding.positive[image].clone()
                ),
                timesteps=list(call.timesteps),
                grid=call.grid,
                calls=tuple(calls),
                words=self._words,
                maps={name: values[image].unflatten(1, call.grid).clone() for name, values in call.sums.items()},
                fingerprint=self._made_by,
                computed=call.sums.computed(image, len(call.timesteps)),
                prompts=call.prompts[image],
                embedded_with=dict(encoding.options),
                pipe=self._pipe,
            )
            self.trace.records.append(record if self._device is None else record.to(self._device))
        self.trace.bytes_needed = sum(record.nbytes for record in self.trace.records[-len(call.kept) :])

    def abandon(self) -> None:
        """Drop the call under way."""
        self.trace.unfinished += self._call is not None
        self._call = None
        self._stream.end()

    def close(self) -> None:
        """The end of the `with`, or the beginning of another call."""
        if self._call is not None:
            self.abandon()
            warnings.warn("an earlier call inside this trace did not end: it left no record", stacklevel=2)


def _by_image(arguments: Mapping[str, Any], images: int) -> list[dict[str, str] | None]:
    """The texts that `encode_prompt` was given of each image, by argument; None where they were embeddings."""
    prompt, count = arguments.get("prompt"), arguments.get("num_images_per_prompt") or 1
    if prompt is None:
        return [None] * images
    number = 1 if isinstance(prompt, str) else len(prompt)
    given = {name: arguments.get(name) for name in ("prompt", "prompt_2", "prompt_3")}
    lists = {name: [text] * number if isinstance(text, str) else text for name, text in given.items() if text}
    lists["prompt"] = [prompt] if isinstance(prompt, str) else list(prompt)  # an empty prompt, too
    found = [{name: texts[i] for name, texts in lists.items()} for i in range(number) for _ in range(count)]
    return list(found) if len(found) == images else [None] * images


@torch.no_grad()
def trace_pixels(
    pipe: Any, family: Family, pixels: torch.Tensor, *, prompt: str, timesteps: Sequence[int], seed: int
) -> JointRecord:
    """`daamlib.trace_image` of a joint model: x_t = (1 - s) x + s e, s = t / 1000 (flow matching), one pass each.

    A model with guidance embedded is given the scale that its pipeline has by default.

    Args:
        pipe: the pipeline.
        family: its own.
        pixels: (1, 3, H, W) in [-1, 1], of sides that the model can divide.
        prompt: what the passes are conditioned on.
        timesteps: 0 ... 1000, of a shift of 1: the noise level itself, whatever shift the scheduler has.
        seed: of the noise, drawn anew for each timestep.

    Returns:
        The record, as that of a generated image.

    Raises:
        ValueError: sizes or timesteps do not fit, or the transformer's attention cannot be read.
    """
    check_readable(denoiser_of(pipe))
    steps = [int(t) for t in timesteps]
    if not steps or min(steps) < 0 or max(steps) > LEVELS:
        raise ValueError(f"timesteps must be one or more of 0 ... {LEVELS}, got {list(timesteps)}")
    denoiser, device = denoiser_of(pipe), pipe._execution_device
    latents = family.encode_image(pipe, pixels.to(device))
    encoded = embed_prompt(pipe, family, {"prompt": prompt}, {})
    levels = [step / LEVELS for step in steps]
    calls: list[dict[str, Any]] = []
    grid = (0, 0)
    for noisy, level in zip(add_noise(latents, [(1 - s, s) for s in levels], seed), levels, strict=True):
        arguments = family.arguments(pipe, noisy.to(denoiser.dtype), level, encoded)
        grid = check_arguments(family, denoiser, arguments)
        calls.append(keep_arguments(arguments, 0, calls[-1] if calls else {}))
    maps = make_again(pipe, family, calls, [], while_generating(None))
    return JointRecord(
        prompt=prompt,
        prompt_embeddings=name_prompt(pipe, family, {"prompt": prompt}, encoded[0][0]),
        timesteps=steps,
        grid=grid,
        calls=tuple(calls),
        words=(),
        maps={PROMPT: maps[PROMPT][0].unflatten(1, grid)},
        fingerprint=fingerprint_of_joint(pipe),
        computed=maps.computed(0, len(calls)),
        prompts={"prompt": prompt},
        pipe=pipe,
    )
