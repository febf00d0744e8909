"""The pictures of a card, as PNG bytes that are the same for the same data."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.metrics import CURVES
from hf_lowrank.runs.records import RunRecord, read_run
from hf_lowrank.storage.files import whole_file


@dataclass(frozen=True)
class Picture:
    """How a card describes a picture: its heading and a sentence on how to read it; and the function of
    `hf_lowrank.report.plots` that draws it, with options, or "" for a picture drawn here."""

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
        "The straight line from the previous checkpoint's weights (0) to these (1), above the chord: a hill is a "
        "barrier.",
        "interpolation_paths",
        {"metric": "step_path"},
    ),
    "baseline_path": Picture(
        CURVES["method_path"].title,
        "The straight line from these weights (0) to the baseline's (1), above the chord: a hill means two basins.",
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
    """The run's pictures by their name in PICTURES, those for which something was measured."""
    record = read_run(run)
    pictures = {}
    losses = {title: record.logged(key) for title, key in (("training", "loss"), ("held out", "eval_loss"))}
    if any(losses.values()):
        pictures["losses"] = _loss_picture(losses, record.method)
    to_baseline = replace(PICTURES["baseline_path"], options={"baseline": most_compared(record)})
    return pictures | draw_plots({**PICTURES, "baseline_path": to_baseline}, [run], dpi=100)


def draw_plots(pictures: Mapping[str, Picture], runs: Sequence[Path | RunRecord], dpi: float) -> dict[str, bytes]:
    """Those of `pictures` that plots of the report draw, if something of them was measured."""
    from hf_lowrank.report.plots import PLOTS

    drawn = {}
    for name, picture in pictures.items():
        if picture.plot:
            with suppress(UserError):  # nothing of it was measured
                drawn[name] = png(PLOTS[picture.plot](runs, **picture.options), dpi=dpi)
    return drawn


def write_pictures(folder: Path, pictures: Mapping[str, bytes], names: Iterable[str]) -> None:
    """Writes pictures into `folder`, which is created if needed, and removes those of `names` that are outdated."""
    folder.mkdir(parents=True, exist_ok=True)
    for outdated in set(names) - pictures.keys():
        (folder / f"{outdated}.png").unlink(missing_ok=True)
    for name, data in pictures.items():
        with whole_file(folder / f"{name}.png") as temporary:
            temporary.write_bytes(data)


def most_compared(record: RunRecord) -> str | None:
    """The run that most metrics were compared with; barriers may be to many others too."""
    compared = {(row.metric, row.baseline) for row in record.rows if row.baseline is not None}
    count = Counter(baseline for _, baseline in sorted(compared))
    return count.most_common(1)[0][0] if count else None


def _loss_picture(losses: Mapping[str, Sequence[tuple[int, float]]], method: str) -> bytes:
    # The object interface: no global state and no window, whatever backend the caller uses.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from hf_lowrank.report.members import looks

    figure = Figure(figsize=(6.4, 3.6), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel="optimizer steps", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    colour = looks([method])[method].light
    for (title, points), alpha, marker in zip(losses.items(), (0.45, 1.0), ("", "o"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=title, alpha=alpha, marker=marker, ms=4)
    axes.legend(frameon=False)
    return png(figure)


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
