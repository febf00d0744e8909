"""The table of methods: what is in each column, its intervals, ranks and ties, against scipy and by hand."""

import json
import math
import random

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from hf_lowrank.claims.results import load_results
from hf_lowrank.errors import UserError
from hf_lowrank.report import terminal_table
from hf_lowrank.report.answer import groups
from hf_lowrank.report.members import with_distinct_methods
from hf_lowrank.report.standings import standings
from hf_lowrank.runs.records import load_runs

TASKS = ("syntax", "cloze")


def amend(run, **facts):
    file = run / "facts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    return run


def cells(runs):
    table = standings(load_runs(runs))
    ids = [criterion.id for criterion in table.criteria]
    return table, {row.method: dict(zip(ids, row.standings, strict=True)) for row in table.rows}


def three(make_run, method, losses, **how):
    return [make_run(f"{method}{seed}", method, seed, loss=loss, **how) for seed, loss in enumerate(losses)]


def test_perplexity_and_loss_have_the_interval_of_student_over_seeds(make_run):
    losses = [3.2, 3.25, 3.31, 3.22]
    _, found = cells(three(make_run, "galore", losses))
    low, high = stats.t.interval(0.95, 3, np.mean(losses), stats.sem(losses))
    loss, perplexity = found["galore"]["loss"], found["galore"]["perplexity"]
    assert (loss.value, loss.low, loss.high) == pytest.approx((np.mean(losses), low, high))
    assert (perplexity.value, perplexity.low, perplexity.high) == pytest.approx(np.exp([np.mean(losses), low, high]))


def test_methods_that_cannot_be_told_from_the_best_share_its_rank(make_run):
    runs = three(make_run, "cola", (3.0, 3.3, 3.1)) + three(make_run, "sltrain", (3.1, 3.2, 3.15))
    table, found = cells(runs + three(make_run, "relora", (5.0, 5.3, 5.1)))
    assert [row.method for row in table.rows] == ["cola", "sltrain", "relora"]
    ranks = {method: (cell["loss"].rank, cell["loss"].tied) for method, cell in found.items()}
    assert ranks == {"cola": (1, True), "sltrain": (1, True), "relora": (3, False)}


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_ordered_but_never_ranked(make_run, seeds):
    _, found = cells(three(make_run, "cola", (3.0, 3.1)[:seeds]) + three(make_run, "fira", (4.0, 4.1)[:seeds]))
    cell = found["cola"]["loss"]
    assert (cell.rank, cell.tied, cell.certain) == (1, False, False)
    assert (cell.low is None) == (seeds == 1)


def test_against_full_rank_pairs_seeds(make_run):
    base, ours = (3.0, 3.5, 4.0), (3.1, 3.61, 4.09)
    _, found = cells(three(make_run, "full_rank", base) + three(make_run, "galore", ours))
    mean = np.mean(np.subtract(ours, base))
    assert found["galore"]["loss"].beside == f"+{mean:.3f}"
    assert found["galore"]["perplexity"].beside == f"+{100 * math.expm1(mean):.0f} %"
    assert found["full_rank"]["loss"].beside == "baseline"


def test_memory_is_of_one_kind_for_all_rows(make_run):
    runs = three(make_run, "galore", (3.0,)) + three(make_run, "fira", (3.1,))
    state = [json.loads((run / "facts.json").read_text())["optimizer_state_bytes"] for run in runs]
    table, found = cells(runs)
    assert found["galore"]["memory"].value == state[0] + 4 * 1_312_000
    for run in runs:
        amend(run, memory={"estimated_peak": 5e8, "measured_peak": None})
    assert cells(runs)[1]["fira"]["memory"].value == 5e8
    amend(runs[0], memory={"estimated_peak": 5e8, "measured_peak": 6e8})
    table, found = cells(runs)
    assert {cell["memory"].value for cell in found.values()} == {5e8}
    assert "estimated" in next(criterion.help for criterion in table.criteria if criterion.id == "memory")
    amend(runs[1], memory={"estimated_peak": 5e8, "measured_peak": 7e8})
    assert [cells(runs)[1][method]["memory"].value for method in ("galore", "fira")] == [6e8, 7e8]


def test_speed_is_by_processor_time_only_where_all_runs_have_it(make_run):
    runs = three(make_run, "galore", (3.0,)) + three(make_run, "fira", (3.1,))
    for run in runs:
        amend(run, tokens_seen=1000, training_seconds=10.0, cpu_seconds=8.0)
    assert cells(runs)[1]["fira"]["speed"].value == 125
    amend(runs[0], device="cuda")
    assert cells(runs)[1]["fira"]["speed"].value == 100
    amend(runs[0], device="cpu", cpu_seconds=None)
    assert cells(runs)[1]["fira"]["speed"].value == 100


