"""The explorer's pictures: arrays in, PNG and SVG inside HTML out.

HTML rather than ipywidgets' Image, which has no text for those who cannot see it.
"""

import base64
import html
import io

import numpy as np
from PIL import Image
from skimage.segmentation import find_boundaries

OUTLINE = (0, 255, 255)  # the outline of the true mask, as in daamlib.plots
WIDTH = 200  # of a picture, in CSS pixels: four stand side by side in a notebook of 1280 pixels
CAPTION = "line-height:1.4;padding-top:2px"


def cut_out(image: np.ndarray, mask: np.ndarray, true_mask: np.ndarray | None = None) -> np.ndarray:
    """Return (H, W, 3) uint8: the image inside the mask, nearly black outside, and the outline of the true mask."""
    pixels = np.where(mask[..., None], image, image // 6)
    if true_mask is not None:
        pixels[find_boundaries(true_mask, mode="inner")] = OUTLINE
    return pixels


def png(picture: Image.Image | np.ndarray) -> bytes:
    """Return a picture, or (H, W, 3) uint8 pixels, as a PNG that is compressed for speed."""
    buffer = io.BytesIO()
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def figure(picture: Image.Image | np.ndarray, alt: str, caption: str) -> str:
    """Return a picture with its text and caption as HTML."""
    data = base64.b64encode(png(picture)).decode("ascii")
    return (
        f'<figure style="margin:0;width:{WIDTH}px"><img alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{data}" style="width:{WIDTH}px;display:block">'
        f'<figcaption style="{CAPTION}">{html.escape(caption)}</figcaption></figure>'
    )


def curve_figure(thresholds: np.ndarray, values: np.ndarray, threshold: float, iou: float) -> str:
    """Return the IoU over thresholds as inline SVG, with a point where the slider stands.

    matplotlib takes longer for it than the model for a word. Text and axes have the notebook's colour.
    """
    left, top, right, bottom = 30, 8, WIDTH - 8, WIDTH - 32

    def x(value: float) -> float:
        return left + (right - left) * value

    def y(value: float) -> float:
        return bottom - (bottom - top) * value

    line = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(thresholds, values, strict=True))
    ticks = "".join(
        f'<path d="M{x(0)} {y(v):.1f}H{right}" stroke="currentColor" stroke-opacity=".15"/>'
        f'<text x="{left - 4}" y="{y(v) + 3.5:.1f}" text-anchor="end">{v:g}</text>'
        f'<text x="{x(v):.1f}" y="{bottom + 13}" text-anchor="middle">{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    best = int(np.argmax(values))
    caption = f"best IoU {values[best]:.3f} at {thresholds[best]:.2f}"
    return (
        f'<figure style="margin:0;width:{WIDTH}px"><svg role="img" width="{WIDTH}" height="{WIDTH}" '
        f'aria-label="IoU over the threshold; {iou:.3f} at {threshold:.2f}; {caption}" '
        'fill="currentColor" font-size="10" style="display:block">'
        f'{ticks}<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="currentColor"/>'
        f'<polyline points="{line}" fill="none" stroke="#3b7dd8" stroke-width="1.8"/>'
        f'<circle cx="{x(threshold):.1f}" cy="{y(iou):.1f}" r="4.5" fill="#d8483b"/>'
        f'<text x="{(left + right) / 2}" y="{bottom + 27}" text-anchor="middle">threshold</text>'
        f'<text x="{left + 5}" y="{top + 14}">IoU</text></svg>'
        f'<figcaption style="{CAPTION}">{caption}</figcaption></figure>'
    )
