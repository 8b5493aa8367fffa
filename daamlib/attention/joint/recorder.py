"""The recorder of joint models, whose text changes along with the image: it stores passes to re-run."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from ...pipeline import denoiser_of
from ..batches import Encoding, Rows
from ..calls import Call, Options, Pass
from ..real_images import add_noise, check_levels, latents_of
from ..recording import Recorder, break_off
from ..text import TokenEmbeddings, texts_of_images
from ..watch import is_running
from .encoding import EMBEDDED_WITH, JointTexts, check_words, encode_words
from .families import NOT_LINEAR, Family
from .maps import Sums
from .reading import Calls, check_arguments, copy_arguments, passes_to_read, rerun, while_generating
from .record import JointRecord, fingerprint_of_joint
from .stream import Stream, check_readable

Names = tuple[TokenEmbeddings, dict[str, str] | None]  # of a prompt, and the text for each text encoder
LEVELS = 1000  # noise levels of the training schedule: the timestep is 1000 times the share of noise
FURTHER = ("prompt_2", "prompt_3")  # arguments of `encode_prompt` that name a prompt's tokens


@dataclass(eq=False)
class CallData:
    """Values that are stored of one call."""

    grid: tuple[int, int]  # (h, w) of the image's positions
    words: TokenEmbeddings | None  # extra texts that are read while generating
    texts: torch.Tensor  # (image, token, width), the prompts' embeddings
    prompts: list[Names]  # the same of each image, with their tokens
    check: torch.Tensor | None  # of embeddings that `encode_prompt` did not return: the text encoders as they are
    calls: list[list[dict[str, Any]]]  # for each image the denoiser's arguments of its stored passes
    timesteps: list[float]  # of these passes
    sums: Sums  # of what is read while generating; of a custom loop no maps, its passes are re-run at its end


class JointRecorder(Recorder):
    """The hooks of one trace of a joint model, of whose options `words`, two or more, and `device` fit.

    Raises TypeError if `words` is no list of strings, ValueError if the transformer's attention cannot be read, the
    words cannot compete, or another option is given.
    """

    def __init__(self, pipe: Any, family: Family, options: Options):
        super().__init__(pipe, denoiser_of(pipe), options)
        if options.store == "linear":
            raise ValueError(f'store="linear" is not for {family.name}: {NOT_LINEAR}')
        usual = Options(words=options.words, device=options.device, max_bytes=options.max_bytes)
        others = ", ".join(name for name, value in vars(options).items() if value != vars(usual)[name])
        if others:
            raise ValueError(f"{others}: {family.name} is a joint model, it takes words and store_device only")
        self._family, self._words = family, check_words(options.words) if options.words else ()
        self._texts, self._stream = JointTexts(pipe, family), Stream(family, self.denoiser)
        self._signature = inspect.signature(self.denoiser.forward)
        self._negatives: list[torch.Tensor] = []  # the very texts that later calls of `encode_prompt` returned

    @override
    def register(self, stack: ExitStack) -> None:
        stack.enter_context(self._stream)

    @override
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Pass:
        arguments = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        return Pass(
            sample=arguments["hidden_states"],
            timestep=torch.as_tensor(arguments["timestep"]) * self._family.timestep,
            text=arguments["encoder_hidden_states"],
            is_step=arguments.get("skip_layers") is None,  # blocks are left out to steer the image
            arguments=arguments,
        )

    @override
    def encoding_of(self, arguments: Mapping[str, Any], result: Sequence[Any]) -> Encoding:
        positive, place, prompt = result[0], self._family.negative, arguments.get("prompt")
        prompts = texts_of_images(prompt, len(positive))
        # before the first pass of a pipeline's call the second text that is embedded is the negative one
        if place is None and self.encodings and self.call is None and is_running(self.frame):
            first = self.encodings[0]
            self._negatives = [*self._negatives, positive] if len(self.encodings) > 1 else [positive]
            return Encoding(first.positive, positive.detach().clone(), first.prompts, prompts, options=first.options)
        negative = None if place is None else result[place]
        negatives = arguments.get("negative_prompt")
        return Encoding(
            positive=positive.detach().clone(),
            negative=None if negative is None else negative.detach().clone(),
            prompts=prompts,
            negatives=texts_of_images("" if negatives is None else negatives, len(positive)),
            guided=negative is not None and bool(arguments.get("do_classifier_free_guidance", True)),
            options={name: arguments[name] for name in (*EMBEDDED_WITH, *FURTHER) if arguments.get(name) is not None},
        )

    @override
    def rows_of_call(self, inputs: Pass) -> tuple[Rows | None, Encoding | None]:
        if len(self.encodings) > 1 and any(inputs.text is text for text in self._negatives):
            return None, None  # which may equal the prompt
        return super().rows_of_call(inputs)

    @override
    def open_call(self, call: Call, inputs: Pass, rows: Rows) -> CallData:
        options, words = call.options[0], self._words
        extra = encode_words(self.pipe, self._family, words, options) if words else None
        texts = inputs.text[rows].detach().clone()
        prompts: list[Names] = []
        for prompt, own, values in zip(call.prompts, call.options, texts, strict=True):
            further = {name: text for name, text in own.items() if name in FURTHER and text}
            named = None if prompt is None else {"prompt": prompt, **further}
            prompts.append((self._texts.named(named, values.clone()), named))
        self._made_by = fingerprint_of_joint(self.pipe)  # a LoRA may have come since the call before
        return CallData(
            grid=check_arguments(self._family, self.denoiser, inputs.arguments),
            words=extra,
            texts=texts,
            prompts=prompts,
            check=self.check_text(self._texts, texts, options),
            calls=[[] for _ in texts],
            timesteps=[],
            sums=Sums((lambda image, texts: {}) if call.in_loop else while_generating(extra)),
        )

    @override
    def begin_pass(self, call: Call, inputs: Pass, rows: Rows) -> None:
        data, in_loop = call.data, call.in_loop
        if call.timesteps and (problem := self._later_problem(data, inputs, rows)):
            break_off(call, problem)
            return
        planned = call.planned or len(self.pipe.scheduler.timesteps)
        if not in_loop and len(call.timesteps) not in passes_to_read(planned):
            return
        data.timesteps.append(inputs.level)
        numbers = range(len(inputs.sample))[rows] if isinstance(rows, slice) else rows
        for stored, row in zip(data.calls, numbers, strict=True):
            stored.append(copy_arguments(inputs.arguments, row, stored[-1] if stored else {}))
        # how many passes a loop makes is not known: of each is stored what it computed, and some are re-run for maps
        texts = [] if data.words is None or in_loop else [data.words.values]
        self._stream.begin(inputs.arguments, rows, texts, data.sums.read, strict=not call.timesteps)

    def _later_problem(self, data: CallData, inputs: Pass, rows: Rows) -> str | None:
        """Return why a pass after the first cannot be read."""
        try:
            check_arguments(self._family, self.denoiser, inputs.arguments)
        except ValueError as error:
            return str(error)
        if not torch.equal(inputs.text[rows], data.texts):
            return (
                "the text changed between passes, as when a callback swaps the prompt: no names hold for all passes. "
                "Trace each part as a call of its own"
            )
        return None

    @override
    def end_pass(self, call: Call) -> str | None:
        return self._stream.finish()

    @override
    def make_records(self, call: Call) -> list[JointRecord]:
        data = call.data
        if not data.timesteps:
            raise ValueError("it ended before the first pass that is read")
        numbers = range(len(data.timesteps))
        chosen = sorted(passes_to_read(len(numbers))) if call.in_loop else list(numbers)
        timesteps = [data.timesteps[number] for number in chosen]
        records = []
        for image, (names, stored) in enumerate(zip(data.prompts, data.calls, strict=True)):
            sums, row, calls = data.sums, image, [stored[number] for number in chosen]
            computed = sums.computed(image, len(stored))[chosen]
            if call.in_loop:
                texts = [] if data.words is None else [data.words.values]
                sums, row = rerun(self.pipe, self._family, calls, texts, while_generating(data.words), computed), 0
            options = {name: value for name, value in call.options[image].items() if name in EMBEDDED_WITH}
            fields = {"grid": data.grid, "embedded_with": options, "encoder_check": data.check, "words": self._words}
            record = self._record(names, timesteps, calls, sums, row, computed=computed, **fields)
            records.append(record if self.options.device is None else record.to(self.options.device))
        self.trace.bytes_needed = sum(record.nbytes for record in records)
        return records

    def _record(
        self, names: Names, timesteps: Sequence[float], calls: Sequence[Any], sums: Sums, row: int, **fields: Any
    ) -> JointRecord:
        """Return the record of an image, whose sums are one row of those of a batch."""
        embeddings, prompts = names
        return JointRecord(
            prompt=None if prompts is None else prompts["prompt"],
            prompt_embeddings=embeddings,
            timesteps=[int(level) if level == int(level) else level for level in timesteps],
            calls=Calls.of(calls),
            maps={name: values[row].unflatten(1, fields["grid"]).clone() for name, values in sums.items()},
            fingerprint=self._made_by,
            prompts=prompts,
            pipe=self.pipe,
            **fields,
        )

    # -- real images ---------------------------------------------------------------------------------------------

    @property
    def sides(self) -> int:
        """Number that the sides of a real image must be multiples of."""
        return self._family.sides(self.pipe)

    def read_image(self, pixels: torch.Tensor, prompt: str, timesteps: Sequence[int], seed: int) -> JointRecord:
        """Return the record of a real image: x_t = (1 - s) x + s e, s = t / 1000 (flow matching), one pass each.

        A model with guidance embedded is given its pipeline's default scale. The scheduler's shift does not matter.
        """
        check_readable(self.denoiser)
        check_levels(timesteps, LEVELS)
        self._made_by = fingerprint_of_joint(self.pipe)
        latents = latents_of(self.pipe.vae, pixels.to(self.pipe._execution_device))
        encoded = self._texts.encode_prompt({"prompt": prompt}, {})
        levels = [step / LEVELS for step in timesteps]
        calls: list[dict[str, Any]] = []
        for noisy, level in zip(add_noise(latents, [(1 - s, s) for s in levels], seed), levels, strict=True):
            arguments = self._family.arguments(self.pipe, noisy.to(self.denoiser.dtype), level, encoded)
            calls.append(copy_arguments(arguments, 0, calls[-1] if calls else {}))
        grid = check_arguments(self._family, self.denoiser, calls[0])
        sums, prompts = rerun(self.pipe, self._family, calls, [], while_generating(None)), {"prompt": prompt}
        names, computed = (self._texts.named(prompts, encoded[0][0]), prompts), sums.computed(0, len(calls))
        return self._record(names, timesteps, calls, sums, 0, grid=grid, words=(), computed=computed)
