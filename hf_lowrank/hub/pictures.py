"""The pictures of a card, as PNG bytes that are the same for the same data."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.metrics import CURVES
from hf_lowrank.runs.records import RunRecord, read_run


@dataclass(frozen=True)
class Picture:
    """How a card describes a picture.

    Attributes:
        title: its heading and alternative text.
        meaning: a sentence on how to read it.
        plot: the function of `hf_lowrank.report.plots` that draws it; "" for a picture drawn here.
        options: keywords of that function.
    """

    title: str
    meaning: str
    plot: str = ""
    options: dict[str, Any] = field(default_factory=dict)


PICTURES = {
    "losses": Picture("Loss during training", "Training batches in a pale colour, held-out sequences with marks."),
    "landscape": Picture(
        CURVES["random_curve"].title,
        "The mean over random directions and its 95 % interval; zero is this model.",
        "line_curves",
        {"rise": False},
    ),
    "pca_line": Picture(
        CURVES["pca1_curve"].title,
        "A move in the strongest singular direction of every matrix at once; zero is this model.",
        "line_curves",
        {"metric": "pca1_curve"},
    ),
    "plane": Picture("Loss on a plane", "Two random directions; the cross is this model.", "landscapes"),
    "step_path": Picture(
        CURVES["step_path"].title,
        "The straight line from the previous checkpoint's weights (0) to these (1), above the mean of both ends: a "
        "hill is a barrier.",
        "interpolation_paths",
        {"metric": "step_path"},
    ),
    "baseline_path": Picture(
        CURVES["method_path"].title,
        "The straight line from these weights (0) to the baseline's (1), above the mean of both ends: a hill means "
        "two basins.",
        "interpolation_paths",
    ),
    "spectra": Picture(
        "Spectra during training",
        "Means over the matrices at each checkpoint, each metric on its own axis.",
        "trends",
    ),
    "layers": Picture(
        "Effective rank of the weights by depth",
        "Each kind of matrix by block, at the last step.",
        "layer_profiles",
    ),
    "activations": Picture(
        "Similarity to the baseline's activations",
        "Linear CKA of each layer at each step: 1 means equal up to rotation and scale.",
        "layer_step_map",
    ),
}


def draw(run: Path) -> dict[str, bytes]:
    """The run's pictures by their name in PICTURES, those for which something was measured.

    Raises:
        UserError: a file of the run is damaged.
    """
    from hf_lowrank.report.plots import PLOTS

    record = read_run(run)
    pictures = {}
    losses = {title: record.logged(key) for title, key in (("training", "loss"), ("held out", "eval_loss"))}
    if any(losses.values()):
        pictures["losses"] = _loss_picture(losses, record.method)
    for name, picture in PICTURES.items():
        if picture.plot:
            compared = {"baseline": most_compared(record)} if name == "baseline_path" else {}
            try:
                pictures[name] = png(PLOTS[picture.plot]([run], **picture.options, **compared), dpi=100)
            except UserError:  # nothing of it was measured
                continue
    return pictures


def most_compared(record: RunRecord) -> str | None:
    """The run that most metrics were compared with; barriers may be to many others too."""
    compared = {(row.metric, row.baseline) for row in record.rows if row.baseline is not None}
    count = Counter(baseline for _, baseline in sorted(compared))
    return count.most_common(1)[0][0] if count else None


def _loss_picture(losses: Mapping[str, Sequence[tuple[int, float]]], method: str) -> bytes:
    from hf_lowrank.report.colours import looks

    figure, axes = _axes("optimizer steps", "loss, nats per token")
    colour = looks([method])[method].light
    for (title, points), alpha, marker in zip(losses.items(), (0.45, 1.0), ("", "o"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=title, alpha=alpha, marker=marker, ms=4)
    axes.legend(frameon=False)
    return png(figure)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    # The object interface: no global state and no window, whatever backend the caller uses.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    return figure, axes


def png(figure: Any, dpi: float | None = None) -> bytes:
    """The figure as a PNG with a palette: a third of the bytes, without a visible difference."""
    from matplotlib.text import Text
    from PIL import Image

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", **({"dpi": dpi} if dpi else {}))
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
