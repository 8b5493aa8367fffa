"""Prompts that vary a template's words, such as those of urban scenes in data/prompts/urban.json."""

import itertools
import json

import numpy as np

from ..resources import bundled
from . import folder as files

PROMPTS = bundled("prompts/urban.json")


def urban_prompts(n: int, *, seed: int = 0) -> list[str]:
    """Return `n` prompts from the templates of data/prompts/urban.json in turn.

        urban_prompts(4)

    Car, person, traffic light and rider are in half of them each. A template's variations come in an order drawn from
    `seed`, each once before any comes again; fewer prompts are the first of more. Raises ValueError for n < 1,
    FileNotFoundError without the file.
    """
    n = files.whole_number("the number of prompts, n,", n, 1, files.MOST_IMAGES)
    seed = files.whole_number("seed", seed, 0)
    if not PROMPTS.is_file():
        raise FileNotFoundError(f"the prompts are not at {PROMPTS}: install daamlib anew")
    lists = json.loads(PROMPTS.read_text(encoding="utf-8"))
    variations = []
    for number, template in enumerate(lists["templates"]):
        slots = [name for name in lists["slots"] if f"{{{name}}}" in template]
        fillings = itertools.product(*(lists["slots"][name] for name in slots))
        texts = [template.format(**dict(zip(slots, filling, strict=True))) for filling in fillings]
        order = np.random.default_rng([seed, number]).permutation(len(texts))
        variations.append([texts[i] for i in order])
    rounds = [divmod(i, len(variations)) for i in range(n)]
    return [variations[which][turn % len(variations[which])] for turn, which in rounds]
