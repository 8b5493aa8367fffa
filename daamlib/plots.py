"""The figures of the notebooks: images in a row, heat maps over an image."""

from collections.abc import Iterable, Mapping, Sequence

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


def _grid(
    count: int, columns: int, cell: tuple[float, float], edge: tuple[float, float] = (0.0, 0.0), layout="constrained"
) -> tuple[Figure, np.ndarray]:
    """Return bare axes of `count` pictures, at most `columns` in a row; cell and edge: width and height in inches."""
    if not count:
        raise ValueError("there is nothing to show: give one image or more")
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (columns * cell[0] + edge[0], rows * cell[1] + edge[1])
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout=layout)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    return figure, axes


def _name(axes: Iterable, titles: Iterable[str], *, row: bool = False) -> None:
    """Write titles above the first axes, or to the left of them."""
    for ax, title in zip(axes, titles, strict=False):
        (ax.set_ylabel if row else ax.set_title)(title, fontsize=10)


def _array(values) -> np.ndarray:
    """Return a map from any device, or an array, in float32."""
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
    """Show PIL images or (H, W[, 3]) arrays in a grid, at most `columns` in a row, each `size` inches wide.

        show_images(images, ["one", "two"], columns=2)

    Fewer titles than images may be given.
    """
    figure, axes = _grid(len(images), columns, (size, size + 0.35), layout="tight")
    for ax, image in zip(axes.flat, images, strict=False):
        ax.imshow(image)
    _name(axes.flat, titles)
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
    """Show images with the outlines of their classes, {class: (H, W) boolean mask} each, and which colour is which.

        show_classes([image], [{"car": mask}], opacity=0.3)

    The legend names all of `colours`; `opacity` is that of the colour inside an outline; `columns` and `size` are as of
    `show_images`, `row_titles` stand to the left of the rows.
    """
    figure, axes = _grid(len(images), columns, (size, size + 0.05), (0.3, 0.4))
    for ax, image, of_image in zip(axes.flat, images, masks, strict=False):
        ax.imshow(image)
        for name, mask in of_image.items():
            inside = np.zeros((*np.shape(mask), 4))
            inside[np.asarray(mask, bool)] = to_rgba(colours[name], opacity)
            ax.imshow(inside)
            _outline(ax, np.asarray(mask), colours[name], width=1.5)
    _name(axes[:, 0], row_titles, row=True)
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=10, frameon=False)
    return figure


def show_maps(
    image: Picture,
    maps: HeatMaps | Mapping[str, torch.Tensor | np.ndarray | HeatMaps],
    *,
    columns: int = 6,
    size: float = 2.0,
) -> Figure:
    """Show an image, then each map in plain colours, up-sampled to the image and scaled to its own [0, 1].

        show_maps(image, record.daam())  # every word of the prompt
        show_maps(image, {"car": record.daam()["car"], "traffic light": record.ldaam("traffic light")})

    `maps` are those of a record, a picture a word; or title -> (h, w) map, or the maps of a text, whose words are
    averaged. A map's minimum and maximum, before scaling, stand under the picture; `columns` and `size` are as of
    `show_images`. Raises ValueError for what is no (h, w) map.
    """
    named = _by_word(maps) if isinstance(maps, HeatMaps) else {title: _one_map(each) for title, each in maps.items()}
    wrong = {title: tuple(heat.shape) for title, heat in named.items() if heat.ndim != 2}
    if wrong:
        raise ValueError(f"expected an (h, w) map under each title, such as maps['car'], got the shapes {wrong}")
    pixels = np.asarray(image)
    figure, axes = _grid(len(named) + 1, columns, (size, size + 0.45), layout="tight")
    axes.flat[0].imshow(pixels)
    _name(axes.flat, ["image", *named])
    for ax, heat in zip(axes.flat[1:], named.values(), strict=False):
        _draw_over(ax, heat, pixels)
        ax.set_xlabel(f"{heat.min():.3g} ... {heat.max():.3g}", fontsize=9)
    return figure


def _by_word(maps: HeatMaps) -> dict[str, np.ndarray]:
    """Return the map of each word of a text, or of each row where the words are unknown."""
    words = dict.fromkeys(word.text for word in maps.words)
    return {word: _array(maps[word]) for word in words} or dict(zip(maps.tokens, _array(maps.values), strict=True))


def _one_map(given: torch.Tensor | np.ndarray | HeatMaps) -> np.ndarray:
    """Return a map; of the maps of a text their mean over its words."""
    return np.mean(list(_by_word(given).values()), axis=0) if isinstance(given, HeatMaps) else _array(given)


def show_map_rows(
    images: Sequence[Picture],
    maps: Mapping[str, Sequence[torch.Tensor]],
    *,
    masks: Mapping[str, Sequence] | None = None,
    row_titles: Sequence[str] = (),
    size: float = 1.6,
) -> Figure:
    """Show one row for each image: the image, then its maps in plain colours, each scaled to its own [0, 1].

        show_map_rows(images, {"car": [each.daam()["car"] for each in records]}, masks={"car": masks})

    Both map a title to one (h, w) map, or (H, W) boolean mask, for each image; masks are drawn as outlines.
    """
    rows, columns = len(images), len(maps) + 1
    lines = 1 + max(title.count("\n") for title in maps)
    figure, axes = _grid(rows * columns, columns, (size, size + 0.03), (0.9, 0.35 + 0.17 * lines))
    for row, image in enumerate(images):
        pixels = np.asarray(image)
        axes[row, 0].imshow(pixels)
        for ax, (title, values) in zip(axes[row, 1:], maps.items(), strict=True):
            heat = HeatMaps(values[row][None].detach().float().cpu(), (title,)).normalized()[0]
            drawn = _draw_over(ax, heat.numpy(), pixels, vmin=0, vmax=1)
            if masks:
                _outline(ax, _array(masks[title][row]) > 0)
    _name(axes[0], ("image", *maps))
    _name(axes[:, 0], row_titles, row=True)
    part = min(1.0, 2 / rows)  # of the height: no bar needs more than two rows
    bar = figure.colorbar(
        drawn, ax=axes, ticks=[0, 0.5, 1], fraction=0.03, pad=0.01, shrink=part, anchor=(0, 1), aspect=12 * rows * part
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
    """Show numbers as colours, all on one scale, cells as they are: title -> (h, w) array or tensor.

        show_values({"car": record.daam()["car"], "a": record.daam()["a"]}, "sum of the attention")

    `label` stands at the colour bar, whose ends are `limits` or the smallest and the largest value; the outline of the
    (h, w) boolean mask `outline` is drawn on each; `columns` and `size` are as of `show_images`.
    """
    arrays = [_array(value) for value in values.values()]
    figure, axes = _grid(len(arrays), columns, (size, size + 0.3), (1.1, 0.2))
    low, high = limits or (min(array.min() for array in arrays), max(array.max() for array in arrays))
    for ax, array in zip(axes.flat, arrays, strict=False):
        drawn = ax.imshow(array, cmap=colour_map, vmin=low, vmax=high)
        if outline is not None:
            _outline(ax, np.asarray(outline))
    _name(axes.flat, values)
    figure.colorbar(drawn, ax=axes, label=label, fraction=0.04, aspect=12 * len(axes), pad=0.01)
    return figure
