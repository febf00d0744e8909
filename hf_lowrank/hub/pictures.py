"""The pictures of a card, as PNG bytes that are the same for the same data."""

from __future__ import annotations

import io
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.hub.card_facts import last_checkpoint, log_history, read_yaml, section
from hf_lowrank.hub.privacy import one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """What a card says about a picture.

    Attributes:
        title: its heading, and what a screen reader says.
        meaning: a sentence on how to read it.
        plot: the function of `hf_lowrank.report.plots` that draws it; "" for those drawn here.
        options: keywords of that function.
    """

    title: str
    meaning: str
    plot: str = ""
    options: dict[str, Any] = field(default_factory=dict)


PICTURES = {
    "losses": Picture("Loss over the training", "Training batches pale, held-out sequences with marks."),
    "landscape": Picture(
        "Loss along random directions", "The mean over random directions and its 95 % interval; zero is this model."
    ),
    "pca_line": Picture(
        "Loss along the top PCA direction",
        "One step in the strongest singular direction of every matrix at once; zero is this model.",
        "line_curves",
        {"metric": "pca1_curve"},
    ),
    "plane": Picture("Loss on a plane", "Two random directions; the cross is this model.", "landscapes"),
    "step_path": Picture(
        "Path from the checkpoint before",
        "From the weights of the checkpoint before (0) straight to these (1), above the mean of both ends: a hill "
        "between them is a barrier.",
        "interpolation_paths",
        {"metric": "step_path"},
    ),
    "baseline_path": Picture(
        "Path to the baseline",
        "From these weights (0) straight to the baseline's (1), above the mean of both ends: a hill means two basins.",
        "interpolation_paths",
    ),
    "spectra": Picture(
        "Spectra over the training",
        "Means over the matrices at each checkpoint; the axes are the metrics' own.",
        "trends",
    ),
    "layers": Picture(
        "Effective rank of the weights by depth",
        "Each kind of matrix over the blocks, at the last step.",
        "layer_profiles",
    ),
    "activations": Picture(
        "Likeness to the baseline's activations",
        "Linear CKA of each layer at each step: 1 is the same up to rotation and scale.",
        "layer_step_map",
    ),
}


def draw(run: Path) -> dict[str, bytes]:
    """The run's pictures by their name in PICTURES, those for which something was measured."""
    pictures = {}
    method = str(section(read_yaml(run / "recipe.yaml"), "method").get("name") or "")
    losses = _losses(run)
    if any(losses.values()):
        pictures["losses"] = _loss_picture(losses, method)
    line = _random_line(run)
    if len(line) > 2:
        pictures["landscape"] = _line_picture(line, method)
    return {**pictures, **_report_pictures(run)}


def _report_pictures(run: Path) -> dict[str, bytes]:
    """The report's figures of this one run."""
    from hf_lowrank.report.plots import PLOTS
    from hf_lowrank.runs.records import load_run

    try:
        load_run(run)
    except UserError as error:
        logger.warning("no pictures of the measurements: %s", one_line(error))
        return {}
    pictures = {}
    for name, picture in PICTURES.items():
        if picture.plot:
            options = {**picture.options, "baseline": _baseline(run)} if name == "baseline_path" else picture.options
            try:
                pictures[name] = png(PLOTS[picture.plot]([run], **options), dpi=100)
            except UserError:  # nothing of it was measured
                continue
    return pictures


def _baseline(run: Path) -> str | None:
    """The run that most metrics were compared with; barriers may be to many others too."""
    from hf_lowrank.runs.measurements import FILE_NAME, read_measurements

    rows = read_measurements(run / FILE_NAME) if (run / FILE_NAME).is_file() else []
    compared = {(row.metric, row.baseline) for row in rows if row.baseline is not None}
    count = Counter(baseline for _, baseline in sorted(compared))
    return count.most_common(1)[0][0] if count else None


Points = list[tuple[float, float]]


def _losses(run: Path) -> dict[str, Points]:
    """(step, loss) of the training log up to the last checkpoint: on training batches, and held out."""
    checkpoint = last_checkpoint(run)
    history = log_history(checkpoint) if checkpoint is not None else []
    return {
        title: [(e["step"], e[key]) for e in history if "step" in e and _finite(e.get(key))]
        for title, key in (("training", "loss"), ("held out", "eval_loss"))
    }


def _random_line(run: Path) -> list[tuple[float, float, float, float]]:
    """(offset, mean loss, low, high) along random directions at the last step that has them."""
    from hf_lowrank.runs.measurements import FILE_NAME, read_measurements

    rows = read_measurements(run / FILE_NAME) if (run / FILE_NAME).is_file() else []
    rows = [r for r in rows if r.metric == "random_curve" and _finite(r.settings.get("t")) and math.isfinite(r.value)]
    last = max((row.step for row in rows), default=0)
    line = {float(row.settings["t"]): row for row in rows if row.step == last}
    return [
        (t, row.value, row.ci_low if math.isfinite(row.ci_low) else row.value,
         row.ci_high if math.isfinite(row.ci_high) else row.value)
        for t, row in sorted(line.items())
    ]  # fmt: skip


def _loss_picture(losses: dict[str, Points], method: str) -> bytes:
    figure, axes = _axes("optimizer steps", "loss, nats per token")
    colour = _colour(method)
    for (title, points), alpha, marker in zip(losses.items(), (0.45, 1.0), ("", "o"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=title, alpha=alpha, marker=marker, ms=4)
    axes.legend(frameon=False)
    return png(figure)


def _line_picture(line: list[tuple[float, float, float, float]], method: str) -> bytes:
    figure, axes = _axes("offset along a random direction", "loss, nats per token")
    offsets, means, low, high = zip(*line, strict=True)
    colour = _colour(method)
    axes.fill_between(offsets, low, high, color=colour, alpha=0.2, lw=0, label="95 % interval")
    axes.plot(offsets, means, color=colour, lw=1.6, label="mean")
    axes.legend(frameon=False)
    return png(figure)


def _colour(method: str) -> str:
    from hf_lowrank.report.colours import looks

    return looks([method])[method].light


def _axes(x: str, y: str) -> tuple[Any, Any]:
    # The object interface: no global state, no window, whatever backend the caller has.
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
    """The figure with a palette of its own: a third of the bytes, and no difference to see."""
    from matplotlib.text import Text
    from PIL import Image

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", **({"dpi": dpi} if dpi else {}))
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
