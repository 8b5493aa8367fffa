"""Load a pipeline (the bundled model, a folder or a model id), and read the parts of one.

diffusers and transformers take seconds to import: only the functions that need them do it.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .resources import bundled

BUNDLED = bundled("urban-tiny")
DENOISERS = ("unet", "transformer")  # the parts of pipelines that may denoise
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}  # by their names in safetensors files
# What the text encoder made of a text when the bundled model was written, and how far it may be off: bfloat16 is off by
# 0.007, random weights by about 1
CHECK, CHECK_TOLERANCE = "check.json", 0.05
# The words of all versions of transformers and diffusers in their warnings of weights
MISSING, LEFT_OVER = "newly initialized", ("not used when initializing", "UNEXPECTED")
LOGGERS = ("transformers.modeling_utils", "diffusers.models.modeling_utils", "transformers.utils.import_utils")


def load_pipeline(
    model: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Any:  # type checkers do not know a pipeline's parts
    """Load a diffusers text-to-image pipeline for tracing.

        pipe = daamlib.load_pipeline()  # the bundled model
        pipe = daamlib.load_pipeline(MODEL, device="cpu")

    Only the progress bars of downloads show; `pipe.set_progress_bar_config(disable=False)` shows that of the steps.

    Args:
        model: a folder or a model id of the hub; None for the bundled `urban-tiny`.
        device: such as "cpu" or "cuda:1"; None for "cuda" if there is one, else "cpu".
        dtype: None for float32 on a CPU. On a GPU None is the half precision that the denoiser's weights are stored in;
            if they are stored in another, bfloat16 for a transformer and float16 for a U-Net.

    Returns:
        The pipeline, on its device.

    Raises:
        FileNotFoundError: the bundled model is not there. diffusers raises what is wrong with another.
        ValueError: files lack weights of a part, or the bundled model is not loaded as it was trained.
    """
    import diffusers

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {}
    source = model or BUNDLED
    if model is None:
        if not (BUNDLED / "model_index.json").exists():
            raise FileNotFoundError(f"the bundled model is not at {BUNDLED}: install daamlib anew")
        # without accelerate diffusers would advise to install it, which matters to large models alone
        options = {"local_files_only": True, "low_cpu_mem_usage": diffusers.utils.is_accelerate_available()}
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else _half_precision(source))
    # diffusers 0.40 renamed the argument, older versions ignore the new name
    name = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
    with loading(source, exactly=model is None):
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **{name: dtype}, **options)
    if model is None:
        _check_bundled(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _half_precision(model: str | Path) -> torch.dtype:
    """Return the half precision of a model's stored denoiser, else the one that its kind is mostly trained in."""
    from diffusers import DiffusionPipeline

    folder = Path(model if Path(model).is_dir() else DiffusionPipeline.download(str(model)))
    name = next((name for name in DENOISERS if (folder / name).is_dir()), DENOISERS[0])
    numbers: Counter[str] = Counter()
    for path in (folder / name).glob("*.safetensors"):
        if "." not in path.stem:  # no variant, such as `.fp16.safetensors`
            with safe_open(path, "pt") as file:
                for part in map(file.get_slice, file.keys()):
                    numbers[part.get_dtype()] += math.prod(part.get_shape())
    stored = max(("F32", *HALVES), key=lambda kind: numbers[kind])  # integers of quantised weights do not count
    if stored not in HALVES and (folder / name / "config.json").is_file():
        config = json.loads((folder / name / "config.json").read_text())
        stored = {"float16": "F16", "bfloat16": "BF16"}.get(config.get("torch_dtype"), stored)
    return HALVES.get(stored, torch.float16 if name == "unet" else torch.bfloat16)


def check_values(pipe: Any, text: str) -> list[float]:
    """Return the first eight values of a text's last word, by a pipeline's one text encoder (CLIP, on a CPU)."""
    with torch.no_grad():
        states = pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids)[0]
    return states[0, -2, :8].tolist()


def _check_bundled(pipe: Any) -> None:
    """Compare a text's embedding with the one of the day when the model was written."""
    import transformers

    expected = json.loads((BUNDLED / CHECK).read_text())
    pairs = zip(check_values(pipe, expected["text"]), expected["values"], strict=True)
    error = max(abs(one - other) for one, other in pairs)
    if not error <= CHECK_TOLERANCE:
        raise ValueError(
            f"the bundled model's text encoder is off by {error:.2g} for {expected['text']!r}: transformers "
            f"{transformers.__version__} does not load its weights as they are, or {BUNDLED} was changed"
        )


