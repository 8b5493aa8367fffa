"""Rendered scenes and their latents on disk, made once and memory-mapped by the training."""

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from daamlib.io import atomic_write
from daamlib_lab.urban.scenes import SIZE, render, to_tensor

CAPTIONS = 4  # of a scene


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes, memory-mapped; what is written to the arrays stays in memory.

    Attributes:
        images: (n, S, S, 3) uint8.
        labels: (n, S, S) uint8 Cityscapes ids.
        captions: `CAPTIONS` of each scene.
    """

    images: np.ndarray
    labels: np.ndarray
    captions: list[list[str]]


def _render_one(seed: int, world: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    scene = render(seed, SIZE, world)
    return scene.image, scene.labels, [scene.say(k) for k in range(CAPTIONS)]


def render_scenes(
    folder: Path, n: int, *, first_seed: int = 0, workers: int | None = None, world: str = "street"
) -> Scenes:
    """Render scenes on all cores, or read them where they were rendered before.

    Args:
        folder: where they are stored.
        n: how many.
        first_seed: that of the first scene; the others follow.
        workers: processes; None for one on each core.
        world: of scenes that are not there yet.

    Returns:
        The scenes.

    Raises:
        ValueError: if the folder holds fewer.
    """
    done = folder / "captions.json"  # written last
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, SIZE, SIZE, 3))
        labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (n, SIZE, SIZE))
        captions: list[list[str]] = []
        seeds = range(first_seed, first_seed + n)
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            rendered = pool.map(_render_one, seeds, itertools.repeat(world), chunksize=64)
            for i, (*maps, texts) in enumerate(tqdm(rendered, total=n, desc="rendering", mininterval=10)):
                images[i], labels[i] = maps
                captions.append(texts)
        images.flush()
        labels.flush()
        with atomic_write(done) as temporary:
            temporary.write_text(json.dumps(captions))
    captions = json.loads(done.read_text())
    if len(captions) < n:
        raise ValueError(f"{folder} holds {len(captions)} scenes, {n} were asked for: remove it or name another folder")
    return Scenes(
        np.load(folder / "images.npy", mmap_mode="c")[:n],
        np.load(folder / "labels.npy", mmap_mode="c")[:n],
        captions[:n],
    )


@torch.no_grad()
def encode_latents(vae, scenes: Scenes, path: Path, *, size: int, device: str, batch: int = 64) -> np.ndarray:
    """The scenes' latent means (n, 4, size/4, size/4) float16, stored in `path`; only missing ones are encoded."""
    shape = (vae.config.latent_channels, size // 4, size // 4)
    latents = np.load(path) if path.exists() else np.empty((0, *shape), np.float16)
    if len(latents) < len(scenes.captions):
        vae = vae.to(device).eval()
        found = [latents]
        for start in tqdm(range(len(latents), len(scenes.captions), batch), desc=f"latents {size} px", mininterval=10):
            images = torch.from_numpy(scenes.images[start : start + batch]).to(device)
            found.append(vae.encode(to_tensor(images, size)).latent_dist.mean.cpu().numpy().astype(np.float16))
        latents = np.concatenate(found)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, latents)
    return latents
