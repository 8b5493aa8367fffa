"""The figures of the notebooks: images in a row, heat maps over an image."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from .attention.heatmaps import HeatMaps
from .extras import needs

with needs("notebooks"):
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

Picture = Image.Image | np.ndarray
COLOUR_MAP = "magma"  # perceptually uniform
CLASS_COLOURS = {  # of curves and masks; by Okabe and Ito, which colour-blind readers can tell apart
    "car": "#0072B2",
    "person": "#E69F00",
    "traffic light": "#009E73",
    "rider": "#CC79A7",
}
METHOD_COLOURS = {"DAAM": "#D55E00", "LDAAM": "#56B4E9"}  # of curves and bars; by Okabe and Ito, no colour of a class


def _grid(rows: int, columns: int, width: float, height: float, layout: str) -> tuple[Figure, np.ndarray]:
    """A figure of that many bare axes; width and height in inches."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout=layout)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    return figure, axes


def _cells(count: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a grid of `count` pictures, at most `columns` in a row."""
    columns = min(columns, count)
    return -(-count // columns), columns


def _array(values) -> np.ndarray:
    """A map from any device, or an array, in float32."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def _draw_over(ax, heat: np.ndarray, pixels: np.ndarray, **options):
    """Draw an (h, w) map up-sampled to the size of the (H, W, 3) pixels."""
    extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    return ax.imshow(heat, cmap=COLOUR_MAP, extent=extent, interpolation="bilinear", **options)


def _outline(ax, mask: np.ndarray, colour: str = "cyan", width: float = 0.8) -> None:
    if mask.any() and not mask.all():
        ax.contour(mask, levels=[0.5], colors=colour, linewidths=width)


def show_images(
    images: Sequence[Picture], titles: Sequence[str] = (), *, columns: int = 6, size: float = 2.0
) -> Figure:
    """Show images in a grid.

    Args:
        images: PIL images or (H, W[, 3]) arrays.
        titles: of the first images, as many as there are.
        columns: how many images stand in a row at most.
        size: width of an image in inches.

    Returns:
        The figure.
    """
    rows, columns = _cells(len(images), columns)
    figure, axes = _grid(rows, columns, size * columns, (size + 0.35) * rows, "tight")
    for ax, image in zip(axes.flat, images, strict=False):
        ax.imshow(image)
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(title, fontsize=10)
    return figure


def show_classes(
    images: Sequence[Picture],
    masks: Sequence[Mapping[str, np.ndarray]],
    *,
    row_titles: Sequence[str] = (),
    colours: Mapping[str, str] = CLASS_COLOURS,
    opacity: float = 0.0,
    columns: int = 6,
    size: float = 1.7,
) -> Figure:
    """Show images in a grid, the masks of classes as outlines in their colours, and which colour is which.

    Args:
        images: PIL images or (H, W, 3) arrays.
        masks: {class: (H, W) boolean mask} of each image.
        row_titles: written beside the rows.
        colours: of the classes; the legend names all of them.
        opacity: of the colour inside an outline, in [0, 1].
        columns: how many images stand in a row at most.
        size: width of an image in inches.

    Returns:
        The figure.
    """
    rows, columns = _cells(len(images), columns)
    figure, axes = _grid(rows, columns, size * columns + 0.3, (size + 0.05) * rows + 0.4, "constrained")
    for ax, image, of_image in zip(axes.flat, images, masks, strict=False):
        ax.imshow(image)
        for name, mask in of_image.items():
            inside = np.zeros((*np.shape(mask), 4))
            inside[np.asarray(mask, bool)] = to_rgba(colours[name], opacity)
            ax.imshow(inside)
            _outline(ax, np.asarray(mask), colours[name], width=1.5)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=10)
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=10, frameon=False)
    return figure


