"""Time what users wait for at Stable Diffusion 1.5's shape, with random queries and keys: no model is made.

    OMP_NUM_THREADS=1 python tests/benchmarks/sizes.py                  # all rows
    OMP_NUM_THREADS=1 python tests/benchmarks/sizes.py token classes

Seconds of processor time on one thread, which hold on a machine that is shared, and the peak memory of the process.
"""

import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from record_sizes import built, sites
from shapes import SD15

import daamlib
from daamlib.attention.layers import KeyProjection, Layer
from daamlib.attention.record import AttentionRecord
from daamlib.attention.self_attention import SelfAttention
from daamlib.attention.text import TokenEmbeddings
from daamlib.cityscapes import label_id

NINE = ("road", "sidewalk", "building", "traffic light", "vegetation", "sky", "person", "rider", "car")
GRID, WIDTH = (64, 64), 768


def made(count, steps, *, store="queries", self_attention=False):
    """Records of 512 px."""
    unet = built(UNet2DConditionModel, SD15)
    modules = [
        (name, module)
        for name, module in unet.named_modules()
        if name.endswith("attn2") and not name.startswith("mid_block")
    ]
    torch.manual_seed(99)
    keys = [KeyProjection(torch.randn(module.to_k.weight.shape) * WIDTH**-0.5) for _, module in modules]
    parts, records = list(zip(modules, sites(unet, GRID), keys, strict=True)), []
    for seed in range(count):
        torch.manual_seed(seed)
        layers = []
        for (name, module), (grid, channels), to_k in parts:
            queries = torch.empty(steps, grid[0] * grid[1], channels).normal_(std=3)
            stored = {"queries": queries} if store == "queries" else {"query_sum": queries.sum(dim=0)}
            layers.append(Layer(name, grid, module.heads, module.scale, to_k, **stored))
        attention = None
        if self_attention:  # of five layers, eight passes
            q, k = torch.randn(2, 40, 1024, 640)
            attention = SelfAttention((32, 32), 8, 80**-0.5, queries=q, keys=k)
        text = TokenEmbeddings.unnamed(torch.randn(77, WIDTH))
        timesteps = list(range(999, 999 - 10 * steps, -10))
        records.append(AttentionRecord("a car", text, timesteps, layers=tuple(layers), self_attention=attention))
    return records


def timed(what, function, repeats=1):
    """The last result of the function, whose median time is printed."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = function()
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    print(f"{what:52} {np.median(seconds):8.2f} s   peak {peak:.1f} GiB", flush=True)
    return result


def token():
    """One LDAAM token of five images of 30 steps."""
    records = made(5, 30)
    text = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    heats = [replace(record).ldaam_from(text).values[1] for record in records]
    masks = [heat + heat.std() * torch.randn(GRID) > heat.quantile(0.85) for heat in heats]
    timed("LDAAM token, 5 images of 30 steps", lambda: daamlib.optimize_token(map(replace, records), masks))
    timed("of it: the linear maps", lambda: [replace(record).linear_map() for record in records])


def classes():
    """All nine classes at once from 20 images."""
    records, ids = made(20, 1, store="linear"), np.array([label_id(name) for name in NINE])
    reader = torch.randn(320, len(NINE))
    labels = [ids[(record.layers[-1].query_sum @ reader).argmax(dim=1).view(GRID).numpy()] for record in records]
    timed("nine classes at once, 20 images", lambda: daamlib.fit_classes(records, labels))


def labels():
    """The label map of an image of 512 px, refined by queries and keys or by their mean, along its edges."""
    (record,), ids = made(1, 4, self_attention=True), np.array([label_id(name) for name in NINE])
    tokens = daamlib.fit_classes([record], [ids[np.indices(GRID).sum(axis=0) // 4 % len(NINE)]])
    image = np.random.default_rng(0).integers(256, size=(512, 512, 3), dtype=np.uint8)
    mean = replace(record.self_attention, queries=None, keys=None, mean=torch.rand(1024, 1024).softmax(dim=1))
    for how, attention in (("queries and keys", record.self_attention), ("their mean", mean)):
        read = replace(record, self_attention=attention)
        timed(f"label map, refined by {how}", lambda of=read: daamlib.label_map(of, tokens, image=image), 3)


def words():
    """The first linear map of an image, and OV-DAAM of 77 tokens."""
    (record,), one = made(1, 30), torch.randn(1, WIDTH)
    timed("first LDAAM word of an image of 30 steps", lambda: replace(record).ldaam_from(one), 3)
    few, text = record.select(steps=range(4)), torch.randn(77, WIDTH)
    timed("OV-DAAM of 77 tokens, 4 steps", lambda: few.daam_from(text), 3)


def imports():
    """The time of `import daamlib` after `import torch`."""
    code = "import time, torch; t = time.process_time(); import daamlib; print(time.process_time() - t)"
    found = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    print(f"{'import daamlib, after torch':52} {np.median(found):8.2f} s", flush=True)


def machine():
    """What one thread reaches: products of float32 and float64, and reading memory."""
    for kind in (torch.float32, torch.float64):
        a = torch.randn(769, 20480, dtype=kind)
        seconds = []
        for _ in range(3):
            started = time.process_time()
            a @ a.T
            seconds.append(time.process_time() - started)
        print(f"{kind}: {2 * a.numel() * len(a) / np.median(seconds) / 1e9:.0f} GFLOPS")


ROWS = {row.__name__: row for row in (machine, imports, words, labels, token, classes)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ROWS:
        ROWS[name]()
