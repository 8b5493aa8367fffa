"""One way to a pipeline: the bundled model, a folder or a model id."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from .resources import bundled

BUNDLED = bundled("urban-tiny")
DENOISERS = ("unet", "transformer")  # the parts of pipelines that may denoise


def load_pipeline(
    model: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Any:  # type checkers do not know a pipeline's parts
    """Load a diffusers text-to-image pipeline for tracing.

    Of the progress bars only those of downloads show; that of the steps comes on with
    `pipe.set_progress_bar_config(disable=False)`.

    Args:
        model: a folder or a model id of the hub; None for the bundled `urban-tiny`.
        device: such as "cpu" or "cuda:1"; None for "cuda" if there is one, else "cpu".
        dtype: None for float16 on a GPU, float32 on a CPU.

    Returns:
        The pipeline, on its device.

    Raises:
        FileNotFoundError: if the bundled model is not there. diffusers raises what it finds wrong with another.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    options: dict[str, Any] = {}
    if model is None:
        if not (BUNDLED / "model_index.json").exists():
            raise FileNotFoundError(f"the bundled model is not at {BUNDLED}: install daamlib anew")
        # without accelerate diffusers would advise to install it, which matters to large models alone
        quietly = {"low_cpu_mem_usage": diffusers.utils.is_accelerate_available()}
        model, options = BUNDLED, {"local_files_only": True, **quietly}
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def image_size(pipe: Any) -> tuple[int, int]:
    """The size of the images that a pipeline makes unless it is told another.

    Args:
        pipe: a diffusers pipeline with a U-Net or a transformer.

    Returns:
        Height and width in pixels.

    Raises:
        TypeError: for a pipeline without a denoiser.
        ValueError: for a denoiser whose config does not say it.
    """
    cells = getattr(denoiser_of(pipe).config, "sample_size", None)
    height, width = cells if isinstance(cells, list | tuple) else (cells, cells)
    if not height or not width:
        raise ValueError(f"the denoiser's config has the sample_size {cells!r}: expected the cells of a latent's side")
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """A random generator for each image of a batch, so that an image is the same however many are made together.

        pipe(["a car"] * 3, generator=daamlib.generators(range(3)))

    Args:
        seeds: of the images.

    Returns:
        One generator a seed, on the CPU: the noise is then the same whatever the pipeline computes on.
    """
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's denoiser itself, not the wrapper of `torch.compile`, whose signature and layer names are others.

    Args:
        pipe: a diffusers pipeline.

    Returns:
        Its U-Net or transformer.

    Raises:
        TypeError: for a pipeline without one.
    """
    for part in DENOISERS:
        denoiser = getattr(pipe, part, None)
        if isinstance(denoiser, torch.nn.Module):
            return getattr(denoiser, "_orig_mod", denoiser)
    raise TypeError(
        f"expected a diffusers pipeline with a U-Net or a transformer, got {type(pipe).__name__}: DAAM reads the "
        "attention of its denoiser"
    )


@contextmanager
def uncompiled(pipe: Any) -> Iterator[None]:
    """Run nothing compiled inside the `with`, if any of the denoiser is: compiled code does not call new hooks.

    Args:
        pipe: a diffusers pipeline, its denoiser compiled by `torch.compile(denoiser)` or by a module's own `compile()`.

    Yields:
        None.
    """
    denoisers = [getattr(pipe, name, None) for name in DENOISERS]
    parts = [part for each in denoisers if isinstance(each, torch.nn.Module) for part in each.modules()]
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No loading bars, and no note that transformers does without torchvision; bars of downloads stay."""
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    hook = transformers.utils.logging.set_tqdm_hook(
        lambda bar, args, options: bar(*args, **{**options, "disable": True})
    )
    logger = logging.getLogger("transformers.utils.import_utils")
    keep = lambda record: "requires torchvision" not in record.getMessage()  # noqa: E731
    logger.addFilter(keep)
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            diffusers.utils.logging.enable_progress_bar()
        logger.removeFilter(keep)
        transformers.utils.logging.set_tqdm_hook(hook)


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """PyTorch on `n` threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