def show_maps(image: Picture, maps: Mapping[str, torch.Tensor], *, columns: int = 6, size: float = 2.0) -> Figure:
    """Show an image, then each map in plain colours, up-sampled to the image and scaled to its own [0, 1].

    Args:
        image: PIL image or (H, W, 3) array.
        maps: title -> (h, w) map. Its minimum and maximum, before scaling, stand under the picture.
        columns: how many pictures stand in a row at most.
        size: width of a picture in inches.

    Returns:
        The figure.
    """
    pixels = np.asarray(image)
    rows, columns = _cells(len(maps) + 1, columns)
    figure, axes = _grid(rows, columns, size * columns, (size + 0.45) * rows, "tight")
    axes.flat[0].imshow(pixels)
    axes.flat[0].set_title("image", fontsize=10)
    for ax, (title, values) in zip(axes.flat[1:], maps.items(), strict=False):
        heat = _array(values)
        _draw_over(ax, heat, pixels)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(f"{heat.min():.3g} ... {heat.max():.3g}", fontsize=9)
    return figure


def show_map_rows(
    images: Sequence[Picture],
    maps: Mapping[str, Sequence[torch.Tensor]],
    *,
    masks: Mapping[str, Sequence] | None = None,
    row_titles: Sequence[str] = (),
    size: float = 1.6,
) -> Figure:
    """Show one row for each image: the image, then its maps in plain colours, each scaled to its own [0, 1].

    Args:
        images: PIL images or (H, W, 3) arrays.
        maps: title -> one (h, w) map for each image.
        masks: title -> one (H, W) boolean mask for each image, drawn as an outline.
        row_titles: written beside the images.
        size: width of a picture in inches.

    Returns:
        The figure.
    """
    rows, columns = len(images), len(maps) + 1
    lines = 1 + max(title.count("\n") for title in maps)
    height = (size + 0.03) * rows + 0.35 + 0.17 * lines
    figure, axes = _grid(rows, columns, size * columns + 0.9, height, "constrained")
    for row, image in enumerate(images):
        pixels = np.asarray(image)
        axes[row, 0].imshow(pixels)
        for ax, (title, values) in zip(axes[row, 1:], maps.items(), strict=True):
            heat = HeatMaps(values[row][None].detach().float().cpu(), (title,)).normalized()[0]
            drawn = _draw_over(ax, heat.numpy(), pixels, vmin=0, vmax=1)
            if masks:
                _outline(ax, _array(masks[title][row]) > 0)
    for ax, title in zip(axes[0], ("image", *maps), strict=True):
        ax.set_title(title, fontsize=10)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=10)
    part = min(1.0, 2 / rows)  # of the height: no bar needs more than two rows
    bar = figure.colorbar(
        drawn,
        ax=axes,
        ticks=[0, 0.5, 1],
        fraction=0.03,
        pad=0.01,
        shrink=part,
        anchor=(0.0, 1.0),
        aspect=12 * rows * part,
    )
    bar.set_label("of the map's own range", fontsize=9)
    bar.ax.tick_params(labelsize=9)
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
    """Show numbers as colours, all on one scale, cells as they are.

    Args:
        values: title -> (h, w) array or tensor.
        label: what the colour bar says.
        outline: (h, w) boolean mask, whose outline is drawn on each.
        limits: the values at the ends of the colour bar; None for the smallest and the largest of all.
        colour_map: one of matplotlib's.
        columns: how many pictures stand in a row at most.
        size: width of a picture in inches.

    Returns:
        The figure.
    """
    arrays = [_array(value) for value in values.values()]
    low, high = limits or (min(array.min() for array in arrays), max(array.max() for array in arrays))
    rows, columns = _cells(len(arrays), columns)
    figure, axes = _grid(rows, columns, size * columns + 1.1, (size + 0.3) * rows + 0.2, "constrained")
    for ax, title, array in zip(axes.flat, values, arrays, strict=False):
        drawn = ax.imshow(array, cmap=colour_map, vmin=low, vmax=high)
        if outline is not None:
            _outline(ax, np.asarray(outline))
        ax.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axes, label=label, fraction=0.04, aspect=12 * rows, pad=0.01)
    return figure
