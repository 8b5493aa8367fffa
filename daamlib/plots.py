"""The figures of the notebooks: images in a row, heat maps over an image."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .attention.heatmaps import HeatMaps
from .extras import needs

with needs("notebooks"):
    import matplotlib.pyplot as plt
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


def show_map_rows(
    images: Sequence,
    maps: Mapping[str, Sequence[torch.Tensor]],
    *,
    masks: Mapping[str, Sequence] | None = None,
    row_titles: Sequence[str] = (),
    size: float = 1.6,
) -> Figure:
    """One row for each image: the image, then its maps in plain colours, each scaled to its own [0, 1].

    maps: title -> one (h, w) map for each image. masks: title -> one (H, W) boolean mask for each image, drawn as
    an outline. row_titles: written beside the images.
    """
    rows, columns = len(images), len(maps) + 1
    lines = 1 + max(title.count("\n") for title in maps)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(size * columns + 0.9, (size + 0.03) * rows + 0.35 + 0.17 * lines),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for row, image in enumerate(images):
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        axes[row, 0].imshow(pixels)
        for ax, (title, values) in zip(axes[row, 1:], maps.items(), strict=True):
            heat = HeatMaps(values[row][None].detach().float().cpu(), (title,)).normalized()[0]
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            drawn = ax.imshow(heat, cmap=COLOUR_MAP, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
            mask = masks[title][row] if masks else np.zeros(0)
            mask = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
            if mask.any() and not mask.all():
                ax.contour(mask, levels=[0.5], colors="cyan", linewidths=0.8)
    for ax, title in zip(axes[0], ("image", *maps), strict=True):
        ax.set_title(title, fontsize=9)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, aspect=12 * rows, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label("of the map's own range", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def show_values(
    values: Mapping[str, Sequence],
    label: str,
    *,
    outline: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
    colour_map: str = COLOUR_MAP,
    columns: int = 6,
    size: float = 1.7,
) -> Figure:
    """Numbers as colours: title -> (h, w) array or tensor, all on one scale, cells shown as they are.

    label: what the colour bar says. outline: a boolean (h, w) mask whose outline is drawn on each. limits: the values
    at the ends of the colour bar; None takes the smallest and the largest of all.
    """
    arrays = [np.asarray(torch.as_tensor(value).detach().float().cpu()) for value in values.values()]
    low, high = limits or (min(array.min() for array in arrays), max(array.max() for array in arrays))
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns + 1.1, (size + 0.3) * rows + 0.2), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, title, array in zip(axes.flat, values, arrays, strict=False):
        drawn = ax.imshow(array, cmap=colour_map, vmin=low, vmax=high)
        if outline is not None:
            ax.contour(outline, levels=[0.5], colors="cyan", linewidths=0.8)
        ax.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, label=label, fraction=0.04, aspect=12 * rows, pad=0.01)
    return figure
