"""A study's results as a folder to keep next to code: a card, pictures, tables and the page, without weights."""

import csv
import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.formats import duration, finite_number, pluralize
from hf_lowrank.hub.cards import OWN_BEGIN, OWN_END, own_words
from hf_lowrank.hub.markdown import Markdown, render
from hf_lowrank.hub.metadata import read_card, study_metadata
from hf_lowrank.hub.pictures import PICTURES as RUN_PICTURES
from hf_lowrank.hub.pictures import Picture, draw_plots, write_pictures
from hf_lowrank.hub.privacy import without_private
from hf_lowrank.metrics import CURVES, POINTWISE
from hf_lowrank.report import write_report
from hf_lowrank.report.answer import Group
from hf_lowrank.report.members import looks
from hf_lowrank.report.sizes import read_size, sizes_view
from hf_lowrank.report.views import claims_view, methods_view, prediction_view, sweep_view
from hf_lowrank.runs.measurements import Measurement
from hf_lowrank.runs.records import RunRecord
from hf_lowrank.runs.scores import Score
from hf_lowrank.storage.files import whole_file, write_text

CARD = "README.md"
# Written by the study's stages, and copied unchanged.
RESULTS = ("sweep.json", "claims.json", "prediction.json", "prediction.png")
PICTURES = {
    "solutions": Picture(
        "Perplexity and the kind of solution",
        "A mark is a method's mean over seeds, a cross its 95 % intervals. Marks above one another have equal "
        "perplexity but are different solutions.",
        "solutions",
    ),
    "losses": Picture("Loss during training", "Held-out loss, mean over seeds with its 95 % interval.", "loss_curves"),
    "random-directions": Picture(
        CURVES["random_curve"].title,
        "The rise above the trained model: a steeper curve is a sharper minimum.",
        "line_curves",
    ),
    "pca-direction": Picture(
        CURVES["pca1_curve"].title,
        "The same along the strongest singular direction of every matrix at once.",
        "line_curves",
        {"metric": "pca1_curve"},
    ),
    "barriers": Picture(
        "Barriers between methods",
        "The highest rise of the loss above the chord on the straight line between two methods' weights; 0 means one "
        "basin.",
        "barrier_matrix",
    ),
    "spectra": Picture("Spectra during training", "Means over the matrices at each checkpoint.", "trends"),
    "effective-rank": Picture(
        "Effective rank of the weights by depth", "Each kind of matrix by block, at the end.", "layer_profiles"
    ),
    "activations": RUN_PICTURES["activations"],
}
# Columns of tables that a card leaves out: settings of the measurement, and what identifies checkpoints and items.
MEASUREMENT_COLUMNS = [
    name for name in Measurement.__dataclass_fields__ if name not in ("scope", "settings") and "checkpoint" not in name
]
SCORE_COLUMNS = list(Score.__dataclass_fields__)[: list(Score.__dataclass_fields__).index("chance") + 1]


def render_study_card(
    study: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    command: str = "",
    others: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Writes the results of a finished study into `folder` and returns its card, `README.md`.

    Next to the card are `pictures/`, `answer.csv` (the table of methods), `measurements.csv` and `scores.csv` (per
    checkpoint, of whole models), `report.html`, and the files of the study's stages. Text between the card's two marks
    is kept when the card is rewritten.

    Args:
        study: the study's folder, which contains `runs/`.
        folder: created if it does not exist.
        command: the command that made the study, for the card.
        others: folders of studies of the same methods at other sizes, to show side by side.

    Raises:
        UserError: it is not a study's folder, or its runs cannot be compared; nothing is written.
    """
    source, target = Path(study), Path(folder)
    others = list(others)
    size, sizes = read_size(source), [read_size(Path(other)) for other in others]
    group, results = size.group, size.results
    runs = sorted(group.runs, key=lambda run: run.path.name)
    places = [run.path for run in runs]
    pictures = draw_plots(PICTURES, runs, dpi=90)
    card = target / CARD
    before, own = read_card(card.read_text(encoding="utf-8") if card.is_file() else None)
    metadata = study_metadata([row.method for row in group.standings.rows], before)
    known = looks([*(run.method for run in runs), *(rate.member for rate in results.sweep)])
    text = render(
        "study_card.md.j2",
        name=source.resolve().name.replace("_", " "),
        group=group,
        table=methods_view(group),
        several=any(row.seeds > 1 for row in group.standings.rows),
        sizes=sizes_view(size, sizes),
        own_begin=Markdown(OWN_BEGIN),
        own_words=Markdown(own_words(own)),
        own_end=Markdown(OWN_END),
        pictures=[(name, PICTURES[name]) for name in pictures],
        claims=claims_view(results, known),
        prediction=prediction_view(results),
        sweep=sweep_view(results, known),
        command=command,
        made=_made(runs),
        files=[name for name in RESULTS if (source / name).is_file()],
    )
    write_pictures(target / "pictures", pictures, [path.stem for path in (target / "pictures").glob("*.png")])
    for name in RESULTS:
        if (source / name).is_file():
            with whole_file(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
    write_text(target / "answer.csv", _answer(group))
    rows = (row for run in runs for row in _measurements(run))
    write_text(target / "measurements.csv", _csv(MEASUREMENT_COLUMNS, rows))
    scores = (vars(row) for run in runs for row in run.scores if row.group is None)
    write_text(target / "scores.csv", _csv(SCORE_COLUMNS, scores))
    write_report(places, target, study=source, others=others)
    write_text(card, f"---\n{metadata}\n---\n\n{without_private(text)}")
    return card


def _answer(group: Group) -> str:
    """The table of methods: every criterion with its interval and rank."""
    criteria = group.standings.criteria
    parts = ("", "_low", "_high", "_rank")
    columns = ["method", "seeds", *(f"{one.id}{part}" for one in criteria for part in parts)]
    rows = []
    for row in group.standings.rows:
        cells: dict[str, Any] = {"method": row.method, "seeds": row.seeds}
        for one, cell in zip(criteria, row.standings, strict=True):
            for part, value in zip(parts, (cell.value, cell.low, cell.high, cell.rank), strict=True):
                cells[f"{one.id}{part}"] = value
        rows.append(cells)
    return _csv(columns, rows)


def _measurements(run: RunRecord) -> Iterable[Mapping[str, Any]]:
    for row in run.rows:
        if row.scope == "model" and row.metric not in POINTWISE:
            numbers = {key: finite_number(getattr(row, key)) for key in ("value", "ci_low", "ci_high")}
            yield {**vars(row), **numbers, "run": run.name, "method": run.method, "seed": run.seed}


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Six significant digits: more than any interval here resolves."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def _made(runs: Sequence[RunRecord]) -> list[str]:
    """The study's size, cost and software versions."""
    seconds = [value for run in runs if (value := run.fact("cpu_seconds")) is not None]
    lines = [f"{pluralize(len(runs), 'run')} of {pluralize(len({run.method for run in runs}), 'method')}"]
    if seconds:
        lines[0] += f"; {duration(sum(seconds))} of processor time in their training steps"
    versions = runs[0].facts.get("versions")
    if isinstance(versions, Mapping):
        known = {**versions, "torch": runs[0].facts.get("torch")}
        lines.append(", ".join(f"{name} {value}" for name, value in known.items() if value))
    return lines
