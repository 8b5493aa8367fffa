"""Reduce the stored pictures of the notebooks to 128 colours, a third of their bytes: `make notebooks` calls it."""

import base64
import io
import sys

import nbformat
from PIL import Image


def shrink(png: str) -> str:
    """A PNG in base64 -> the same picture with a palette, or itself where that is no smaller."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    small = io.BytesIO()
    picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return min(png, base64.b64encode(small.getvalue()).decode() + "\n", key=len)


for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = shrink(output.data["image/png"])
    nbformat.write(notebook, path)
