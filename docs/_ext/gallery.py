"""The directive `gallery`: figures out of the notebooks' stored outputs, each a link to the section that makes it."""

import base64
import os
import re
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PICTURES = {"image/png": "png", "image/jpeg": "jpg"}
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def pictures(path):
    """(heading above it, file ending, bytes) of each picture that a notebook stores."""
    heading = path.stem
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            heading = (HEADING.findall(cell.source) or [heading])[-1]
        for output in cell.get("outputs", ()):
            for mime, ending in PICTURES.items():
                if mime in output.get("data", {}):
                    yield heading, ending, base64.b64decode(output.data[mime])


class Gallery(SphinxDirective):
    """The first picture of each notebook, and the one with the most in it: the largest file among the others."""

    def run(self):
        """The figures, their pictures written beside the build."""
        folder = Path(self.env.doctreedir) / "gallery"
        folder.mkdir(parents=True, exist_ok=True)
        here = Path(self.env.doc2path(self.env.docname)).parent
        gallery = nodes.container(classes=["gallery"])
        for path in sorted((Path(self.env.srcdir) / "notebooks").glob("*.ipynb")):
            self.env.note_dependency(str(path))
            first, *others = pictures(path)
            for number, (heading, ending, content) in enumerate([first, *sorted(others, key=lambda p: -len(p[2]))[:1]]):
                file = folder / f"{path.stem}-{number}.{ending}"
                file.write_bytes(content)
                target = self.env.app.builder.get_relative_uri(self.env.docname, f"notebooks/{path.stem}")
                image = nodes.image(uri=os.path.relpath(file, here), alt=heading)
                link = nodes.reference("", "", image, refuri=target, internal=True)
                caption = nodes.caption(heading, f"{path.stem[:2]}: {heading}")
                gallery += nodes.figure("", link, caption)
        return [gallery]


def setup(app):
    """Register the directive."""
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
