"""The diagrams of the notebooks, after the thesis' slides: boxes and arrows, measured in inches."""

from dataclasses import dataclass

from daamlib.extras import needs

with needs("notebooks"):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
    from matplotlib.path import Path

WIDTH = 9.0  # of every diagram, in inches
FONT = 10.0  # points
KINDS = {"text": "#bfdcf2", "image": "#fbdcae", "operation": "#e4e4e4", "map": "#b9e3d3"}  # pale Okabe-Ito colours


@dataclass(frozen=True)
class _Box:
    """A drawn box: its centre and size in inches."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> tuple[float, float]:
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y

    def top(self, shift: float = 0.0) -> tuple[float, float]:
        return self.x + shift, self.y + self.height / 2

    def bottom(self, shift: float = 0.0) -> tuple[float, float]:
        return self.x + shift, self.y - self.height / 2


def _sheet(height: float, title: str) -> tuple[Figure, Axes]:
    """An empty figure whose data coordinates are inches, with a title and the meaning of the colours."""
    figure = plt.figure(figsize=(WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    ax.text(WIDTH / 2, height - 0.22, title, ha="center", va="center", fontsize=FONT + 1.5)
    handles = [Patch(facecolor=colour, edgecolor="0.3", label=kind) for kind, colour in KINDS.items()]
    ax.legend(handles=handles, loc="lower center", ncols=len(KINDS), fontsize=FONT - 0.5, frameon=False)
    return figure, ax


def _box(ax: Axes, x: float, y: float, text: str, kind: str, width: float = 1.3, height: float = 0.62) -> _Box:
    style = "round,pad=0,rounding_size=0.08"
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=KINDS[kind], edgecolor="0.3"))
    ax.text(x, y, text, ha="center", va="center", fontsize=FONT, linespacing=1.25)
    return _Box(x, y, width, height)


def _arrow(ax: Axes, *points: tuple[float, float], dashed: bool = False) -> None:
    """An arrow along points."""
    line = "--" if dashed else "-"
    path = Path(list(points))
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=11, color="0.2", linestyle=line))


def _chain(ax: Axes, *boxes: _Box) -> None:
    """Arrows from each box to the next on its right."""
    for first, second in zip(boxes, boxes[1:], strict=False):
        _arrow(ax, first.right, second.left)


def _note(ax: Axes, x: float, y: float, text: str, **options) -> None:
    ax.text(x, y, text, fontsize=FONT - 0.5, color="0.15", **({"ha": "center", "va": "center"} | options))


def _frame(ax: Axes, left: float, bottom: float, right: float, top: float, title: str) -> None:
    """A dashed frame around boxes, its title at the upper left."""
    size = (right - left, top - bottom)
    ax.add_patch(Rectangle((left, bottom), *size, fill=False, edgecolor="0.45", linestyle=(0, (4, 3))))
    _note(ax, left + 0.1, top - 0.17, title, ha="left")


def latent_diffusion() -> Figure:
    """Draw a latent diffusion model: what generates an image, and how a real image is read.

    It follows the slide of Stable Diffusion's architecture (text encoder, U-Net, VAE); the lower row, which the slide
    does not have, is `daamlib.trace_image`.

    Returns:
        The figure.
    """
    figure, ax = _sheet(3.75, "Latent diffusion: noise becomes an image, guided by a text")
    top, middle, bottom = 2.95, 1.95, 0.75
    text = _box(ax, 0.8, top, "text $X$", "text")
    encoder = _box(ax, 2.45, top, "text encoder\n(CLIP)", "operation")
    embeddings = _box(ax, 4.15, top, "embeddings\n$(\\mathrm{tokens}, d_{text})$", "text", width=1.5)
    noise = _box(ax, 0.8, middle, "noise $z_T$\n$\\sim N(0, I)$", "image")
    unet = _box(ax, 4.15, middle, "U-Net\n$\\hat\\epsilon(z_t, t, X)$", "operation", width=1.5)
    scheduler = _box(ax, 6.0, middle, "scheduler\n$z_t \\to z_{t-1}$", "operation")
    decoder = _box(ax, 8.1, middle, "VAE decoder", "operation")
    image = _box(ax, 8.1, top, "image", "image")
    real = _box(ax, 0.8, bottom, "real image", "image")
    vae = _box(ax, 2.45, bottom, "VAE encoder\nand noise", "operation")
    _chain(ax, text, encoder, embeddings)
    _arrow(ax, embeddings.bottom(), unet.top())
    _note(ax, 4.28, 2.45, "keys and values of the cross-attention", ha="left")
    _chain(ax, noise, unet, scheduler, decoder)
    _note(ax, 7.05, middle + 0.15, "$z_0$")
    _arrow(ax, decoder.top(), image.bottom())
    _arrow(ax, scheduler.bottom(), (scheduler.x, 1.3), (unet.x + 0.3, 1.3), unet.bottom(0.3))
    _note(ax, 5.25, 1.14, "$T$ times: one denoising step each")
    _chain(ax, real, vae)
    _arrow(ax, vae.right, (unet.x - 0.3, bottom), unet.bottom(-0.3), dashed=True)
    _note(ax, 4.0, bottom, "a real image: one pass a noise level, no loop", ha="left")
    return figure


def cross_attention() -> Figure:
    """Draw one cross-attention layer with its two inputs, and the places where the heat maps are read.

    It follows the slide of the cross-attention: F = softmax((W_q h) (W_k X)^T / sqrt(d)), the output is F (W_v X).

    Returns:
        The figure.
    """
    figure, ax = _sheet(3.85, "One head of one cross-attention layer")
    top, middle, bottom = 2.75, 1.75, 0.8
    left, second, third, fourth, fifth, last = 0.82, 2.4, 3.97, 5.42, 6.75, 8.23
    features = _box(ax, left, top, "image features $h$\n$(hw, d_{model})$", "image", width=1.4)
    text = _box(ax, left, middle, "embeddings $X$\n$(\\mathrm{tokens}, d_{text})$", "text", width=1.4)
    queries = _box(ax, second, top, "queries $W_q h$\n$(hw, d)$", "image", width=1.2)
    keys = _box(ax, second, middle, "keys $W_k X$\n$(\\mathrm{tokens}, d)$", "text", width=1.2)
    values = _box(ax, second, bottom, "values $W_v X$\n$(\\mathrm{tokens}, d)$", "text", width=1.2)
    scores = _box(ax, third, top, "$Q K^T / \\sqrt{d}$\n$(hw, \\mathrm{tokens})$", "map")
    softmax = _box(ax, fourth, top, "softmax\nover tokens", "operation", width=1.05)
    shares = _box(ax, fifth, top, "shares $F$\n$(hw, \\mathrm{tokens})$", "map", width=1.1)
    output = _box(ax, last, top, "output $F\\,(W_v X)$\n$(hw, d)$", "image", width=1.35)
    _chain(ax, features, queries, scores, softmax, shares, output)
    _chain(ax, text, keys)
    fork = 1.65
    _arrow(ax, text.right, (fork, middle), (fork, bottom), values.left)
    _arrow(ax, keys.right, (third, middle), scores.bottom())
    _arrow(ax, values.right, (last, bottom), output.bottom())
    _note(ax, third, 3.28, "LDAAM reads here\n(linear in $X$)")
    _note(ax, fifth, 3.28, "DAAM reads here\n(a column is a token's map)")
    _note(ax, 5.9, 1.75, "$hw$: pixels of the layer's grid\n$d$: width of a head")
    return figure


def open_vocabulary_daam() -> Figure:
    """Draw the two steps of open-vocabulary DAAM: X generates, X' attributes.

    It follows the slide of open-vocabulary DAAM and its example.

    Returns:
        The figure.
    """
    figure, ax = _sheet(4.4, "Open-vocabulary DAAM: one text generates, any other attributes")
    first, second = 3.18, 1.12
    columns = 1.35, 3.65, 5.65, 7.85
    _frame(ax, 0.15, 2.52, 8.85, 3.9, "Step 1: generate from $X$, keep the queries")
    text = _box(ax, columns[0], first, "$X$: 'A car in an\nurban environment'", "text", width=2.0)
    encoder = _box(ax, columns[1], first, "text encoder", "operation")
    unet = _box(ax, columns[2], first, "U-Net\n$T$ steps", "operation")
    image = _box(ax, columns[3], first, "image", "image", width=1.5)
    _chain(ax, text, encoder, unet, image)
    _frame(ax, 0.15, 0.45, 8.85, 1.75, "Step 2: attribute with any $X'$")
    other = _box(ax, columns[0], second - 0.08, "$X'$: 'A car and a tree\nin an urban environment'", "text", width=2.0)
    keys = _box(ax, columns[1], second - 0.08, "text encoder,\nkeys $W_k X'$", "operation")
    daam = _box(ax, columns[2], second - 0.08, "softmax over $X'$,\nsum of $t$, $i$, $l$", "operation", width=1.5)
    maps = _box(ax, columns[3], second - 0.08, "a map of each word\nof $X'$: car, tree, ...", "map", width=1.7)
    _chain(ax, other, keys, daam, maps)
    queries = _box(ax, columns[2], 2.13, "queries of all $t$, $i$, $l$", "image", width=2.6, height=0.42)
    _arrow(ax, unet.bottom(), queries.top())
    _arrow(ax, queries.bottom(), daam.top())
    _note(ax, 4.2, queries.y, "$t$: steps, $i$: layers, $l$: heads", ha="right")
    return figure


def linear_collapse() -> Figure:
    """Draw the collapse of LDAAM: every sum is taken once, and a word is one product.

    It follows the slide of linear DAAM, LD(x) = sum over t, i, l of Up((W_q h) (W_k x)^T); the collapse to A x is ours.

    Returns:
        The figure.
    """
    figure, ax = _sheet(4.3, "The collapse of LDAAM: $LD(x) = A\\,x$")
    middle = 2.05
    _frame(ax, 0.12, 0.5, 3.38, 3.8, "while generating, in layer $i$")
    _frame(ax, 3.5, 0.5, 7.12, 3.8, "once an image")
    _frame(ax, 7.24, 0.5, 8.88, 3.8, "once a word")
    steps = [
        _box(ax, 0.9, middle + shift, f"$Q_{{{t},i}}$\n$(h_i w_i, d_i)$", "image", width=1.2)
        for t, shift in (("1", 0.95), ("2", 0.0), ("T", -0.95))
    ]
    total = _box(ax, 2.6, middle, "$\\Sigma_t\\,Q_{t,i}$\n$(h_i w_i, d_i)$", "image", width=1.2)
    for step in steps:
        _arrow(ax, step.right, total.left)
    _note(ax, 0.9, middle - 0.475, "$\\vdots$")
    _note(ax, 2.52, 0.85, "$d_i$: all heads\nside by side")
    weights = _box(ax, 4.3, middle, "times $s\\,W_k^{(i)}$\n$(h_i w_i, d_{text})$", "operation", width=1.35)
    up = _box(ax, 4.3, middle - 0.95, "Up to $(H, W)$", "operation", width=1.35)
    a = _box(ax, 6.22, middle, "$A$: sum over $i$\n$(H, W, d_{text})$", "map", width=1.4)
    others = _box(ax, 6.22, middle + 0.95, "the other layers,\ndone likewise", "operation", width=1.4)
    _chain(ax, total, weights)
    _arrow(ax, weights.bottom(), up.top())
    _arrow(ax, up.right, (a.x, up.y), a.bottom())
    _arrow(ax, others.bottom(), a.top())
    _note(ax, 4.3, middle + 0.85, "the product sums\nover the heads")
    word = _box(ax, 8.06, middle + 0.95, "embedding $x$\n$(d_{text})$", "text", width=1.25)
    heat = _box(ax, 8.06, middle, "$LD(x) = A\\,x$\n$(H, W)$", "map", width=1.25)
    _chain(ax, a, heat)
    _arrow(ax, word.bottom(), heat.top())
    return figure


def token_optimisation() -> Figure:
    """Draw the loop of token optimisation, with the letters A to I of the thesis' slide.

    Returns:
        The figure.
    """
    figure, ax = _sheet(4.5, "Token optimisation: only the key text changes in the loop")
    columns, rows = (1.45, 4.5, 7.55), (3.6, 2.35, 1.1)
    size = {"width": 2.1, "height": 0.7}
    text = _box(ax, columns[0], rows[0], "A  text $X$\nthat generates", "text", **size)
    images = _box(ax, columns[1], rows[0], "B  images\n$j = 1 \\ldots n$", "image", **size)
    truth = _box(ax, columns[2], rows[0], "E  ground truth $G_{j,k}$\nof each token $k$", "map", **size)
    queries = _box(ax, columns[0], rows[1], "C  queries $Q_{t,i}$ of every\nstep, collected once", "image", **size)
    maps = _box(ax, columns[1], rows[1], "D  heat maps\n$D_{j,k}(X')$", "map", **size)
    loss = _box(ax, columns[2], rows[1], "F  loss\n$\\Sigma\\,C(D_{j,k}, G_{j,k})$", "operation", **size)
    start = _box(ax, columns[0], rows[2], "start: the embeddings\nof words", "text", **size)
    key = _box(ax, columns[1], rows[2], "H  key text $X'$:\nits embeddings change", "text", **size)
    gradient = _box(ax, columns[2], rows[2], "G  gradient\n$\\partial\\,loss\\,/\\,\\partial X'$", "operation", **size)
    _chain(ax, text, images, truth)
    _note(ax, 6.03, rows[0] + 0.33, "annotate")
    _note(ax, 2.98, rows[0] + 0.33, "U-Net")
    between, turn = (columns[0] + columns[1]) / 2, (rows[0] + rows[1]) / 2  # the queries come out while B is generated
    _arrow(ax, text.right, (between, rows[0]), (between, turn), (columns[0], turn), queries.top())
    _chain(ax, queries, maps, loss)
    _arrow(ax, truth.bottom(), loss.top())
    _arrow(ax, loss.bottom(), gradient.top())
    _arrow(ax, gradient.left, key.right)
    _arrow(ax, start.right, key.left)
    _arrow(ax, key.top(), maps.bottom())
    _note(ax, 4.62, (rows[1] + rows[2]) / 2, "I  repeat", ha="left")
    return figure


def synthetic_segmentation() -> Figure:
    """Draw how a few annotated images become a labelled data set, and how the data set is judged.

    It is the thesis' motivation, synthetic data for segmentation, as notebook 07 tries it; no slide shows it.

    Returns:
        The figure.
    """
    figure, ax = _sheet(4.4, "From a few drawn masks to a labelled data set")
    columns, rows = (0.95, 2.75, 4.55, 6.35, 8.1), (3.5, 2.3, 1.1)
    size = {"width": 1.4, "height": 0.7}
    prompts = _box(ax, columns[0], rows[0], "prompts", "text", **size)
    model = _box(ax, columns[1], rows[0], "diffusion\nmodel", "operation", **size)
    some = _box(ax, columns[2], rows[0], "a few images", "image", **size)
    masks = _box(ax, columns[3], rows[0], "masks drawn\nby a person", "map", **size)
    tokens = _box(ax, columns[4], rows[0], "optimised\ntokens", "text", **size)
    new = _box(ax, columns[0], rows[1], "new prompts", "text", **size)
    again = _box(ax, columns[1], rows[1], "the same\nmodel", "operation", **size)
    queries = _box(ax, columns[2], rows[1], "new images,\ntheir queries", "image", **size)
    labelled = _box(ax, columns[3], rows[1], "images with\nlabel maps", "map", **size)
    exact = _box(ax, columns[2], rows[2], "a few exactly\nlabelled scenes", "image", **size)
    network = _box(ax, columns[3], rows[2], "segmentation\nnetwork", "operation", **size)
    score = _box(ax, columns[4], rows[2], "mIoU on\ntest scenes", "map", **size)
    _chain(ax, prompts, model, some, masks, tokens)
    _chain(ax, new, again, queries, labelled)
    _arrow(ax, tokens.bottom(), (tokens.x, rows[1]), labelled.right)
    _note(ax, tokens.x, rows[1] - 0.17, "read the queries")
    _arrow(ax, labelled.bottom(), network.top())
    _arrow(ax, exact.right, network.left, dashed=True)
    _arrow(ax, network.right, score.left)
    _note(ax, 2.6, rows[2], "in their place, or added:")
    return figure