@pytest.mark.parametrize("change", [{"value": None}, {"chance": 1.0}, {"chance": 1.5}])
def test_what_is_no_number_or_cannot_be_beaten_is_left_out_of_the_mean(make_run, change):
    (run,) = three(make_run, "galore", (3.0,), tasks=TASKS)
    rows = [json.loads(line) for line in (run / "downstream.jsonl").read_text().splitlines()]
    (run / "downstream.jsonl").write_text("".join(json.dumps(row | change) + "\n" for row in rows))
    assert "downstream" not in cells([run])[1]["galore"]
    (group,) = groups(load_runs([run]))
    own = {column.id: cell for column, cell in zip(group.columns, group.cells[0], strict=True)}["cloze:acc"]
    assert (own.value is None and own.text == "—") == ("value" in change)


def test_downstream_is_the_mean_above_chance_at_the_last_step(make_run):
    (run,) = three(make_run, "galore", (3.0,), tasks=TASKS)
    rows = [json.loads(line) for line in (run / "downstream.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == 200 and row["chance"] is not None]
    expected = np.mean([(row["value"] - row["chance"]) / (1 - row["chance"]) for row in last])
    (group,) = groups(load_runs([run]))
    assert cells([run])[1]["galore"]["downstream"].value == pytest.approx(expected)
    detail = {column.id: cell for column, cell in zip(group.columns, group.cells[0], strict=True)}
    assert detail["downstream"].value == pytest.approx(expected)
    assert {"syntax:acc", "cloze:acc", "bits:bits_per_byte"} <= set(detail)
    assert detail["cloze:acc"].low < detail["cloze:acc"].value < detail["cloze:acc"].high
    (run / "downstream.jsonl").write_text("".join(json.dumps(row | {"limit": 5}) + "\n" for row in rows))
    table, found = cells([run])
    assert "downstream" not in found["galore"]
    assert "no score" in table.notes[0]


def test_scores_on_the_first_items_count_where_all_runs_have_them(make_run):
    runs = three(make_run, "galore", (3.0, 3.1), tasks=TASKS) + three(make_run, "fira", (3.1, 3.2), tasks=TASKS)
    whole = cells(runs)[1]
    texts = {run: (run / "downstream.jsonl").read_text() for run in runs}
    originals = {run: [json.loads(line) for line in text.splitlines()] for run, text in texts.items()}

    def limited(chosen, limit):
        for run, rows in originals.items():
            how = {"limit": limit} if run in chosen else {}
            (run / "downstream.jsonl").write_text("".join(json.dumps(row | how) + "\n" for row in rows))
        table, found = cells(runs)
        (criterion,) = (one for one in table.criteria if one.id == "downstream")
        return criterion.help, {method: cell["downstream"] for method, cell in found.items()}

    said, found = limited(runs, 150)
    assert "syntax, the first 150 items of each: 0 is guessing" in said
    assert {method: cell.value for method, cell in found.items()} == {
        method: cell["downstream"].value for method, cell in whole.items()
    }
    said, found = limited(runs[2:], 150)  # a quick look at the others does not hide scores on all items
    assert "items of each" not in said
    assert found["galore"].value == whole["galore"]["downstream"].value
    assert found["fira"].value is None


def test_distance_is_the_mean_over_layers_and_full_rank_is_what_it_is_from(make_run):
    runs = three(make_run, "full_rank", (3.0,), activations=True) + three(make_run, "fira", (3.1,), activations=True)
    rows = [json.loads(line) for line in (runs[1] / "measurements.jsonl").read_text().splitlines()]
    found = cells(runs)[1]
    l2, cka = ([r["value"] for r in rows if r["metric"] == metric and r["scope"] == "model"][-1]
               for metric in ("activation_l2", "activation_cka"))  # fmt: skip
    assert found["fira"]["distance"].value == l2
    assert f"1 − CKA {1 - cka:.3g}" in found["fira"]["distance"].note
    assert found["full_rank"]["distance"].value is None
    assert "compared with it" in found["full_rank"]["distance"].note


def test_sizes_are_never_averaged(make_run):
    runs = [*three(make_run, "galore", (3.0, 3.1)), make_run("big", "galore", 0, loss=2.0, width=256)]
    small, big = groups(load_runs(runs))
    assert [len(small.runs), len(big.runs)] == [2, 1]
    assert big.scale == "2.62 M parameters, 4 blocks of width 256"


def test_other_settings_are_no_other_seed(make_run, tmp_path):
    runs = [make_run(f"runs/{name}-seed{seed}", "galore", seed, rate=rate)
            for name, rate in (("slow", 0.001), ("fast", 0.01)) for seed in range(2)]  # fmt: skip
    assert [run.method for run in with_distinct_methods(load_runs(runs), tmp_path)] == ["slow", "slow", "fast", "fast"]
    names = {run.method for run in with_distinct_methods(load_runs(runs))}
    assert names == {"GaLore, learning rate 0.001", "GaLore, learning rate 0.01"}
    assert {run.method for run in with_distinct_methods(load_runs(runs[:2]))} == {"galore"}


@pytest.mark.parametrize(
    ("names", "methods"),
    [
        (("theirs", "ours"), ["theirs", "ours"]),
        (("base-seed-1", "base-seed-2", "other"), ["base", "base", "other"]),
        (("galore", "ours"), ["galore (unknown method)", "ours"]),
        (("x/last", "y/last"), ["x/last", "y/last"]),
    ],
)
def test_folders_without_a_recipe_are_not_taken_for_seeds_of_one_method(make_run, names, methods):
    runs = [make_run(name, "galore", seed) for seed, name in enumerate(names)]
    for run in runs:
        (run / "recipe.yaml").unlink()
    assert [run.method for run in with_distinct_methods(load_runs(runs))] == methods


def test_the_sentence_says_what_is_lost_and_saved(make_run):
    draw = random.Random(0)
    runs = [
        amend(make_run(f"{m}{seed}", m, seed, loss=loss + draw.gauss(0, 0.001)), optimizer_state_bytes=state)
        for m, loss, state in (("full_rank", 3.0, 10_496_000), ("galore", 3.05, 2_624_000))
        for seed in range(3)
    ]
    (group,) = groups(load_runs(runs))
    assert group.trade.startswith(
        "Compared with full-rank training, GaLore has a perplexity 5.1\N{NO-BREAK SPACE}% higher"
    )
    assert "with 50\N{NO-BREAK SPACE}% less memory" in group.trade
    (group,) = groups(load_runs([runs[0], runs[3]]))
    assert group.trade.startswith("In these runs: compared with")
    assert "interval" not in group.trade


@pytest.mark.parametrize(
    ("seconds", "said"), [(10.0, "about the same speed"), (9.7, "about the same speed"), (8.0, "1.2 times the speed"),
                          (10.6, "0.94 times the speed")]
)  # fmt: skip
def test_a_speed_that_reads_as_one_is_about_the_same(make_run, seconds, said):
    runs = [make_run(method, method) for method in ("full_rank", "galore")]
    for run, taken in zip(runs, (10.0, seconds), strict=True):
        amend(run, tokens_seen=1000, training_seconds=taken, cpu_seconds=taken)
    (group,) = groups(load_runs(runs))
    assert said in group.trade


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_has_a_line_for_each_method(make_run, width):
    runs = [run for method, loss in (("full_rank", 3.0), ("galore", 3.2), ("fira", 3.001))
            for run in three(make_run, method, (loss, loss + 0.02, loss - 0.01), tasks=TASKS)]  # fmt: skip
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table = terminal_table(runs, width=width)
    console.print(table)
    text = console.export_text()
    assert table.row_count == 3
    assert "Downstream" in text
    assert max(map(len, text.splitlines())) <= width
    assert " ± " in text
    assert text.count("galore") == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("claims.json", '{"claims": [{"id": "a"}]}', "entry 1 is not valid"),
        ("claims.json", '{"claims": [{"id": "a", "statement": "b", "verdict": "yes"}]}', "verdict must be one of"),
        ("sweep.json", '[{"member": "a", "learning_rate": -1}]', "learning_rate must be a positive"),
        ("sweep.json", "{}", "must hold a JSON list"),
        ("failures.json", "[3]", "entry 1"),
        ("prediction.json", "{", "not readable as JSON"),
    ],
)
def test_damaged_study_files_are_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as fault:
        load_results(tmp_path)
    assert "\n" not in str(fault.value)


def test_a_study_without_results_is_empty(tmp_path):
    assert load_results(tmp_path).claims == ()
    with pytest.raises(UserError, match="no such study folder"):
        load_results(tmp_path / "absent")


def test_a_study_may_have_another_baseline(make_run, tmp_path):
    from hf_lowrank.report import write_report

    study = tmp_path / "study"
    runs = [
        make_run(f"study/runs/{member}-seed{seed}", method, seed, loss=loss + 0.01 * seed)
        for member, method, loss in (("theirs", "relora", 3.0), ("ours", "cola", 3.1), ("control", "full_rank", 3.4))
        for seed in range(3)
    ]
    (study / "study.yaml").write_text("baseline: theirs\n")
    page = write_report(runs, tmp_path / "report", study=study).read_text()
    assert "Compared with ReLoRA, CoLA has a perplexity 11 % higher" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert "Against ReLoRA" in page
    assert "Compared with full-rank" not in page
    table = groups(load_runs(runs), "relora")[0].standings
    besides = {row.method: row.standings[0].beside for row in table.rows}
    assert besides["relora"] == "baseline"
    assert besides["cola"] == "+11 %"
    assert besides["full_rank"] == "+49 %"
