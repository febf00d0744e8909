"""Invalid studies are one line before anything runs or is written; through function and command."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.cli import main
from hf_lowrank.errors import UserError
from hf_lowrank.study import run_study
from tests.study.tiny import MEASURE, MODEL, study_data, write_recipe


def refused(study, tmp_path, **options):
    """The error of a study; checks that nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        run_study(study, output=tmp_path / "out", fork_here=True, **options)
    message = str(error.value)
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before
    return message


CASES = {
    "a missing recipe": (
        {"members": {"full_rank": "full_rank.yaml", "b": "none.yaml"}},
        ["members.b", "none.yaml", "no such recipe file"],
    ),
    "an unknown baseline": ({"baseline": "fullrank"}, ["baseline", "'fullrank'", "did you mean 'full_rank'?"]),
    "no baseline": ({"baseline": None}, ["baseline is missing"]),
    "a run that is a mapping": (
        {"members": {"full_rank": "full_rank.yaml", "g": {"runs": [{"a": 1}]}}},
        ["members.g.runs", "input should be a valid string"],
    ),
    "a seed twice": ({"seeds": [3, 3]}, ["seeds", "duplicate seed 3"]),
    "a seed that is none": ({"seeds": [-1]}, ["seeds", "got -1"]),
    "members of one name but for case": (
        {"members": {"full_rank": "full_rank.yaml", "Full_Rank": "galore.yaml"}},
        ["members.Full_Rank", "members.full_rank", "Full_Rank-seed0"],
    ),
    "a member's name that is not a folder's": (
        {"members": {"full_rank": "full_rank.yaml", "a/b": "galore.yaml"}},
        ["members.a/b"],
    ),
    "an override that names nothing": (
        {"set": ["training.max_stepz=3"]},
        ["members.full_rank", "training.max_stepz", "max_steps"],
    ),
    "an override that one member lacks": ({"set": ["method.rank=2"]}, ["members.full_rank", "method.rank"]),
    "a member's override": (
        {"members": {"full_rank": "full_rank.yaml", "g": {"recipe": "galore.yaml", "set": ["method.rnk=2"]}}},
        ["members.g", "method.rnk", "rank"],
    ),
    "another size": (
        {"members": {"full_rank": "full_rank.yaml", "g": {"recipe": "galore.yaml", "set": ["model.hidden_size=32"]}}},
        ["members.g", "model.hidden_size 32", "the baseline full_rank has 16"],
    ),
    "another architecture": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "set": ["model.architecture=qwen3"]},
            }
        },
        ["members.g", "model.model_type 'qwen3'", "'llama'"],
    ),
    "another tokenizer": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "set": ["data.vocabulary_size=310"]},
            }
        },
        ["members.g", "data.vocabulary_size 310", "full_rank has 300"],
    ),
    "another corpus": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "set": ["data.train_files=[x.txt]"]},
            }
        },
        ["members.g", "data.train_files", "x.txt"],
    ),
    "an unknown key": ({"seedz": [1]}, ["unknown key 'seedz'", "'seeds'"]),
    "an unknown key of a block": ({"measure": {"metric": "loss"}}, ["measure.metric", "'metrics'"]),
    "an unknown metric": ({"measure": {"metrics": "losss"}}, ["measure.metrics", "losss"]),
    "an unknown setting": ({"measure": {"settings": {"radius": 1}}}, ["measure.settings", "radius"]),
    "an unknown preset": ({"measure": {"preset": "slow"}}, ["measure.preset", "slow"]),
    "an unknown task": ({"evaluate": {"tasks": "pylib_close"}}, ["evaluate.tasks", "pylib_close"]),
    "a step that is not saved": ({"measure": {**MEASURE, "steps": [5]}}, ["measure.steps", "5", "0, 6, 12"]),
    "pairs at a step that is not saved": ({"measure": {"pairs": 7}}, ["measure.pairs", "7"]),
    "steps of no number": ({"evaluate": {"steps": "lst"}}, ["evaluate.steps", "lst"]),
    "a rate twice": (
        {"sweep": {"learning_rate": [1e-3, 0.001]}},
        ["sweep of full_rank must not repeat a trial", "learning rate 0.001 twice"],
    ),
    "an empty sweep": ({"sweep": {}}, ["sweep of full_rank has nothing to try"]),
    "a rate in two places": (
        {"sweep": {"learning_rate": [1e-3], "over": {"training.learning_rate": [1e-3]}}},
        ["sweep", "learning_rate must be left out", "training.learning_rate"],
    ),
    "a swept key of the model": (
        {"sweep": {"over": {"model.hidden_size": [16, 32]}}},
        ["sweep.over", "model.hidden_size must be a key of training or method", "training.learning_rate"],
    ),
    "a swept length": ({"sweep": {"over": {"training.max_steps": [3]}}}, ["training.max_steps", "sweep.steps"]),
    "a swept value that is a list": (
        {"sweep": {"over": {"method.scale": [[1]]}}},
        ["sweep.over: method.scale must have at least one value, each a number"],
    ),
    "a swept value twice": ({"sweep": {"over": {"method.scale": [1, 1.0]}}}, ["method.scale must not repeat", "1.0"]),
    "a range that is a word": (
        {"sweep": {"over": {"training.weight_decay": "low"}}},
        [
            "sweep.over: training.weight_decay must be a list of values, {uniform: [low, high]} or {log_uniform",
            "'low'",
        ],
    ),
    "a range of two kinds": (
        {"sweep": {"over": {"training.weight_decay": {"uniform": [0, 1], "log_uniform": [1, 2]}}}},
        ["training.weight_decay must be a list of values"],
    ),
    "a range without an end": (
        {"sweep": {"over": {"training.weight_decay": {"uniform": [0.1]}}}},
        ["training.weight_decay uniform must be [low, high] with low < high", "[0.1]"],
    ),
    "a logarithm of zero": (
        {"sweep": {"over": {"training.weight_decay": {"log_uniform": [0, 1]}}}},
        ["training.weight_decay log_uniform must be above 0"],
    ),
    "a rate that begins at zero": (
        {"sweep": {"trials": 2, "over": {"training.learning_rate": {"uniform": [0, 1]}}}},
        ["sweep.over: training.learning_rate must be above 0"],
    ),
    "a range without a number of trials": (
        {"sweep": {"over": {"training.weight_decay": {"uniform": [0, 1]}}}},
        ["sweep of full_rank has a range, training.weight_decay: give sweep.trials"],
    ),
    "a member's range": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "sweep": {"method.scale": {"uniform": [2, 1]}}},
            },
            "sweep": {"learning_rate": [1e-3]},
        },
        ["members.g.sweep: method.scale uniform must be [low, high]"],
    ),
    "members with different numbers of trials": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "sweep": {"method.scale": [0.25, 0.5, 1]}},
            },
            "sweep": {"learning_rate": [1e-3, 2e-3]},
        },
        ["members.g.sweep must give every member the same number of trials, g has 6 and full_rank has 2"],
    ),
    "a member with too few combinations": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "sweep": {"training.learning_rate": [1e-3, 2e-3]}},
            },
            "sweep": {"trials": 3, "over": {"training.learning_rate": [1e-3, 2e-3, 3e-3]}},
        },
        ["members.g.sweep of g has 2 combinations of values, fewer than sweep.trials (3)"],
    ),
    "a member's range without a sweep": (
        {"members": {"full_rank": "full_rank.yaml", "g": {"recipe": "galore.yaml", "sweep": {"method.scale": [1]}}}},
        ["members.g.sweep must be left out; there is no sweep block"],
    ),
    "a range for a fixed rate": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {"recipe": "galore.yaml", "learning_rate": 1e-3, "sweep": {"method.scale": [1]}},
            },
            "sweep": {"learning_rate": [1e-3]},
        },
        ["members.g.sweep must be left out; learning_rate excludes it"],
    ),
    "a swept key that a member lacks": (
        {"sweep": {"over": {"method.scale": [0.25, 0.5]}}},
        ["members.full_rank sweep: method.scale=0.25", "unknown key 'method.scale'", "matrix_lr_scale"],
    ),
    "a swept value that is not allowed": (
        {
            "members": {
                "full_rank": "full_rank.yaml",
                "g": {
                    "recipe": "galore.yaml",
                    "sweep": {"training.learning_rate": None, "method.scale": [0.5, -1]},
                },
            },
            "sweep": {"over": {"training.learning_rate": [1e-3, 2e-3]}},
        },
        ["members.g sweep: method.scale=-1", "method.scale"],
    ),
    "a rate of zero": ({"sweep": {"learning_rate": [0]}}, ["sweep.learning_rate", "0.0"]),
    "a sweep's override that names nothing": (
        {"sweep": {"learning_rate": [1e-3], "set": ["training.savesteps=3"]}},
        ["members.full_rank", "training.savesteps"],
    ),
    "an unknown stage": ({"stages": ["trian"]}, ["stages", "trian"]),
    "no number of jobs": ({"jobs": 0}, ["jobs", "0"]),
    "no processes": (
        {"members": {"full_rank": {"recipe": "full_rank.yaml", "processes": 0}}},
        ["members.full_rank.processes", "greater than or equal to 1, got 0"],
    ),
    "more processes than cores": (
        {"members": {"full_rank": {"recipe": "full_rank.yaml", "processes": 100_000}}},
        ["members.full_rank.processes must be at most", "cores of this machine", "100000"],
    ),
    "processes for what is not trained": (
        {"members": {"full_rank": "full_rank.yaml", "b": {"runs": ["x"], "processes": 2}}},
        ["members.b", "processes must be left out"],
    ),
    "neither recipe nor runs": ({"members": {"full_rank": {}}}, ["members.full_rank", "recipe", "runs"]),
    "both recipe and runs": (
        {"members": {"full_rank": {"recipe": "full_rank.yaml", "runs": ["x"]}}},
        ["members.full_rank", "either"],
    ),
    "a rate for what is not trained": (
        {"members": {"full_rank": "full_rank.yaml", "b": {"runs": ["x"], "learning_rate": 1}}},
        ["members.b", "learning_rate must be left out"],
    ),
    "a folder that is not there": (
        {"members": {"full_rank": "full_rank.yaml", "b": {"runs": ["./nothing"]}}},
        ["members.b.runs", "nothing"],
    ),
    "a folder without checkpoints": (
        {"members": {"full_rank": "full_rank.yaml", "b": {"runs": ["empty"]}}},
        ["members.b.runs", "empty", "no complete checkpoint"],
    ),
    "a sequence file that is not there": (
        {"measure": {"evaluation_set": "none.safetensors"}},
        ["measure.evaluation_set", "none.safetensors"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_is_one_line_before_anything_runs(case, write_study, tmp_path, monkeypatch):
    # lm-eval's own thousands of tasks take seconds to list.
    monkeypatch.setattr("hf_lowrank.downstream.catalogue._all_tasks", lambda: SimpleNamespace(task_index={}))
    changes, parts = CASES[case]
    (tmp_path / "empty").mkdir()
    study = write_study(**changes)
    message = refused(study, tmp_path)
    assert message.startswith(str(tmp_path))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("case", ["a missing recipe", "an unknown baseline", "another size"])
def test_the_command_prints_the_line_and_ends_with_status_2(case, write_study, tmp_path, capsys):
    changes, parts = CASES[case]
    with pytest.raises(SystemExit) as stop:
        main(["study", str(write_study(**changes)), "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("hf-lowrank: ")
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_not_a_study(tmp_path):
    (tmp_path / "galore.yaml").write_text("name: a\nmethod: {name: galore}\n")
    with pytest.raises(UserError, match=r"galore\.yaml: must be a study, got a recipe; run it with hf-lowrank train"):
        run_study(tmp_path / "galore.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ("measure", ["stage measure needs trained runs", "add train"]),
        ("evaluate", ["stage evaluate", "add train"]),
        ("report", ["stage report", "add train"]),
        ("claims", ["stage claims", "add train"]),
        ("predict,report", ["stage predict", "add train"]),
        ("train,claims", ["stage claims needs measurements.jsonl", "add measure"]),
        ("train,measure,predict", ["stage predict needs downstream.jsonl", "add evaluate"]),
        ("sweep", ["stage sweep needs a sweep block"]),
        ("trian", ["unknown stage 'trian'", "did you mean 'train'?"]),
        (",", ["--stages must name some of"]),
    ],
)
def test_a_stage_without_its_input(stages, parts, write_study, tmp_path):
    message = refused(write_study(), tmp_path, stages=stages)
    for part in parts:
        assert part in message


def test_training_without_the_sweep_that_gives_its_rate(write_study, tmp_path):
    study = write_study(sweep={"learning_rate": [1e-3, 2e-3]})
    assert "stage train needs the sweep's choice for full_rank; add sweep" in refused(study, tmp_path, stages="train")


def test_jobs_and_threads_are_at_least_one(write_study, tmp_path):
    assert "--jobs must be at least 1" in refused(write_study(), tmp_path, jobs=0)
    assert "--threads must be at least 1" in refused(write_study(), tmp_path, threads=0)


def test_a_missing_study_and_an_invalid_one(tmp_path):
    assert "no such study file" in refused(tmp_path / "none.yaml", tmp_path)
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "must be a mapping" in refused(tmp_path / "list.yaml", tmp_path)
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    assert "duplicate key 'name' in line 2" in refused(tmp_path / "twice.yaml", tmp_path)


def test_a_run_directory_of_another_recipe(write_study, tmp_path):
    study = write_study()
    folder = tmp_path / "out" / "runs" / "galore-seed1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": 7}))
    message = refused(study, tmp_path)
    assert str(folder) in message
    assert "belongs to another recipe" in message


