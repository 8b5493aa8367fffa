"""Progress bars, silent under CI."""

import os
from collections.abc import Iterable

from tqdm.auto import tqdm


def bar(images: Iterable[int] | None, what: str, **options) -> tqdm:
    """A bar over images, or one to be moved by hand; `options` are tqdm's."""
    return tqdm(images, desc=what, disable="CI" in os.environ, **options)
