"""Rendered scenes and their latents on disk, made once and memory-mapped by the training."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ...io import atomic_write
from ..captions import dense_caption
from ..scenes import SIZE, render, to_tensor

DENSE = 4  # dense captions of a scene


@dataclass(frozen=True)
class Scenes:
    """`n` rendered scenes: `images` (n, S, S, 3) uint8, `labels` (n, S, S) Cityscapes ids, `captions` and, for each
    scene, `DENSE` `dense_captions`."""

    images: np.ndarray
    labels: np.ndarray
    captions: list[str]
    dense_captions: list[list[str]]


def _render_one(seed: int) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
    scene = render(seed, SIZE)
    rngs = [np.random.default_rng([seed, k]) for k in range(DENSE)]
    dense = [dense_caption(rng, scene.things, scene.time, scene.trees) for rng in rngs]
    return scene.image, scene.labels, scene.caption, dense


def render_scenes(folder: Path, n: int, *, first_seed: int = 0, workers: int | None = None) -> Scenes:
    """The scenes of seeds `first_seed ... first_seed + n - 1`, rendered to `folder` unless they are there."""
    done = folder / "captions.json"  # written last
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, SIZE, SIZE, 3))
        labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (n, SIZE, SIZE))
        captions: dict[str, list] = {"sparse": [], "dense": []}
        seeds = range(first_seed, first_seed + n)
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            rendered = pool.map(_render_one, seeds, chunksize=64)
            for i, (*maps, sparse, dense) in enumerate(tqdm(rendered, total=n, desc="rendering", mininterval=10)):
                images[i], labels[i] = maps
                captions["sparse"].append(sparse)
                captions["dense"].append(dense)
        images.flush()
        labels.flush()
        done.write_text(json.dumps(captions))
    captions = json.loads(done.read_text())
    found = len(captions["sparse"])
    if found < n:
        raise ValueError(f"{folder} holds {found} scenes, {n} were asked for: remove it or name another folder")
    return Scenes(
        np.load(folder / "images.npy", mmap_mode="r")[:n],
        np.load(folder / "labels.npy", mmap_mode="r")[:n],
        captions["sparse"][:n],
        captions["dense"][:n],
    )


@torch.no_grad()
def encode_latents(vae, scenes: Scenes, path: Path, *, size: int, device: str, batch: int = 64) -> np.ndarray:
    """The scenes' latent means (n, 4, size/4, size/4) float16, in `path`; only what it lacks is encoded."""
    shape = (vae.config.latent_channels, size // 4, size // 4)
    done = np.load(path) if path.exists() else np.empty((0, *shape), np.float16)
    if len(done) < len(scenes.captions):
        vae = vae.to(device).eval()
        latents = np.empty((len(scenes.captions), *shape), np.float16)
        latents[: len(done)] = done
        for start in tqdm(range(len(done), len(latents), batch), desc=f"latents {size} px", mininterval=10):
            pixels = to_tensor(scenes.images[start : start + batch], size).to(device)
            mean = vae.encode(pixels).latent_dist.mean
            latents[start : start + batch] = mean.float().cpu().numpy()
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, latents)
    return np.load(path, mmap_mode="r")
