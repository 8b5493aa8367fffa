"""Collecting the attention while a pipeline generates.

A forward hook on each cross-attention's `to_q` sees the queries under every attention processor (SDPA, sliced,
xformers, IP-Adapter, LoRA) and cannot change the image; hooks on the denoiser mark the passes. All are removed when the
`with` ends, also by an exception.

What a pass is, is read from what is passed, never from attributes that an earlier call left on the pipeline
(`recorder`, `batches`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch

from .joint.families import NOT_LINEAR, family_of
from .joint.trace import JointRecorder
from .recorder import Branch, Keep, Recorder, Store, Trace


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
) -> Iterator[Trace]:
    """Collect the cross-attention of every image that `pipe` generates inside the `with`.

        with daamlib.trace(pipe) as trace:
            images = pipe(["a car", "a person"], num_images_per_prompt=2).images
        trace[3].daam()["person"]  # (H, W)

    The image is the same bit for bit. A call that an exception ends leaves no record, one that `pipe._interrupt` ends
    leaves that of the passes made; the records of the calls before stay. In a denoising loop of your own, embed the
    texts by `pipe.encode_prompt` inside the `with`, so that the conditional half of guidance can be told.

    Queries are detached: maps are differentiable in a text's embeddings, not in the latents. With
    `branch="unconditional"` a record's prompt is the negative text, which those passes read.

    A denoiser that `torch.compile` has compiled runs uncompiled inside the `with`, as everything else that is compiled:
    code that was compiled before the hooks came would never call them. Its image is the uncompiled model's.

    Of a joint model (SD 3, SD 3.5, Flux.1, Qwen-Image) the records are `JointRecord`s, of four passes of a pipeline's
    call: the middles of four equal parts. They hold the prompt's DAAM and the maps of `words`; any other text runs
    along with these passes made again. Of the other options only `store_device` fits such a model.

    Args:
        pipe: a diffusers pipeline whose denoiser has cross-attention: a U-Net (SD 1.x, SD 2.x, SDXL; also img2img,
            LoRA), or a transformer of PixArt-alpha, PixArt-Sigma, Sana 1.0 or 1.5; or one of a joint model.
        branch: the half of classifier-free guidance to read.
        store: "queries" keeps what any later text needs: steps * sum over layers of (h*w * channels) numbers an image
            in the pipeline's dtype (logged after the first step, and `trace.bytes_needed`). "linear" keeps only their
            float32 sums over the steps, enough for LDAAM. "maps" keeps those and DAAM of the prompt and of `texts`.
        texts: with `store="maps"`, what `record.daam` can be asked for besides the prompt.
        store_device: where it is kept, such as "cpu" to spare a GPU's memory; None: where the pipeline computes.
        self_attention: whether to keep what `record.refine` needs: of the largest grid with at most 32 x 32 positions,
            and of the less noisy half of the passes, the queries and keys of up to eight passes of each layer; with
            "linear" and "maps", which hold no queries, the running mean of the attention, 4.2 MB at 32 x 32.
        middle: whether to read the middle block too, which DAAM leaves out.
        stream: which text to read where a denoiser is given several. AudioLDM2: "t5" (the default), the words of the
            prompt, or "gpt2", vectors of the whole prompt, which are read by position (`readers.audioldm2`).
        words: of a joint model, two or more that run along while it generates, and compete with each other.

    Yields:
        The records, growing while images are generated.

    Raises:
        TypeError: the pipeline is of no family that can be read.
        ValueError: its denoiser has no cross-attention, or an option is unknown.
    """
    for name, value, known in (("branch", branch, Branch), ("store", store, Store)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
    if isinstance(texts, str) or (texts and store != "maps"):
        raise ValueError(f'texts is a list of strings and needs store="maps", got {texts!r} with store={store!r}')
    device = None if store_device is None else torch.device(store_device)
    family = family_of(pipe)
    if family is not None:
        if store == "linear":
            raise ValueError(f'store="linear" is not for {family.name}: {NOT_LINEAR}')
        usual = {
            "branch": (branch, "conditional"),
            "store": (store, "queries"),
            "texts": (tuple(texts), ()),
            "self_attention": (self_attention, False),
            "middle": (middle, False),
            "stream": (stream, None),
        }
        odd = [name for name, (given, default) in usual.items() if given != default]
        if odd:
            raise ValueError(f"{', '.join(odd)}: {family.name} is a joint model, it takes words and store_device only")
        recorder: Recorder | JointRecorder = JointRecorder(pipe, family, words, device)
    elif words:
        raise ValueError(
            f"words run along with joint models only, {type(pipe).__name__} is none: its records read any text later"
        )
    else:
        recorder = Recorder(pipe, branch, Keep(store, tuple(texts), device, self_attention), middle, stream)
    with ExitStack() as stack:
        recorder.attach(stack)
        try:
            yield recorder.trace
        except BaseException:
            recorder.abandon()
            raise
        recorder.close()
