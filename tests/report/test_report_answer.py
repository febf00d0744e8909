"""The answer, its statistics, its colours and its numbers, against tables and closed forms."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from hf_lowrank.claims.results import StudyResults, Trial
from hf_lowrank.cli import main
from hf_lowrank.formats import big_count, byte_size, duration, join_words, loss_text, significant
from hf_lowrank.report import terminal_table
from hf_lowrank.report.answer import groups, verdict
from hf_lowrank.report.members import DARK_GROUND, LIGHT_GROUND, looks
from hf_lowrank.report.payload import payload
from hf_lowrank.report.plots import loss_curves, trends
from hf_lowrank.runs.records import load_runs
from hf_lowrank.statistics import without_outliers

LATER = ["q_galore", "normuon", "dion", "dion2", "ldadam", "cosmos"]
OTHERS = ["apollo_mini", "frugal", "muon", "cola_m", *LATER]
STUDY = ["full_rank", "low_rank", "galore", "fira", "apollo", "relora", "cola", "sltrain"]
ALL = STUDY + OTHERS


def test_one_seed_gives_no_verdict(make_run):
    headline, standfirst = verdict(load_runs([make_run("a", "full_rank", loss=3.3), make_run("b", "fira", loss=3.2)]))
    assert headline == "A demonstration with one seed per method: perplexity 24.5 to 27.1"
    assert standfirst.startswith("Fira ends lowest and Full-rank highest, 0.100 nats apart.")
    assert "which method is better takes 3 seeds or more of each" in standfirst


def test_three_seeds_give_one_when_intervals_allow(make_run):
    def runs(method, losses):
        return [make_run(f"{method}{loss}", method, seed, loss=loss) for seed, loss in enumerate(losses)]

    clear = load_runs(runs("fira", (3.20, 3.21, 3.22)) + runs("galore", (3.40, 3.415, 3.42)))
    assert verdict(clear)[0] == "Fira has a lower perplexity than GaLore: 24.8"
    close = load_runs(
        runs("cola", (3.0, 3.3, 3.1)) + runs("sltrain", (3.1, 3.2, 3.15)) + runs("relora", (5.0, 5.3, 5.1))
    )
    headline, basis = verdict(close)
    assert headline == "CoLA has the lowest mean perplexity, 23.0, statistically tied with SLTrain"
    assert "Its loss is lower than that of ReLoRA." in basis
    assert "2 comparisons" in basis


def test_two_seeds_are_too_few(make_run):
    runs = [make_run(f"{m}{s}", m, s, loss=loss) for m, loss in (("fira", 3.0), ("galore", 4.0)) for s in (0, 1)]
    assert verdict(load_runs(runs))[0].startswith("A demonstration with only 2 seeds per method: ")
    uneven = [*runs, make_run("fira2", "fira", 2)]
    assert verdict(load_runs(uneven))[0].startswith("A demonstration with only 2 seeds of some methods: ")


def test_runs_without_any_loss_or_of_one_method_have_their_own_words(make_run, tmp_path):
    (tmp_path / "bare" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "bare" / "checkpoint-1" / "config.json").write_text("{}")
    assert verdict(load_runs([tmp_path / "bare"]))[0] == "No loss was recorded"
    assert verdict(load_runs([make_run("a"), make_run("b", seed=1)]))[1].startswith("One method, 2 seeds, 95 %")


def test_groups_keep_fingerprints_apart_and_sort_by_loss(make_run):
    runs = [make_run("a", loss=3.5), make_run("b", "fira", loss=3.1), make_run("c", loss=1.0, fingerprint="cd" * 32)]
    first, second = groups(load_runs(runs))
    assert [run.name for run in first.runs] == ["b", "a"]
    assert [run.name for run in second.runs] == ["c"]
    ids = [column.id for column in first.columns]
    assert ids[:5] == ["run", "method", "seed", "validation_loss", "perplexity"]
    assert "random_sharpness" in ids
    assert "random_curve" not in ids
    cell = first.cells[0][ids.index("random_sharpness")]
    assert cell.low < cell.value < cell.high


def test_runs_that_are_not_finished_do_not_stand_in_the_answer(make_run):
    done = [make_run(f"{method}-0", method, loss=loss) for method, loss in (("full_rank", 3.4), ("galore", 3.3))]
    early = make_run("fira-0", "fira", loss=3.0, planned=400)
    (group,) = groups(load_runs([early, *done]))
    assert [run.name for run in group.runs] == ["galore-0", "full_rank-0", "fira-0"]
    assert group.standfirst.startswith("GaLore ends lowest and Full-rank highest")
    assert group.standfirst.endswith("Left out as unfinished: fira-0 (step 200 of 400).")
    assert "Fira" not in group.trade
    assert [row.title for row in group.standings.rows] == ["GaLore", "Full-rank"]
    places = {column.id: place for place, column in enumerate(group.columns)}
    run, loss = (group.cells[2][places[name]] for name in ("run", "validation_loss"))
    assert run.text == "fira-0 (step 200 of 400)"
    assert (loss.value, loss.text, loss.note) == (None, "3.000", "at step 200 of 400")
    written = Console(width=150, record=True, file=io.StringIO())
    written.print(terminal_table([early, *done], width=150))
    assert "fira-0 (step 200 of 400)" in written.export_text()
    # Where none is finished there is nothing else to go by.
    (alone,) = groups(load_runs([early]))
    assert alone.headline == "Fira reaches perplexity 20.1"
    assert alone.standfirst.endswith("Unfinished: fira-0 (step 200 of 400).")
    assert alone.cells[0][[column.id for column in alone.columns].index("validation_loss")].value == 3.0
    many = [make_run(f"apollo-{seed}", "apollo", seed, planned=400) for seed in range(6)]
    (group,) = groups(load_runs([*done, *many]))
    assert group.standfirst.endswith("apollo-3 (step 200 of 400) and 2 more.")


def test_runs_that_are_not_finished_cut_no_line_short(make_run):
    """The mean over a method's runs ends where the shortest does."""
    paths = [make_run("galore-0", "galore", loss=3.3), make_run("fira-0", "fira", 0, planned=400)]
    paths.append(make_run("galore-1", "galore", 1, steps=(0, 50, 100), planned=200))
    runs = load_runs(paths)
    entries = payload(groups(runs), StudyResults(), looks({run.method for run in runs}))["runs"]
    assert [entry["name"] for entry in entries] == ["galore-0", "fira-0"]
    assert entries[0]["loss"]["eval"]["x"][-1] == 200
    assert entries[0]["final"]["validation_loss"] == 3.3
    assert entries[1]["final"] == {}  # its line shows how far it is, but its last values are not compared
    (axes,) = loss_curves(paths).axes
    assert [line.get_xdata()[-1] for line in axes.lines] == [200, 200]
    # What the finished run lacks is drawn from the other.
    (paths[0] / "measurements.jsonl").unlink()
    runs = load_runs(paths)
    entries = payload(groups(runs), StudyResults(), looks({run.method for run in runs}))["runs"]
    (early,) = [entry for entry in entries if entry["name"] == "galore-1"]
    assert early["loss"]["eval"]["x"] == []
    assert early["metrics"]["weight_effective_rank"]["x"] == [0, 50, 100]
    (axes,) = trends([paths[0], paths[2]], ["weight_effective_rank"]).axes
    assert [line.get_xdata()[-1] for line in axes.lines] == [100]


