"""The explorer: any word's heat map of one image, its mask and IoU, with knobs for all that makes them."""

import html
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import ipywidgets as widgets
import traitlets

from ..attention.record import AttentionRecord
from . import pictures
from .reading import METHODS, Reader, Reading, State

NARROW, WIDE = {"description_width": "84px"}, {"width": "380px"}


class ExplorerModel(traitlets.HasTraits):
    """The explorer without its view: `change` makes a new `state`, and with it a new `result`."""

    state = traitlets.Instance(State)
    result = traitlets.Instance(Reading)

    def __init__(self, reader: Reader, state: State) -> None:
        super().__init__(state=state, result=reader.read(state))
        self.reader = reader

    def change(self, **values: Any) -> None:
        """Change some of the state. Raises TypeError or ValueError, and changes nothing, for what cannot be."""
        known = [field.name for field in fields(State)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise TypeError(f"the explorer has no {', '.join(unknown)}: expected {', '.join(known)}")
        state = replace(self.state, **values)
        if state != self.state:
            self.state = state  # observers of the result see the state it is of
            self.result = self.reader.read(state)


class Explorer(widgets.VBox):
    """What `explore` returns: shows itself in a notebook, and knows what it shows."""

    def __init__(self, model: ExplorerModel) -> None:
        self.model = model
        reader = model.reader
        self._controls = _controls(reader, model.state)
        self._grids = {
            grid: widgets.Checkbox(
                value=grid in model.state.grids,
                description=f"{grid[0]} × {grid[1]}",
                indent=False,
                layout={"width": "auto", "margin": "0 12px 0 0"},
                tooltip=f"the cross-attention layers of {grid[0]} x {grid[1]} positions",
            )
            for grid in reader.grids
        }
        # one for all that a state shows, so that no picture is ever of another word than its neighbour
        self._image, self._pictures, self._message = widgets.HTML(), widgets.HTML(), widgets.HTML()
        super().__init__(self._arranged())
        self._image.value = pictures.figure(reader.image, "the image", self._caption())
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
        """All that is chosen, in plain values: word, text, method, steps, grids, threshold and so on, see `State`."""
        return asdict(self.model.state)

    @property
    def result(self) -> Reading:
        """The arrays of what is shown: heat, mask, iou, thresholds, curve; or a message."""
        return self.model.result

    @property
    def record(self) -> AttentionRecord:
        """The record of the chosen layers and steps alone. Raises ValueError if none is chosen."""
        return self.model.reader.select(self.model.state)

    def change(self, **values: Any) -> None:
        """Turn knobs from code: `explorer.change(word="tree", threshold=0.4)`.

        Raises TypeError or ValueError, and changes nothing, for a name or a value that cannot be.
        """
        self.model.change(**values)

    def _arranged(self) -> list[widgets.Widget]:
        word, method, text, path, steps, threshold, opacity, colour_map = self._controls.values()
        title = widgets.Label(
            "Layers",
            layout={"display": "flex", "justify_content": "flex-end", "width": "84px", "margin": "0 8px 0 2px"},
        )
        layers = widgets.HBox([title, *self._grids.values()])
        row = {"flex_flow": "row wrap"}
        return [
            widgets.HBox(
                [
                    widgets.VBox([word, method, text, path, layers]),
                    widgets.VBox([threshold, steps, opacity, colour_map]),
                ],
                layout=row,
            ),
            self._message,
            widgets.HBox([self._image, self._pictures], layout={**row, "grid_gap": "0 14px"}),
        ]

    def _caption(self) -> str:
        prompt = self.model.reader.record.prompt
        return f"“{prompt}”" if prompt else "image"

    def _turned(self, name: str, value: Any) -> None:
        """A hand turned a control; not `_follow`, which moves them one by one through states nobody chose."""
        if not self._following:
            self.model.change(**{name: value})

    def _follow(self, _change=None) -> None:
        """Bring the controls to the state, wherever it was changed."""
        state, reader = self.model.state, self.model.reader
        self._following = True
        try:
            for name, control in self._controls.items():
                control.value = getattr(state, name)
            for grid, box in self._grids.items():
                box.value = grid in state.grids
        finally:
            self._following = False
        # the field that the method does not read would only puzzle
        self._controls["token_path"].layout.display = "flex" if state.method == "token" else "none"
        self._controls["text"].layout.display = "none" if state.method == "token" else "flex"
        self._controls["text"].disabled = state.method == "daam"
        self._controls["text"].placeholder = (
            reader.record.prompt or "the prompt" if state.method == "daam" else "the word alone"
        )

    def _show(self, _change=None) -> None:
        state, result, reader = self.model.state, self.model.result, self.model.reader
        figures = []  # none with a message: the picture of another word under this one's name would be a lie
        if not result.message:
            blended = pictures.overlay(reader.image, result.heat, state.opacity, state.colour_map)
            name = f"{METHODS[state.method]} of “{state.word or 'the token'}”"
            figures.append(pictures.figure(blended, f"heat map over the image, {name}", name))
            cut = pictures.cut_out(reader.image, result.mask, reader.truth)
            found = f"{result.mask.mean():.1%} of the image" if result.iou is None else f"IoU {result.iou:.3f}"
            caption = f"map > {state.threshold:.2f}: {found}"
            figures.append(pictures.figure(cut, f"thresholded mask, {caption}", caption))
        if result.iou is not None:
            figures.append(pictures.curve_figure(result.thresholds, result.curve, state.threshold, result.iou))
        self._pictures.value = f'<div style="display:flex;flex-wrap:wrap;gap:0 14px">{"".join(figures)}</div>'
        self._message.value = _status(result.message)


def explore(record: AttentionRecord, image, mask=None, *, state: Mapping[str, Any] | None = None) -> Explorer:
    """Look for a word's map by hand: the last line of a notebook's cell.

    image: the record's, PIL or (H, W, 3) uint8. mask: (H, W) bool, the truth, if the IoU is wanted. state: where to
    begin, such as another explorer's `.state`; what it leaves out is as in a new explorer.

    Returns an object whose `.state` is a dict of plain values, `.result` has the arrays and `.record` the chosen layers
    and steps. A word that cannot be read is said in the widget. Records made with `store="linear"` have no steps to
    choose and no DAAM. Raises TypeError or ValueError for an image, a mask or a state that cannot be.
    """
    reader = Reader(record, image, mask)
    model = ExplorerModel(reader, reader.first_state())
    model.change(**(state or {}))
    return Explorer(model)


def _controls(reader: Reader, state: State) -> dict[str, widgets.Widget]:
    """The controls by the part of the state they turn, grids apart."""
    first, last = reader.all_steps

    def slider(name: str, tooltip: str) -> widgets.FloatSlider:
        return widgets.FloatSlider(
            value=getattr(state, name.lower()),
            min=0,
            max=1,
            step=0.01,
            description=name,
            tooltip=tooltip,
            style=NARROW,
            layout=WIDE,
        )

    return {
        "word": widgets.Text(
            description="Word", placeholder="any word, such as traffic light", style=NARROW, layout=WIDE
        ),
        "method": widgets.Dropdown(
            options=[(name, key) for key, name in METHODS.items()], description="Method", style=NARROW, layout=WIDE
        ),
        "text": widgets.Text(description="In the text", style=NARROW, layout=WIDE),
        "token_path": widgets.Text(
            description="Token file", placeholder="car-token.safetensors", style=NARROW, layout=WIDE
        ),
        "steps": widgets.IntRangeSlider(
            value=state.steps,
            min=first,
            max=last,
            description="Steps",
            disabled=reader.linear or first == last,
            tooltip="the record holds only their sum" if reader.linear else "the denoising steps that are summed",
            style=NARROW,
            layout=WIDE,
        ),
        "threshold": slider("Threshold", "of the map scaled to its own 0 ... 1"),
        "opacity": slider("Opacity", "of the heat map over the image"),
        "colour_map": widgets.Dropdown(options=pictures.COLOUR_MAPS, description="Colours", style=NARROW, layout=WIDE),
    }


def _status(message: str) -> str:
    """The message, read aloud by screen readers when it changes."""
    colour = "var(--jp-error-color1, #b00020)"
    return f'<div role="status" style="color:{colour};min-height:1.4em;line-height:1.4">{html.escape(message)}</div>'
