"""The explorer: any word's heat map of one image, its mask and IoU, with knobs for all that makes them."""

import html
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ipywidgets as widgets
import numpy as np
from PIL import Image

from ..attention.pictures import COLOUR_MAPS, overlay
from ..attention.record import AttentionRecord
from . import pictures
from .explorer_model import METHODS, ExplorerModel, ExplorerResult

LABEL_WIDTH = "84px"
LOOK = {"style": {"description_width": LABEL_WIDTH}, "layout": {"width": "380px"}}
FRACTION = {"min": 0, "max": 1, "step": 0.01, **LOOK}


class Explorer(widgets.VBox):
    """View of an `ExplorerModel`, which knows all that is shown; `explore` makes one."""

    def __init__(self, model: ExplorerModel) -> None:
        self.model = model
        self._controls = _controls(model)
        look = {"indent": False, "layout": {"width": "auto", "margin": "0 12px 0 0"}}
        tip = "the cross-attention layers of {} x {} positions"
        self._grids = {
            grid: widgets.Checkbox(description="{} × {}".format(*grid), tooltip=tip.format(*grid), **look)
            for grid in model.grids
        }
        # one for all that a state shows, so that no picture is ever of another word than its neighbour
        self._pictures, self._message = widgets.HTML(), widgets.HTML()
        super().__init__(self._arranged())
        self._following = False
        for name, control in self._controls.items():
            control.observe(lambda change, name=name: self._turned(name, change.new), "value")
        for box in self._grids.values():
            box.observe(lambda _: self._turned("grids", [g for g, b in self._grids.items() if b.value]), "value")
        model.observe(self._follow, "state")
        model.observe(self._show, "result")
        self._follow()
        self._show()

    @property
    def state(self) -> dict[str, Any]:
        """Fields of `ExplorerState`, all that is chosen, in plain values."""
        return asdict(self.model.state)

    @property
    def result(self) -> ExplorerResult:
        """Arrays of what is shown, or a message."""
        return self.model.result

    @property
    def record(self) -> AttentionRecord:
        """Record of the chosen layers and steps alone. Raises ValueError if none is chosen."""
        return self.model.select(self.model.state)

    def change(self, **values: Any) -> None:
        """Set parts of the state from code; see `ExplorerModel.change`.

            explore(record, image).change(word="tree", threshold=0.4)

        Where it raises, nothing changes.
        """
        self.model.change(**values)

    def _arranged(self) -> list[widgets.Widget]:
        word, method, text, path, refined, steps, threshold, opacity, colour_map = self._controls.values()
        title = {"display": "flex", "justify_content": "flex-end", "width": LABEL_WIDTH, "margin": "0 8px 0 2px"}
        layers = widgets.HBox([widgets.Label("Layers", layout=title), *self._grids.values()])
        left = widgets.VBox([word, method, text, path, layers, refined])
        right = widgets.VBox([threshold, steps, opacity, colour_map])
        prompt = self.model.record.prompt
        image = widgets.HTML(pictures.figure(self.model.image, "the image", f"“{prompt}”" if prompt else "image"))
        row = {"flex_flow": "row wrap"}
        return [
            widgets.HBox([left, right], layout=row),
            self._message,
            widgets.HBox([image, self._pictures], layout={**row, "grid_gap": "0 6px"}),
        ]

    def _turned(self, name: str, value: Any) -> None:
        """Change the state by a control that a hand moved; `_follow` moves them through states nobody chose."""
        if not self._following:
            self.model.change(**{name: value})

    def _follow(self, _change=None) -> None:
        """Bring the controls to the state, wherever it was changed."""
        state, controls = self.model.state, self._controls
        self._following = True
        try:
            for name, control in controls.items():
                control.value = getattr(state, name)
            for grid, box in self._grids.items():
                box.value = grid in state.grids
        finally:
            self._following = False
        # the field that the method does not read would only puzzle
        controls["token_path"].layout.display = "flex" if state.method == "token" else "none"
        controls["text"].layout.display = "none" if state.method == "token" else "flex"
        controls["text"].disabled = daam = state.method == "daam"
        controls["text"].placeholder = self.model.record.prompt or "the prompt" if daam else "the word alone"

    def _show(self, _change=None) -> None:
        state, result, image = self.model.state, self.model.result, self.model.image
        figures = []  # none with a message, so that the picture of another word is not mistaken for the result
        if result.heat is not None and result.mask is not None:
            name = f"{METHODS[state.method]} of “{state.word or 'the token'}”"
            blended = overlay(image, result.heat, opacity=state.opacity, colour_map=state.colour_map)
            figures.append(pictures.figure(blended, f"heat map over the image, {name}", name))
            share = f"{result.mask.mean():.1%} of the image" if result.iou is None else f"IoU {result.iou:.3f}"
            caption = f"map > {state.threshold:.2f}: {share}{'; outline: the mask' * (result.iou is not None)}"
            cut = pictures.cut_out(image, result.mask, self.model.true_mask)
            figures.append(pictures.figure(cut, f"thresholded mask, {caption}", caption))
        if result.iou is not None and result.thresholds is not None and result.curve is not None:
            figures.append(pictures.curve_figure(result.thresholds, result.curve, state.threshold, result.iou))
        # as high without pictures, so that the cells below stay where they are
        row = f"display:flex;flex-wrap:wrap;gap:0 10px;min-height:{pictures.WIDTH + 40}px"
        self._pictures.value = f'<div style="{row}">{"".join(figures)}</div>'
        # read aloud by screen readers when it changes
        style = "color:var(--jp-error-color1, #b00020);min-height:1.4em;line-height:1.4"
        self._message.value = f'<div role="status" style="{style}">{html.escape(result.message)}</div>'