def test_runs_that_end_at_different_steps_say_so(make_run):
    runs = [make_run("a", "full_rank"), make_run("b", "galore", steps=(0, 50, 100))]
    (group,) = groups(load_runs(runs))
    assert group.standfirst.endswith("The runs end at different steps: 100 and 200.")


def test_the_answer_as_json_is_that_of_the_table(make_run, tmp_path, capsys):
    runs = [make_run(f"{m}-{seed}", m, seed, loss=loss + 0.01 * seed)
            for m, loss in (("full_rank", 3.3), ("fira", 3.2)) for seed in range(3)]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, runs), "--output", str(tmp_path / "page"), "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(tmp_path / "page" / "report.html")
    (group,) = found["answer"]
    (expected,) = groups(load_runs(runs))
    assert group["headline"] == expected.headline
    assert [row["method"] for row in group["methods"]] == ["fira", "full_rank"]
    assert group["methods"][0]["loss"]["value"] == pytest.approx(3.21)
    assert group["methods"][0]["loss"]["low"] < 3.21 < group["methods"][0]["loss"]["high"]
    assert [run["run"] for run in group["runs"]] == [run.name for run in expected.runs]
    assert group["runs"][0]["validation_loss"] == pytest.approx(3.2)


def test_the_terminal_table_is_readable(make_run):
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    runs = [make_run("a", "full_rank", loss=3.3), make_run("b", "fira[red]", loss=3.2)]
    console.print(terminal_table(runs, width=150))
    text = console.export_text()
    assert "fira[red]" in text
    assert text.index("fira[red]") < text.index("Full-rank")
    assert "one seed per method" in " ".join(text.split())
    console.print(terminal_table([make_run("c"), make_run("d", fingerprint="cd" * 32)]))
    assert "2 evaluation sets" in console.export_text()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_shows_fewer_columns_but_whole_ones(make_run, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table = terminal_table([make_run("a", "full_rank", loss=3.3), make_run("b", "fira", loss=3.2)], width=width)
    console.print(table)
    headings = [str(column.header).splitlines()[0] for column in table.columns]
    assert headings[:2] == ["Run", "Method"]
    lines = console.export_text().splitlines()
    assert all(any(heading in line for line in lines) for heading in headings)
    assert ("Perplexity" in headings) == (width >= 80)


def _linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _contrast(one, other):
    bright = sorted(float(_linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


@pytest.mark.parametrize(("tone", "ground"), [("light", LIGHT_GROUND), ("dark", DARK_GROUND)])
def test_every_method_stands_out_from_its_ground(tone, ground):
    for name, look in looks([*ALL, *(f"other{i}" for i in range(6))]).items():
        assert _contrast(getattr(look, tone), ground) >= 3.0, name


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def _lab(colour, vision):
    rgb = np.clip(VISION[vision] @ _linear(colour), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("tone", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_methods_are_distinguishable_without_colour_vision(tone, vision):
    chosen = looks(ALL)
    shapes = [(look.dash, look.marker) for look in chosen.values()]
    assert len(set(shapes)) == len(shapes)
    for a in STUDY + LATER:
        for b in STUDY + LATER:
            if a < b and chosen[a].dash == chosen[b].dash:
                apart = np.linalg.norm(_lab(getattr(chosen[a], tone), vision) - _lab(getattr(chosen[b], tone), vision))
                assert apart > 12, (a, b, apart)


def test_a_method_looks_the_same_whoever_stands_beside_it():
    assert looks(["galore"])["galore"] == looks(ALL)["galore"]
    assert list(looks(["zeta", "fira", "alpha"])) == ["fira", "alpha", "zeta"]
    assert len({(look.light, look.marker) for look in looks([f"m{i}" for i in range(6)]).values()}) == 6


def test_numbers_read_as_people_write_them():
    assert [significant(v) for v in (0, 0.012345, 24.13, 1234.5, -0.5, 3.2e-7, -math.inf, math.nan)] == [
        "0", "0.0123", "24.1", "1 234", "−0.500", "3.20e−7", "−∞", "—",
    ]  # fmt: skip
    assert [big_count(v) for v in (950, 12_345, 4_500_000, 1.2e9)] == ["950", "12.3 k", "4.50 M", "1.20 B"]
    assert [byte_size(v) for v in (100, 2048, 700 * 2**20, 3 * 2**30)] == ["100 B", "2.00 KiB", "700 MiB", "3.00 GiB"]
    assert [duration(v) for v in (4.25, 61, 3725)] == ["4.2 s", "1 min 01 s", "1 h 02 min"]
    assert loss_text(-0.1) == "−0.100"
    assert [join_words(list(w)) for w in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_the_terminal_table_marks_what_is_not_of_dense_weights(make_run):
    def printed(*methods):
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(terminal_table([make_run(f"{method}-0", method) for method in methods], width=160))
        return console.export_text()

    text = printed("cola", "galore")
    (cola,) = [line for line in text.splitlines() if "cola-0" in line]
    (galore,) = [line for line in text.splitlines() if "galore-0" in line]
    assert "†" in cola
    assert "†" not in galore
    assert "† moves the model's own parameters instead of dense weights" in text
    assert "†" not in printed("fira")


def trials_of(member, count=2, *, edge=False, extension=False):
    return [
        Trial(
            member=member,
            values={"training.learning_rate": 0.001 * (place + 1)},
            loss=3.0,
            chosen=place == 0,
            edges={"training.learning_rate": 0 if edge else 1} if place == 0 else {},
            extension=extension and place == count - 1,
        )
        for place in range(count)
    ]


@pytest.mark.parametrize(
    ("baseline_loss", "sweep", "said"),
    [
        (3.3, trials_of("full_rank", edge=True) + trials_of("fira"), "its best learning rate is at the edge"),
        (3.3, trials_of("full_rank", 3) + trials_of("fira", 4), "it had 3 trials in the sweep, Fira had 4"),
        (3.3, trials_of("fira", 4), "it had no trial in the sweep, Fira had 4"),
        (3.3, trials_of("full_rank", 3) + trials_of("fira", 4, extension=True), ""),
        (3.3, trials_of("full_rank", 4) + trials_of("fira", 4, edge=True), ""),
        (3.3, [], ""),
        (3.1, trials_of("full_rank", edge=True) + trials_of("fira", 4), ""),
    ],
)
def test_a_baseline_that_was_tuned_less_is_said_first(make_run, baseline_loss, sweep, said):
    runs = load_runs([make_run("a", "full_rank", loss=baseline_loss), make_run("b", "fira", loss=3.2)])
    (group,) = groups(runs, sweep=sweep)
    start = "Full-rank, the baseline, may be behind because of its tuning: "
    assert group.caution.startswith(start + said) if said else group.caution == ""
    assert group.headline.startswith("A demonstration with one seed per method: ")


def test_an_outlier_does_not_set_the_scale_of_a_heat_map():
    values = [0.9 + 0.001 * place for place in range(50)]
    assert without_outliers(values) == (values[0], values[-1])
    assert without_outliers([*values, 7.0, -3.0]) == (values[0], values[-1])
    assert without_outliers([1.0] * 9 + [2.0]) == (1.0, 2.0)
    assert without_outliers([5.0]) == (5.0, 5.0)
