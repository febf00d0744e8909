"""The pictures of a card, as PNG bytes that are the same for the same data."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from hf_lowrank.hub.card_facts import log_history, read_yaml, section


def draw(run: Path) -> dict[str, bytes]:
    """Pictures by name: the losses over the training, the loss along random directions; none without data."""
    pictures = {}
    method = str(section(read_yaml(run / "recipe.yaml"), "method").get("name") or "")
    losses = _losses(run)
    if any(losses.values()):
        pictures["losses"] = _loss_picture(losses, method)
    line = _random_line(run)
    if len(line) > 2:
        pictures["landscape"] = _line_picture(line, method)
    return pictures


Points = list[tuple[float, float]]


def _losses(run: Path) -> dict[str, Points]:
    """(step, loss) of the training log up to the last checkpoint: on training batches, and held out."""
    from hf_lowrank.hub.cards import last_checkpoint

    checkpoint = last_checkpoint(run)
    history = log_history(checkpoint) if checkpoint is not None else []
    return {
        title: [(e["step"], e[key]) for e in history if "step" in e and _finite(e.get(key))]
        for title, key in (("training", "loss"), ("held out", "eval_loss"))
    }


def _random_line(run: Path) -> list[tuple[float, float, float, float]]:
    """(offset, mean loss, low, high) along random directions at the last step that has them."""
    from hf_lowrank.measuring.table import FILE_NAME, read_measurements

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
    return _png(figure)


def _line_picture(line: list[tuple[float, float, float, float]], method: str) -> bytes:
    figure, axes = _axes("offset along a random direction", "loss, nats per token")
    offsets, means, low, high = zip(*line, strict=True)
    colour = _colour(method)
    axes.fill_between(offsets, low, high, color=colour, alpha=0.2, lw=0, label="95 % interval")
    axes.plot(offsets, means, color=colour, lw=1.6, label="mean")
    axes.legend(frameon=False)
    return _png(figure)


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


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
