"""Parts of pages that commands write."""


def between(text, start, end, new):
    """The page with what stands between two marks replaced; ValueError if a mark is missing."""
    before, first, rest = text.partition(start)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"the page lacks {start!r}, or {end!r} after it")
    return before + start + new + end + after
