"""The two ways to a record: `trace` while a pipeline generates, `trace_image` of a real image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .attention.calls import Branch, Options, Store, Trace
from .attention.joint.families import family_of
from .attention.joint.recorder import JointRecorder
from .attention.readers import reader_of
from .attention.real_images import pixels_of
from .attention.recorder import AttentionRecorder


def recorder_of(pipe: Any, options: Options) -> AttentionRecorder | JointRecorder:
    """Return the recorder of a pipeline's kind of model, the one choice there is. TypeError or ValueError if unread."""
    family = family_of(pipe)
    if family is not None:
        return JointRecorder(pipe, family, options)
    if options.words:
        raise ValueError(f"words are for joint models, {type(pipe).__name__} is none: its records read any text later")
    return AttentionRecorder(reader_of(pipe, middle=options.middle, stream=options.stream), options)


@contextmanager
def trace(
    pipe: Any,
    *,
    branch: Branch = "conditional",
    store: Store = "queries",
    texts: Sequence[str] = (),
    store_device: str | torch.device | None = None,
    self_attention: bool = False,
    middle: bool = False,
    stream: str | None = None,
    words: Sequence[str] = (),
    max_bytes: float | None = 0.5,
) -> Iterator[Trace]:
    """Collect the cross-attention of every image that `pipe` generates inside the `with`.

        with daamlib.trace(pipe) as trace:
            images = pipe(["a car", "a person"], num_images_per_prompt=2).images
        trace[3].daam()["person"]  # (H, W)

    The image is the same bit for bit. A call that raises leaves no record, one that `pipe._interrupt` stops leaves a
    record of the passes it made. A custom denoising loop is announced by `Trace.loop`; a pass outside of both is
    refused. Maps are differentiable in a text's embeddings, not in the latents. Compiled modules run eagerly inside the
    `with`, because compiled code would not call new hooks.

    For joint models (SD 3, SD 3.5, Flux.1, Qwen-Image) each record is a `JointRecord` made from four denoising passes,
    one in the middle of each quarter of the steps. Only `words` and `store_device` fit such a model.

    Args:
        pipe: a diffusers pipeline with a U-Net (SD 1.x, SD 2.x, SDXL; also img2img, LoRA), a transformer of PixArt or
            Sana 1.0 or 1.5, or a joint model.
        branch: the half of classifier-free guidance to read; a record's prompt is then that half's text.
        store: "queries" keeps what any later text needs: steps * sum over layers of (h*w * channels) numbers an image
            (`trace.bytes_needed`). "linear" keeps only their float32 sums over the steps, enough for LDAAM. "maps"
            keeps those and DAAM of the prompt and of `texts`.
        texts: with `store="maps"`, further texts that `record.daam` can be asked for.
        store_device: place of what is stored, such as "cpu" to spare a GPU's memory; None: where the pipeline computes.
        self_attention: whether to keep what `record.refine` needs, of the largest grid with at most 32 x 32 positions:
            queries and keys of up to eight of the less noisy passes; with "linear" and "maps" their mean attention.
        middle: whether to read the middle block too, which DAAM leaves out.
        stream: the text of AudioLDM2 to read: "t5" (the default), the words of the prompt, or "gpt2", vectors of the
            whole prompt, which are read by position.
        words: of a joint model, two or more texts that are read while it generates, and compete with each other.
        max_bytes: of one call's records, after its first step, but of joint models: bytes, or up to 1 a share of what
            is free; None: no limit.

    Yields:
        The records, growing while images are generated.

    Raises:
        TypeError: the pipeline is of no family that can be read.
        ValueError: its denoiser has no cross-attention, an option is unknown, or a pass cannot be read or stored.
    """
    if isinstance(texts, str) or (texts and store != "maps"):
        raise ValueError(f'texts is a list of strings and needs store="maps", got {texts!r} with store={store!r}')
    if isinstance(words, str):
        raise TypeError(f"words must be a list of strings, got {words!r}")
    device = None if store_device is None else torch.device(store_device)
    options = Options(branch, store, tuple(texts), device, self_attention, middle, stream, tuple(words), max_bytes)
    with recorder_of(pipe, options).attached() as tracer:
        yield tracer


@torch.no_grad()
def trace_image(
    pipe: Any,
    image: Any,
    *,
    prompt: str = "",
    timesteps: Sequence[int] = (100, 300, 500),
    seed: int = 0,
    self_attention: bool = False,
) -> Any:  # an AttentionRecord, or a JointRecord
    """Return the record of a REAL image: encode it, add noise at each timestep, one pass of the denoiser each.

        record = daamlib.trace_image(pipe, image, prompt="a red car")
        record.daam()["car"]  # (H, W)

    The noise is the training's, whatever sampler the pipeline uses: z_t = sqrt(a_t) z + sqrt(1 - a_t) e, or of a model
    of flow matching, as every joint model is, z_t = (1 - s) z + s e with s = t / 1000 (the length of its schedule).

    Args:
        pipe: a pipeline that `trace` reads.
        image: a PIL image, an (H, W, 3) uint8 array, or a (3, H, W) tensor in [0, 1]; H and W multiples of the VAE's
            factor (of a joint model, times its patches).
        prompt: what the passes are conditioned on.
        timesteps: of the training schedule, 0 ... 999 (of a joint model 0 ... 1000).
        seed: of the noise, drawn anew for each timestep.
        self_attention: as for `trace`.

    Returns:
        The record, as that of a generated image of so many steps.

    Raises:
        TypeError: `trace` refuses the pipeline.
        ValueError: it does, sizes or timesteps do not fit, or the model is given more than a noisy image and a text.
    """
    recorder = recorder_of(pipe, Options(self_attention=self_attention))
    return recorder.read_image(pixels_of(image, recorder.sides), prompt, [int(t) for t in timesteps], seed)