def image_size(pipe: Any) -> tuple[int, int]:
    """Return the height and width, in pixels, of the images that a pipeline makes by default.

        height, width = daamlib.image_size(pipe)

    Raises TypeError for a pipeline without a denoiser, ValueError where neither pipeline nor denoiser says the size.
    """
    cells = getattr(denoiser_of(pipe).config, "sample_size", None)
    height, width = cells if isinstance(cells, list | tuple) else (cells, cells)
    if not height or not width:
        raise ValueError(f"the denoiser's config has the sample_size {cells!r}: expected the cells of a latent's side")
    scale = getattr(pipe, "vae_scale_factor", None)
    if scale is None:
        raise ValueError(
            f"{type(pipe).__name__} has no vae_scale_factor, the pixels that a latent's cell is wide: give the height "
            "and width of the images in the pipeline's call"
        )
    return height * scale, width * scale


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """Return a random generator for each image of a batch: an image is the same however many are made together.

        pipe(["a car"] * 3, generator=daamlib.generators(range(3)))

    They are on the CPU: the noise is the same whatever the pipeline computes on.
    """
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def denoiser_of(pipe: Any) -> Any:
    """Return a pipeline's U-Net or transformer without its wrappers, or raise TypeError for a pipeline without one.

    Wrappers (`torch.compile`, PEFT's `get_peft_model`, `DistributedDataParallel`, one in another) have another
    signature and other layer names.
    """
    for part in DENOISERS:
        denoiser = getattr(pipe, part, None)
        if isinstance(denoiser, torch.nn.Module):
            return _unwrapped(denoiser)
    kind = type(pipe).__name__
    raise TypeError(f"expected a diffusers pipeline with a U-Net or a transformer, got {kind}: DAAM reads these alone")


def _unwrapped(module: Any) -> Any:
    """Return a module out of its wrappers, which all call it, hooks and all."""
    if "_orig_mod" in module._modules:  # torch.compile
        return _unwrapped(module._orig_mod)
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return _unwrapped(module.module)
    return _unwrapped(module.get_base_model()) if hasattr(module, "get_base_model") else module  # PEFT


@contextmanager
def uncompiled(pipe: Any) -> Iterator[None]:
    """Run nothing of the denoiser compiled inside the `with`: compiled code does not call new hooks.

    It covers `torch.compile(denoiser)`, a module's `compile()`, and `denoiser.forward =
    torch.compile(denoiser.forward)`.
    """
    denoisers = [getattr(pipe, name, None) for name in DENOISERS]
    with ExitStack() as stack:
        for part in (part for each in denoisers if isinstance(each, torch.nn.Module) for part in each.modules()):
            original = getattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
            if original is not None:
                stack.enter_context(_replaced(part, "forward", original))
            if part._compiled_call_impl is not None:
                stack.enter_context(_replaced(part, "_compiled_call_impl", None))
        yield


@contextmanager
def _replaced(module: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module another value inside the `with`."""
    before = module.__dict__[name]  # past `__setattr__`, which the wrapper of torch.compile hands on
    module.__dict__[name] = value
    try:
        yield
    finally:
        module.__dict__[name] = before


@contextmanager
def loading(source: str | Path, *, exactly: bool = False) -> Iterator[None]:
    """Load without bars (those of downloads stay), and raise where a library only warns of missing weights.

    The ValueError names the `source`. With `exactly`, weights that belong to no part of the model are an error too.
    """
    import diffusers
    import transformers

    reports: list[str] = []
    shown: dict[str, int] = {}
    bars = diffusers.utils.logging
    set_hook = getattr(transformers.utils.logging, "set_tqdm_hook", lambda hook: None)  # before 5.4 the bars show

    def keep(record: logging.LogRecord) -> bool:
        text = re.sub(r"\x1b\[[\d;]*m", "", record.getMessage())  # without colours
        if MISSING in text or (exactly and any(words in text for words in LEFT_OVER)):
            reports.append(text)
            return False
        return record.levelno >= shown[record.name] and "requires torchvision" not in text

    with ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            shown[name] = logger.getEffectiveLevel()
            stack.callback(logger.setLevel, logger.level)
            stack.callback(logger.removeFilter, keep)
            logger.addFilter(keep)
            if shown[name] > logging.WARNING:  # silenced by its user
                logger.setLevel(logging.WARNING)
        if bars.is_progress_bar_enabled():
            stack.callback(bars.enable_progress_bar)
        bars.disable_progress_bar()
        stack.callback(set_hook, set_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True})))
        yield
    if reports:
        raise ValueError(
            f"the weights at {source} do not fit their model, and what they lack would be random: they are damaged, or "
            "of another version of a library. It says:\n" + "\n".join(reports)
        )


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Run PyTorch on `n` threads inside the `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