def external_run(folder, **changes):
    torch.manual_seed(0)
    shape = {**{key: value for key, value in MODEL.items() if key != "architecture"}, "vocab_size": 300, **changes}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "checkpoint-3")
    return folder


def test_an_external_runs_size_and_baseline(write_study, tmp_path):
    external_run(tmp_path / "theirs", intermediate_size=40)
    members = {"full_rank": "full_rank.yaml", "theirs": {"runs": ["theirs"]}}
    message = refused(write_study(members=members), tmp_path)
    assert "members.theirs.runs" in message
    assert "model.intermediate_size 40, full_rank has 24" in message
    message = refused(write_study(members=members, baseline="theirs"), tmp_path)
    assert "model.intermediate_size 40, full_rank has 24" in message


def test_external_runs_alone_need_a_text(write_study, tmp_path):
    external_run(tmp_path / "theirs")
    study = write_study(
        members={"theirs": {"runs": ["theirs"]}}, baseline="theirs", evaluate={"tasks": "lambada_openai"}
    )
    message = refused(study, tmp_path, stages="measure")
    assert "evaluation_text must name a text" in message


def test_an_external_run_named_twice(write_study, tmp_path):
    external_run(tmp_path / "theirs")
    study = write_study(members={"theirs": {"runs": ["theirs", "./theirs"]}}, baseline="theirs")
    assert "must name each run once" in refused(study, tmp_path)


