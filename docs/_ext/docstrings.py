"""Docstrings as they stand in the code, for Sphinx: single backticks are code, indented lines are formulae or code."""

import re

import daamlib

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
CODE = re.compile(r"(`[^`]+`)")


def marked_up(text):
    """A link for a public name of daamlib, code for what else is in backticks, and nothing special outside of them."""

    def code(span):
        name = span.strip("`")
        public = re.fullmatch(r"(?:daamlib\.)?(\w+)[\w.]*", name)
        if public and callable(vars(daamlib).get(public[1])):
            return f":py:obj:`~daamlib.{name.removeprefix('daamlib.')}`"
        return f"``{name}``"

    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([|*])", r"\\\1", parts[i])
        if i and parts[i][:1].isalnum():  # as in "`Thing`s"
            parts[i] = "\\ " + parts[i]
    parts[1::2] = map(code, parts[1::2])
    return "".join(parts)


def blocks(lines):
    """The lines in blocks of one kind, literal or text: [is it literal?, lines]."""
    found, section = [], False
    for line in lines:
        if line and not line.startswith(" "):
            section = bool(SECTION.match(line))
        literal = line.startswith("    ") and not section
        if not found or (line and found[-1][0] != literal):
            found.append((literal, []))
        found[-1][1].append(line)
    return found


def rewrite(app, what, name, obj, options, lines):
    """Before napoleon reads the sections."""
    result = []
    for literal, block in blocks(lines):
        if literal:
            result += ["", "::", "", *block, ""]
        else:
            # as one text, since code may go on in the next line
            result += marked_up("\n".join(block)).split("\n")
    for i, line in enumerate(result[1:], start=1):
        if result[i - 1] == "Returns:":  # the types stand in the signature: what is before a colon is none
            result[i] = line.replace(line.lstrip(), ": " + line.lstrip())
    lines[:] = result


def shorten(app, what, name, obj, options, signature, annotation):
    """Sphinx cannot read `<factory>` in a signature, and then writes all of it in full."""
    return signature and signature.replace("<factory>", "..."), annotation


def resolve(app, env, node, contnode):
    """Annotations name a class where it is defined; it is documented where it is public."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") != "py" or not hasattr(daamlib, name):
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", f"daamlib.{name}", node, contnode)


def setup(app):
    """Register them."""
    app.connect("autodoc-process-docstring", rewrite, priority=400)
    app.connect("autodoc-process-signature", shorten)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
