"""Drawing one image of a dataset, and everything that its bytes depend on."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..attention.layers import Layer
from ..attention.record import AttentionRecord
from ..attention.trace import trace
from . import folder as files


def weight_hash(pipe) -> str:
    """16 hexadecimal digits of the SHA-256 of the U-Net's, text encoders' and VAE's weights as they are loaded."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        module = getattr(pipe, part, None)
        for name, tensor in sorted(_state(module).items()) if module is not None else ():
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name; those that `enable_sequential_cpu_offload` has taken away, from where they wait."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model  # without it no weight could be on `meta`

        state = get_state_dict_offloaded_model(module)
    return state


def check_prompts(prompts: Sequence[str]) -> None:
    """TypeError or ValueError unless they are strings, one or more."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a list of strings, one for each image: [prompt] * 4 makes four of one")
    if not prompts:
        raise ValueError("there are no prompts: expected one or more")


def generation_settings(
    pipe,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    guidance: float,
    size: int | tuple[int, int] | None,
    keep_steps: int,
) -> dict[str, Any]:
    """Everything that an image depends on. Raises TypeError or ValueError for arguments that do not fit."""
    check_prompts(prompts)
    if not 0 <= keep_steps <= steps:
        raise ValueError(f"keep_steps must be 0 ... {steps}, the number of steps, got {keep_steps}")
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    config = json.dumps(config, sort_keys=True, default=str).encode()
    device = pipe._execution_device
    model = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    size = (size, size) if isinstance(size, int) else size
    return (
        common_settings("generated", len(prompts), seed, size)
        | {
            "prompts": list(prompts),
            "steps": steps,
            "guidance": float(guidance),
            "keep_steps": keep_steps,
            "model": Path(model).name if Path(model).is_dir() else model,  # a path means nothing elsewhere
            "weights": weight_hash(pipe),
            "dtype": str(pipe.unet.dtype),
            "scheduler": type(pipe.scheduler).__name__,
            "scheduler_config": hashlib.sha256(config).hexdigest()[:16],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
        }
    )


def common_settings(kind: str, n: int, seed: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """What generated and rendered datasets both have, None for what a rendered one has not."""
    if seed < 0:
        raise ValueError(f"a seed is 0 or more, got {seed}")
    packages = ("torch", "diffusers", "transformers", "daamlib")
    nothing = dict.fromkeys(("weights", "scheduler", "steps", "guidance", "keep_steps"))
    return {
        "format": files.FORMAT,
        "kind": kind,
        "images": n,
        "seed": seed,
        "size": size,
        **nothing,
        "labels": [],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def draw(pipe, prompt: str, seed: int, settings: dict[str, Any]) -> tuple[Image.Image, AttentionRecord | None]:
    """One image, and its record thinned to the steps to keep."""
    height, width = settings["size"] or (None, None)
    call = functools.partial(
        pipe,
        prompt,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        height=height,
        width=width,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    if not settings["keep_steps"]:
        return call().images[0], None
    with trace(pipe) as tracer:
        image = call().images[0]
    record, keep = tracer[0], settings["keep_steps"]
    passes = len(record.timesteps)  # of some schedulers more than steps
    record = record.select(steps=[int((j + 0.5) * passes / keep) for j in range(keep)])
    return image, replace(record, layers=tuple(_halve(layer) for layer in record.layers))


def _halve(layer: Layer) -> Layer:
    """The layer with its queries in half precision."""
    queries = layer.queries.half() if layer.queries.dtype == torch.float32 else layer.queries
    if not queries.isfinite().all():
        raise ValueError(f"the queries of {layer.name} are beyond float16: generate with keep_steps=0")
    return replace(layer, queries=queries)