def test_a_baseline_with_fewer_runs_than_a_member(write_study, tmp_path):
    for name in ("one", "two", "three", "four", "five"):
        external_run(tmp_path / name)
    members = {"base": {"runs": ["one", "two"]}, "theirs": {"runs": ["three", "four", "five"]}}
    message = refused(write_study(members=members, baseline="base"), tmp_path)
    assert "baseline must have one run or as many as each member, base has 2 and theirs has 3" in message


def test_a_study_extends_another(tmp_path, corpus):
    """Paths are relative to the file that names them, also in the extended study."""
    (tmp_path / "below").mkdir()
    for method in ("full_rank", "galore"):
        write_recipe(tmp_path / "below", corpus, method)
    (tmp_path / "below" / "base.yaml").write_text(yaml.safe_dump(study_data()))
    (tmp_path / "study.yaml").write_text("extends: below/base.yaml\nname: upper\nseeds: [4]\n")
    result = run_study(tmp_path / "study.yaml", output=tmp_path / "out", dry_run=True)
    assert result.plan.name == "upper"
    assert [member.runs for member in result.plan.members] == [1, 1]


def test_a_study_that_extends_a_swept_one_can_leave_the_sweep_out(tmp_path, corpus):
    for method in ("full_rank", "galore"):
        write_recipe(tmp_path, corpus, method)
    swept = study_data() | {"sweep": {"over": {"training.learning_rate": [1e-3, 2e-3]}}}
    name = swept["baseline"]
    swept["members"] = {
        key: ({"recipe": one} if isinstance(one, str) else one) for key, one in swept["members"].items()
    }
    swept["members"][name]["sweep"] = {"training.adam_beta2": [0.99]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(swept))
    (tmp_path / "study.yaml").write_text(f"extends: base.yaml\nsweep: null\nmembers: {{{name}: {{sweep: null}}}}\n")
    plan = run_study(tmp_path / "study.yaml", output=tmp_path / "out", dry_run=True).plan
    assert plan.stages[0].stage == "train"


def test_a_study_is_started_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(tmp_path / "study.yaml", tmp_path)
