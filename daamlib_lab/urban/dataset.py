"""Rendered scenes as a dataset with exact labels, in the layout of `daamlib.datasets.generate`."""

from pathlib import Path

from daamlib.datasets import Dataset, load
from daamlib.datasets import folder as files

from . import scenes


def render_dataset(
    folder: str | Path, n: int, *, first_seed: int = scenes.HELD_OUT, size: int = scenes.SIZE
) -> Dataset:
    """Write rendered scenes with their exact label maps; resumed and refused as by `generate`.

    A scene's prompt names the `KINDS` that cover `MIN_AREA` of its label map: "a car and a rider in an urban
    environment", or "an urban environment".

    Args:
        folder: of the dataset.
        n: how many scenes; those of the seeds first_seed ... first_seed + n - 1.
        first_seed: the bundled model never saw the scenes from `HELD_OUT` on.
        size: side of the square images in pixels, 16 or more; by default the bundled model's, and for another model
            best its own (`daamlib.pipeline.image_size`).

    Returns:
        The dataset.

    Raises:
        ValueError: for n < 1, a size below 16, or a folder that was begun with other settings.
    """
    if n < 1:
        raise ValueError(f"expected one scene or more, got n={n}")
    if size < scenes.LEAST_SIDE:
        raise ValueError(f"a scene has a side of {scenes.LEAST_SIDE} px or more, got size={size}")
    folder, parts = Path(folder), ("images", "labels")
    made_by = {"model": "daamlib_lab.urban.scenes", "labels": ["exact"]}
    settings = files.common_settings("rendered", n, first_seed, (size, size)) | made_by
    settings = files.compare(folder, settings, parts, range(n))
    files.verify(folder, settings, range(n))
    files.begin(folder, settings)
    files.clean(folder, range(n))
    for i in files.bar(files.missing(folder, parts, range(n)), "scenes"):
        scene = scenes.render(first_seed + i, size)
        files.write_png(folder / files.file_name("labels", i), scene.labels, files.mark(settings, i))
        files.write_png(folder / files.file_name("images", i), scene.image, files.mark(settings, i))
    prompts = [scenes.scene_prompt(files.read_png(folder / files.file_name("labels", i))) for i in range(n)]
    files.write_manifest(folder, settings, prompts)
    return load(folder)
