"""Formulae as MathML, which browsers show by themselves: no script and no font has to be loaded from anywhere."""

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError


def show(translator, node, *, block):
    """The MathML of a node's LaTeX; a command that docutils does not know stops the build and is named."""
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        raise ExtensionError(f"{node.source}: no MathML for {node.astext()!r}: {error}") from error
    tag = "div" if block else "span"
    translator.body.append(f'<{tag} class="math">{formula}</{tag}>')
    raise SkipNode  # the LaTeX itself is no text of the page


def inline(translator, node):
    """Formulae within text."""
    show(translator, node, block=False)


def display(translator, node):
    """Formulae on a line of their own, which scroll where the page is narrow."""
    show(translator, node, block=True)


def setup(app):
    """Register the renderer that conf.py chooses."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
