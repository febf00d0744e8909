"""Checkpoints made with plain transformers, without a recipe, as a member of a study and as its baseline."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.errors import UserError
from hf_lowrank.runs.measurements import read_measurements
from hf_lowrank.runs.scores import read_scores
from hf_lowrank.study import run_study
from hf_lowrank.training import load_recipe
from hf_lowrank.training.corpus import corpus_tokenizer
from hf_lowrank.training.sequences import train_tokenizer
from tests.study.tiny import MODEL, make_text, write_recipe

METRICS = {"metrics": "loss,weight_stable_rank,method_barrier", "settings": {"sequences": 4, "steps": 3}}


@pytest.fixture
def tokenizer(tmp_path, corpus):
    return corpus_tokenizer(load_recipe(write_recipe(tmp_path, corpus, "full_rank")).data)


@pytest.fixture
def plain_run(tmp_path, tokenizer):
    """Makes a folder of checkpoints like those of a script with plain transformers."""

    def make(name, seed=0, steps=(0, 6, 12), with_tokenizer=None):
        torch.manual_seed(seed)
        shape = {key: value for key, value in MODEL.items() if key != "architecture"}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer)))
        for step in steps:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            model.save_pretrained(tmp_path / name / f"checkpoint-{step}")
            if with_tokenizer is not None:
                with_tokenizer.save_pretrained(tmp_path / name / f"checkpoint-{step}")
        return tmp_path / name

    return make


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_external_runs_are_a_member(plain_run, write_study, tmp_path, run, tokenizer):
    theirs = [plain_run("one", 1), plain_run("two", 2, with_tokenizer=tokenizer)]
    before = [contents(folder) for folder in theirs]
    study = write_study(
        members={"full_rank": "full_rank.yaml", "theirs": {"runs": ["one", str(theirs[1])], "method": "plain"}},
        measure=METRICS,
    )
    out = tmp_path / "out"
    result, _ = run(study, output=out)
    assert result.failures == []
    assert [contents(folder) for folder in theirs] == before
    for index in (0, 1):
        rows = read_measurements(out / "runs" / f"theirs-{index}")
        assert {row.method for row in rows} == {"plain"}
        barriers = [row for row in rows if row.metric == "method_barrier"]
        assert {(row.step, row.baseline) for row in barriers} == {(s, f"full_rank-seed{index}") for s in (0, 6, 12)}
        assert all(row.value == row.value for row in barriers)
        ours = {
            row.settings["evaluation"]
            for row in read_measurements(out / "runs" / "full_rank-seed0")
            if row.metric == "loss"
        }
        assert {row.settings["evaluation"] for row in rows if row.metric == "loss"} == ours
        assert read_scores(out / "runs" / f"theirs-{index}")[0].n == 8
    assert "plain" in result.page.read_text()
    assert run(study, output=out, dry_run=True)[0].plan.left == 1  # the page


def test_an_external_run_is_the_baseline(plain_run, write_study, tmp_path, run, tokenizer):
    folder = plain_run("theirs", with_tokenizer=tokenizer)
    before = contents(folder)
    study = write_study(
        members={"theirs": {"runs": ["theirs"]}, "galore": "galore.yaml"}, baseline="theirs", measure=METRICS
    )
    out = tmp_path / "out"
    result, _ = run(study, output=out, jobs=2)
    assert result.failures == []
    assert contents(folder) == before
    for seed in (0, 1):
        rows = read_measurements(out / "runs" / f"galore-seed{seed}")
        barriers = {row.baseline: row.value for row in rows if row.metric == "method_barrier" and row.step == 12}
        assert list(barriers) == ["theirs-0"]
        assert barriers["theirs-0"] == barriers["theirs-0"]
    assert not [row for row in read_measurements(out / "runs" / "theirs-0") if row.failed]


def test_external_runs_alone_on_a_text(plain_run, write_study, tmp_path, run, tokenizer):
    for seed, name in enumerate(("one", "two")):
        plain_run(name, seed, with_tokenizer=tokenizer)
    (tmp_path / "text.md").write_text(make_text(7, lines=100))
    study = write_study(
        members={"one": {"runs": ["one"]}, "two": {"runs": ["two"]}},
        baseline="one",
        evaluate=None,
        evaluation_text="text.md",
        measure=METRICS,
        seeds=[0],
    )
    result, said = run(study, output=tmp_path / "out", jobs=2)
    assert result.failures == []
    assert any(line.startswith("skipped evaluate: pylib_") for line in said)
    rows = read_measurements(tmp_path / "out" / "runs" / "two-0")
    losses = [row for row in rows if row.metric == "loss"]
    assert [row.step for row in losses] == [0, 6, 12]
    assert all(4 < row.value < 8 for row in losses)  # untrained: about the logarithm of 300
    assert {row.baseline for row in rows if row.metric == "method_barrier"} == {"one-0"}


def test_another_tokenizer_is_refused_by_name(plain_run, write_study, tmp_path, tokenizer):
    other = train_tokenizer([make_text(50).upper()], len(tokenizer))
    plain_run("theirs", with_tokenizer=other)
    study = write_study(members={"full_rank": "full_rank.yaml", "theirs": {"runs": ["theirs"]}})
    with pytest.raises(UserError, match=r"members\.theirs\.runs .*theirs has another tokenizer than full_rank"):
        run_study(study, output=tmp_path / "out", fork_here=True)
    assert not (tmp_path / "out").exists()


def test_steps_that_an_external_run_lacks(plain_run, write_study, tmp_path):
    plain_run("theirs", steps=(0, 12))
    study = write_study(
        members={"full_rank": "full_rank.yaml", "theirs": {"runs": ["theirs"]}}, measure={**METRICS, "steps": [6, 12]}
    )
    with pytest.raises(UserError, match=r"measure\.steps does not fit theirs: no checkpoint of step 6"):
        run_study(study, output=tmp_path / "out", fork_here=True)
