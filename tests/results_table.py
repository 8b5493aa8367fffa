"""Write the stored run into README.md and docs/results.md, and draw docs/tables.png: `python tests/results_table.py`.

All sentences with figures come from the files of `data/tables-200`, so that a new run changes the pages by one command.
"""

from pathlib import Path

import numpy as np
from pages import between

from daamlib.plots import METHOD_COLOURS
from daamlib_lab.experiments import stored_results, stored_table
from daamlib_lab.experiments.tables import STORED_RUN
from daamlib_lab.runs import read_metrics

ROOT = Path(__file__).resolve().parents[1]
METHODS = {("DAAM", 0): "DAAM", ("LDAAM", 0): "LDAAM", ("DAAM", 5): "DAAM optimised", ("LDAAM", 5): "LDAAM optimised"}
TRUTHS = ("generated", "rendered")
START, END = "<!-- of the stored run: python tests/results_table.py -->", "<!-- end of the stored run -->"


def table(metric):
    """The rows of the four methods, thesis and both sets, all classes together, with intervals."""
    stored = stored_results()
    stored = stored[(stored.metric == metric) & (stored["class"] == "all")]
    stored = stored.set_index(["ground_truth", "refined", "method", "train_images"]).sort_index()
    head = {"max_miou": "maximum mIoU, %", "auc": "area under the curve, %"}[metric]
    rows = [[head, *METHODS.values()], ["---"] * 5]
    rows.append(["thesis, Stable Diffusion", *(f"{stored.thesis['generated', False, *key]:.1f}" for key in METHODS)])
    titles = {"generated": "here, 200 generated images", "rendered": "here, 200 rendered scenes, exact masks"}
    for truth in TRUTHS:
        for refined in (False, True):
            found = [stored.loc[(truth, refined, *key)] for key in METHODS]
            cells = [f"{of.value:.1f} [{of.low:.1f}, {of.high:.1f}]" for of in found]
            rows.append(["the same, refined" if refined else titles[truth], *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- |", "|---|").replace(" --- |", "---|")


def gap(what, truth, metric="max_miou"):
    """A difference in points and its interval."""
    of = stored_table("differences")
    row = of[(of.what == what) & (of.ground_truth == truth) & (of.metric == metric)].iloc[0]
    return f"{row.value:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"


def both(what, metric="max_miou"):
    """A difference on generated images and on rendered scenes."""
    return " and ".join(gap(what, truth, metric) for truth in TRUTHS)


def facts():
    """How many draws each set has."""
    return read_metrics(STORED_RUN)[0]


def hardest(truth):
    """The class with the lowest maximum mIoU of LDAAM's tokens of five images."""
    of = stored_results()
    of = of[(of.metric == "max_miou") & (of.ground_truth == truth) & (of.method == "LDAAM") & (of.train_images == 5)]
    of = of[~of.refined & (of["class"] != "all")].set_index("class").value
    return f"the {of.idxmin()} ({of.min():.1f})"


def results():
    """The part of docs/results.md on the thesis' tables."""
    draws = facts()["draws"]
    return f"""Training images were drawn {draws["generated"]} times (generated images) and {draws["rendered"]} times
(rendered scenes). A value is the mean over these draws; the brackets are 95 % intervals of a two-way bootstrap,
which draws the test images and the draws of training images again. Of m draws a bootstrap shows (m - 1) / m of
the variance between draws, so with few draws the intervals are somewhat too narrow.

{table("max_miou")}

![mIoU by threshold](tables.png)

## What agrees with the thesis, and what does not

The bundled model is small and its world is drawn, so levels do not compare with those of Stable Diffusion on
photographs. Its recipe was also *chosen* by the scores of its words: trained in the ordinary way, DAAM reached 16.0 and
LDAAM 7.5 % ([model card](../data/urban-tiny/README.md)). Read the columns as what the methods do on a model whose
words point.

Differences in points of maximum mIoU, first on generated images, then on rendered scenes:

- **Plain LDAAM - plain DAAM**: {both("LDAAM - DAAM, words")} (thesis: -14.9).
- **Optimised - plain**: DAAM {both("DAAM optimised - words")} (thesis: +14.1), LDAAM
  {both("LDAAM optimised - word")} (+28.3).
- **Optimised LDAAM - optimised DAAM**: {both("LDAAM - DAAM, optimised")} (thesis: -0.7).
- **A token of one image - the plain word** (LDAAM): {both("LDAAM optimised on 1 - word")}; with layers, steps and
  weight decay chosen on that image {both("LDAAM optimised on 1, chosen settings - word")}.
- **A token of one image - of five** (LDAAM): {both("LDAAM optimised on 1 - on 5")}; with chosen settings
  {both("LDAAM optimised on 1 - on 5, chosen settings")} (thesis: -2.3).
- **Refined - not refined**: words (DAAM) {both("words refined - words, DAAM")}, tokens (LDAAM, chosen settings)
  {both("tokens refined - tokens, LDAAM")}.
- **Tokens of five images - words without any mask**, both refined: LDAAM with chosen settings
  {both("LDAAM optimised, refined - words refined")}, DAAM {both("DAAM optimised, refined - words refined")}. On
  generated images the annotator network's masks, to which the tokens were fitted, also judge them.
- **The hardest class** of LDAAM's tokens of five images is {hardest("generated")} of the generated images and
  {hardest("rendered")} of the rendered ones (thesis: the rider, 38.7).

The area under the curve (the thesis' Table 4.3) of optimised LDAAM is +0.9 above that of optimised DAAM in the thesis;
here it differs by {both("LDAAM - DAAM, optimised", "auc")}. With our reading of the thesis' own loss, which takes
the map scaled to [0, 1] for the probability, it differs by {both("LDAAM - DAAM, optimised by the thesis' loss", "auc")}
({thesis_draws()} draws), {order()}: that loss changes the area by {both("thesis' loss - ours, LDAAM", "auc")} (LDAAM)
and {both("thesis' loss - ours, DAAM", "auc")} (DAAM).

{table("auc")}"""


def thesis_draws():
    """How many draws of each set were fitted with the thesis' loss."""
    of = stored_table("differences")
    of = of[of.what == "thesis' loss - ours, LDAAM"].groupby("ground_truth").draws.first()
    return " and ".join(str(of[truth]) for truth in TRUTHS)


def order():
    """Whether the thesis' loss brings back the thesis' order of the two areas."""
    of = stored_table("differences")
    of = of[(of.what == "LDAAM - DAAM, optimised by the thesis' loss") & (of.metric == "auc")].value
    return "in the thesis' order" if (of > 0).all() else "so the loss alone does not explain the thesis' order"


def draw(path):
    """Draw mIoU by threshold of the four methods on both sets."""
    import matplotlib.pyplot as plt

    of = stored_table("curves").set_index(["ground_truth", "method", "train_images"]).sort_index()
    floors = facts()["floor"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, truth in zip(axes, TRUTHS, strict=True):
        for key, name in METHODS.items():
            curve = of.loc[(truth, *key)]
            ax.plot(curve.threshold, curve.miou, color=METHOD_COLOURS[key[0]], ls="-" if key[1] else "--", label=name)
        ax.axhline(np.mean(list(floors[truth].values())), color="black", linewidth=0.8, label="floor: the whole image")
        ax.set(xlabel="threshold", title=f"200 {truth} images", xlim=(0, 1), ylim=(0, 80))
        ax.grid(color="0.9")
    axes[0].set_ylabel("mIoU (%), mean of four classes")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def rewritten(text, new):
    """The page with what stands between the two marks replaced."""
    return between(text, START, END, f"\n\n{new}\n\n")


PAGES = {"README.md": lambda: table("max_miou"), "docs/results.md": results}

if __name__ == "__main__":
    for page, make in PAGES.items():
        path = ROOT / page
        path.write_text(rewritten(path.read_text(), make()))
    draw(ROOT / "docs" / "tables.png")