def explore(
    record: AttentionRecord,
    image: Image.Image | np.ndarray,
    mask: Any = None,
    *,
    state: Mapping[str, Any] | None = None,
) -> Explorer:
    """Look for a word's map by hand: the last line of a notebook's cell.

        explorer = explore(record, image, mask, state={"word": "car"})
        explorer.result.mask, explorer.result.iou

    The widget says why a word cannot be read. Records made with `store="linear"` have no steps to choose and no DAAM.
    `image` is a PIL image or an (H, W, 3) uint8 array; `mask` the true one, an (H, W) bool array or tensor, for the
    IoU; `state` to begin with, such as another explorer's `.state`. Of the widget `.state` is a dict of plain values,
    `.result` has the arrays, `.record` the chosen layers and steps. Raises TypeError or ValueError for bad arguments.
    """
    model = ExplorerModel(record, image, mask)
    model.change(**(state or {}))
    return Explorer(model)


def _controls(model: ExplorerModel) -> dict[str, widgets.Widget]:
    """Return the controls by the part of the state they set, without grids; `Explorer` gives them their values."""
    methods = [(name, key) for key, name in METHODS.items()]
    tip = "the record holds only their sum" if model.summed else "the denoising steps that are summed"
    fixed = model.summed or model.last_step == 0
    return {
        "word": widgets.Text(description="Word", placeholder="any word, such as traffic light", **LOOK),
        "method": widgets.Dropdown(description="Method", options=methods, **LOOK),
        "text": widgets.Text(description="In the text", **LOOK),
        "token_path": widgets.Text(description="Token file", placeholder="car-token.safetensors", **LOOK),
        "refined": widgets.Checkbox(
            description="refined",
            disabled=model.record.self_attention is None,
            tooltip="propagate the map along the self-attention, of a trace with self_attention=True",
            **LOOK,
        ),
        "steps": widgets.IntRangeSlider(
            description="Steps", min=0, max=model.last_step, disabled=fixed, tooltip=tip, **LOOK
        ),
        "threshold": widgets.FloatSlider(
            description="Threshold", tooltip="of the map scaled to its minimum and maximum", **FRACTION
        ),
        "opacity": widgets.FloatSlider(description="Opacity", tooltip="of the heat map over the image", **FRACTION),
        "colour_map": widgets.Dropdown(description="Colours", options=list(COLOUR_MAPS), **LOOK),
    }
