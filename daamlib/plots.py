"""The figures of the notebooks: images in a row, heat maps over an image."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

COLOUR_MAP = "magma"  # perceptually uniform


def show_images(images: Sequence, titles: Sequence[str] = (), *, columns: int = 6, size: float = 2.0) -> Figure:
    """A grid of PIL images or (H, W[, 3]) arrays; `size` is the width of one in inches."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.25) * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, images, strict=False):
        ax.imshow(image)
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def show_maps(
    image, maps: Mapping[str, torch.Tensor], *, alpha: float = 0.65, columns: int = 6, size: float = 2.0
) -> Figure:
    """The image, then each (h, w) map over it, up-sampled to the image and min-max normalised by itself.

    maps: title -> map. The values behind the colours stand under each picture as its minimum and maximum.
    """
    pixels = np.asarray(image)
    columns = min(columns, len(maps) + 1)
    rows = -(-(len(maps) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.45) * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_frame_on(False)
    axes.flat[0].imshow(pixels)
    axes.flat[0].set_title("image", fontsize=9)
    extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    for ax, (title, values) in zip(axes.flat[1:], maps.items(), strict=False):
        heat = values.detach().float().cpu().numpy()
        ax.imshow(pixels)
        ax.imshow(heat, cmap=COLOUR_MAP, alpha=alpha, extent=extent, interpolation="bilinear")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(f"{heat.min():.3g} ... {heat.max():.3g}", fontsize=7)
    figure.tight_layout()
    return figure
