"""The recipes that come with the package: complete, loadable, and saying what was published.

The numbers below were typed from the papers and their public scripts, not read from the YAML files.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from hf_lowrank.methods import METHODS
from hf_lowrank.storage.parsing import parse_yaml
from hf_lowrank.study.spec import load_study
from hf_lowrank.training import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
TREES = ("nano", "llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b")
BUILT_IN = (
    "full_rank", "low_rank", "galore", "q_galore", "fira", "apollo", "apollo_mini", "frugal", "muon", "normuon",
    "dion", "dion2", "ldadam", "cosmos", "relora", "cola", "sltrain", "structured", "sst",
)  # fmt: skip

# hidden, MLP, layers, heads; steps, checkpoint every
SIZES = {
    "llama_60m": (512, 1376, 8, 8, 10_000, 1_000),
    "llama_130m": (768, 2048, 12, 12, 20_000, 2_000),
    "llama_350m": (1024, 2736, 24, 16, 60_000, 6_000),
    "llama_1b": (2048, 5461, 24, 32, 100_000, 10_000),
    "llama_7b": (4096, 11008, 32, 32, 150_000, 15_000),
}
# Millions of parameters as SLTrain's table (arXiv 2406.02214) has them for the dense model, the product and its own.
MILLIONS = {
    "llama_60m": (58, 43, 44),
    "llama_130m": (134, 94, 97),
    "llama_350m": (368, 185, 194),
    "llama_1b": (1339, 609, 646),
    "llama_7b": (6738, 2821, 3145),
}
# learning rate, then what else was published, for the five sizes in order
PUBLISHED = {
    "full_rank": {"learning_rate": (1e-3, 1e-3, 1e-3, 5e-4, None), "weight_decay": (0.0,) * 5},
    "galore": {
        "learning_rate": (1e-2, 1e-2, 1e-2, 1e-2, 5e-3),
        "rank": (128, 256, 256, 512, 1024),
        "scale": (0.25,) * 5,
        "update_proj_gap": (200, 200, 200, 200, 500),
        "weight_decay": (0.0,) * 5,
        "max_grad_norm": (None, None, None, None, 1.0),
    },
    "q_galore": {
        "learning_rate": (1.5e-2, 1.5e-2, 1e-2, 1e-2, 4e-3),
        "rank": (128, 256, 256, 1024, 1024),
        "scale": (0.25,) * 5,
        "update_proj_gap": (200, 200, 200, 200, 500),
        "weight_decay": (0.0,) * 5,
        "projection_bits": (4,) * 5,
        "state_dtype": ("8bit",) * 5,
        "weight_dtype": ("8bit",) * 5,
        "lazy": (True,) * 5,
        "max_grad_norm": (0.0, 0.0, 0.0, 0.0, 1.0),
    },
    "fira": {
        "learning_rate": (1e-2, 1e-2, 1e-2, 1e-2, 5e-3),
        "rank": (128, 256, 256, 512, None),
        "scale": (0.25, 0.25, 0.25, 0.0625, 0.0625),
        "update_proj_gap": (200, 200, 200, 200, 500),
        "max_grad_norm": (1.0,) * 5,
    },
    "apollo": {
        "learning_rate": (1e-2, 1e-2, 1e-2, 1e-2, None),
        "rank": (128, 192, 256, 512, 256),
        "scale": (1.0,) * 5,
        "update_proj_gap": (200,) * 5,
        "scale_type": ("channel",) * 5,
        "subspace": ("gaussian",) * 5,
    },
    "apollo_mini": {
        "learning_rate": (1e-2,) * 5,
        "rank": (1,) * 5,
        "scale": (128.0,) * 5,
        "update_proj_gap": (200,) * 5,
        "scale_type": ("tensor",) * 5,
    },
    "cola": {
        "learning_rate": (6e-3, 3e-3, 3e-3, 2e-3, 1e-3),
        "r": (128, 256, 256, 512, 1024),
        "weight_decay": (0.01,) * 5,
        "max_grad_norm": (0.5,) * 5,
    },
    "sltrain": {
        "learning_rate": (2e-3, 3e-3, 2e-3, 3e-3, 3e-3),
        "r": (128, 256, 256, 512, 1024),
        "sparsity": (0.03, 0.03, 0.03, 0.03, 0.05),
        "lora_alpha": (32, 16, 16, 8, 8),
        "weight_decay": (0.0,) * 5,
    },
    "relora": {
        "learning_rate": (1e-3, 1e-3, 5e-4, None, None),
        "r": (128, 256, 256, 512, 1024),
        "restart_every": (1000, 5000, 5000, None, None),
        "restart_warmup_steps": (100, 100, 200, None, None),
        "prune_ratio": (0.99,) * 5,
        "max_grad_norm": (1.0,) * 5,
        "lora_alpha": (32,) * 5,
    },
    **{
        name: {"weight_decay": (0.01,) * 5, "momentum": (0.95,) * 5, "adjust_lr_fn": ("spectral",) * 5}
        for name in ("normuon", "dion", "dion2")
    },
    "ldadam": {
        "learning_rate": (1e-3,) * 5,
        "adam_beta1": (0.908,) * 5,
        "adam_beta2": (0.99,) * 5,
        "rho": (0.908,) * 5,
        "error_feedback": (True,) * 5,
    },
    "cosmos": {
        "learning_rate": (2e-3,) * 5,
        "adam_beta1": (0.95,) * 5,
        "adam_beta2": (0.95,) * 5,
        "weight_decay": (0.1,) * 5,
        "lr_ratio": (0.2,) * 5,
        "rank": (64,) * 5,
        "gamma": (0.2,) * 5,
    },
    "low_rank": {"r": (128, 256, 256, 512, 1024)},
    "frugal": {"learning_rate": (1e-3,) * 5, "update_proj_gap": (200,) * 5, "rank": (128, 192, 256, 512, 1024)},
}


@cache
def recipe(tree, method):
    return load_recipe(RECIPES / tree / f"{method}.yaml")


def parameters(tree, method):
    one = recipe(tree, method)
    with torch.device("meta"):
        model = one.method.build_model(one.config(), one.settings, 0)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tree", TREES)
def test_every_method_is_there_on_equal_footing(tree):
    assert set(BUILT_IN) <= set(METHODS)
    assert {path.stem for path in (RECIPES / tree).glob("[!_]*.yaml")} == set(BUILT_IN)
    shared = ("max_steps", "save_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16",
              "lr_scheduler_type", "lr_scheduler_kwargs")  # fmt: skip
    base = recipe(tree, "full_rank")
    for name in BUILT_IN:
        one = recipe(tree, name)
        assert one.method.name == name
        assert one.name == f"{tree}-{name}"
        assert (one.model, one.data, one.seed) == (base.model, base.data, base.seed)
        assert [one.training.get(key) for key in shared] == [base.training.get(key) for key in shared]


@pytest.mark.parametrize("tree", SIZES)
def test_the_published_ground(tree):
    hidden, mlp, layers, heads, steps, every = SIZES[tree]
    for name in BUILT_IN:
        one = recipe(tree, name)
        assert [
            one.model[key]
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        ] == [hidden, mlp, layers, heads, 32_000]
        assert (one.data.dataset, one.data.subset, one.data.tokenizer) == ("allenai/c4", "en", "google-t5/t5-base")
        assert (one.data.sequence_length, one.data.shape) == (256, "documents")
        args = one.arguments("nowhere")
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 512
        assert (args.max_steps, args.save_steps, args.bf16) == (steps, every, True)
        assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
        # ReLoRA's first warm-up ends with the first restart at the latest.
        warmup = min(steps // 10, getattr(one.settings, "restart_every", steps))
        assert args.warmup_steps == warmup


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings(name):
    for key, values in PUBLISHED[name].items():
        for tree, value in zip(SIZES, values, strict=True):
            one = recipe(tree, name)
            if value is not None:
                found = getattr(one.settings, key) if hasattr(one.settings, key) else one.training[key]
                assert found == value, (tree, key)


@pytest.mark.parametrize("tree", SIZES)
def test_sizes_are_the_published_ones(tree):
    counts = [parameters(tree, name) for name in ("full_rank", "low_rank", "sltrain")]
    assert [round(count / 1e6) for count in counts] == list(MILLIONS[tree])
    hidden, mlp, layers, *_ = SIZES[tree]
    rank = 256 if tree in ("llama_130m", "llama_350m") else hidden // 4
    beside = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
    assert counts[0] == beside + layers * (4 * hidden**2 + 3 * hidden * mlp)
    assert counts[1] == beside + layers * rank * (8 * hidden + 3 * (hidden + mlp))
    assert parameters(tree, "cola") == counts[1]


@pytest.mark.parametrize("tree", SIZES)
@pytest.mark.parametrize("name", ["normuon", "dion", "dion2"])
def test_matrices_get_the_published_rate_and_the_rest_that_of_full_rank(name, tree):
    one = recipe(tree, name)
    assert one.training["learning_rate"] == recipe(tree, "full_rank").training["learning_rate"]
    assert one.training["learning_rate"] * one.settings.matrix_lr_scale == pytest.approx(1e-2, rel=1e-12)


def test_where_nothing_was_published_the_file_says_so():
    for name, tree in (("muon", "llama_60m"), ("normuon", "llama_60m"), ("dion", "llama_1b"), ("dion2", "llama_7b"),
                       ("ldadam", "llama_350m"), ("cosmos", "llama_130m"),
                       ("low_rank", "llama_350m"), ("relora", "llama_1b"),
                       ("full_rank", "llama_7b"), ("frugal", "llama_7b"), ("fira", "llama_7b")):  # fmt: skip
        assert (RECIPES / tree / f"{name}.yaml").read_text().startswith("# ")


# -- accelerate


@pytest.mark.parametrize("name", ["one_device", "ddp", "fsdp2"])
def test_accelerate_takes_its_files(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = RECIPES / "accelerate" / f"{name}.yaml"
    named = [] if name == "one_device" else ["--num_processes", "4"]
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), *named, "x.py"])
    )
    assert args.num_processes == (4 if named else 1)
    assert (bool(args.multi_gpu), bool(args.use_fsdp)) == (name == "ddp", name == "fsdp2")
    if name == "fsdp2":
        assert args.fsdp_version == 2
    content = yaml.safe_load(file.read_text())
    assert not {"gpu_ids", "main_process_ip", "main_process_port", "machine_rank"} & set(content)
    assert content.get("num_processes", 1) == 1


@pytest.fixture
def tiny_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"words that follow each other, {number} times and again. " * 60)
    plain = {
        "method": {"name": "galore", "rank": 4, "update_proj_gap": 2},
        "model": {"architecture": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "max_position_embeddings": 64},
        "data": {"source": "files", "train_files": ["[012].txt"], "held_out_files": ["3.txt"], "sequence_length": 16,
                 "vocabulary_size": 300, "evaluation_sequences": 4},
        "training": {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 3},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def pretrain_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    runpy.run_path(str(RECIPES / "pretrain.py"), run_name="__main__")


def test_the_script_trains_and_refuses_in_one_line(tiny_recipe, tmp_path, monkeypatch, capsys):
    pretrain_script(monkeypatch, tiny_recipe, "--set", "method.rank=2", "--seed", 5, "--output", tmp_path / "run")
    assert "run directory" in capsys.readouterr().out
    resolved = parse_yaml((tmp_path / "run/recipe.yaml").read_text())
    assert (resolved["seed"], resolved["method"]["rank"]) == (5, 2)
    assert (tmp_path / "run/checkpoint-3/model.safetensors").is_file()
    for environment, arguments, said in (
        ("false", ("nowhere.yaml",), "no such recipe"),
        ("true", (tiny_recipe,), "accelerate shards on accelerators only"),
    ):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", environment)
        monkeypatch.setenv("FSDP_VERSION", "2")
        with pytest.raises(SystemExit) as stop:
            pretrain_script(monkeypatch, *arguments, "--output", tmp_path / "none")
        line = capsys.readouterr().err
        assert stop.value.code == 2
        assert said in line
        assert line.count("\n") == 1
        assert not list((tmp_path / "none").glob("checkpoint-[1-9]*"))


@pytest.mark.drill
def test_two_processes_of_accelerate_learn_what_one_does(tiny_recipe, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    pretrain_script(monkeypatch, tiny_recipe, "--output", tmp_path / "one")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate/ddp.yaml"),
        "--num_processes", "2", str(RECIPES / "pretrain.py"), str(tiny_recipe),
        "--set", "training.per_device_train_batch_size=2", "--output", str(tmp_path / "two"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "checkpoint-3/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)


# -- studies

TUNED = [
    "full_rank_two_rates",
    "full_rank",
    "low_rank",
    "galore",
    "fira",
    "apollo",
    "relora",
    "cola",
    "sltrain",
    "muon",
]
ABLATIONS = [
    "low_rank", "low_rank_restarts", "sltrain", "sltrain_restarts", "structured", "structured_no_guide",
    "ldadam", "ldadam_no_feedback", "galore_lazy", "galore_fixed",
]  # fmt: skip
# What a member's name adds to that of its recipe.
VARIANT = re.compile(r"_(two_rates|no_feedback|restarts|no_guide|lazy|fixed)$")
STUDIES = {
    "nano": ("nano", TUNED, 5),
    "pico": ("nano", TUNED, 3),
    "quickstart": ("nano", ["full_rank", "galore", "fira", "relora", "cola", "sltrain"], 1),
    "ablations": ("nano", ABLATIONS, 3),
    "methods": ("nano", list(BUILT_IN), 1),
    "paper_60m": ("llama_60m", list(BUILT_IN), 3),
    "paper_130m": ("llama_130m", list(BUILT_IN), 3),
    "paper_350m": ("llama_350m", list(BUILT_IN), 3),
}


def test_no_study_is_forgotten():
    assert {path.stem for path in (RECIPES / "studies").glob("*.yaml")} == {*STUDIES, "pythia"}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_name_recipes_that_are_there(name):
    tree, members, seeds = STUDIES[name]
    study = load_study(RECIPES / "studies" / f"{name}.yaml").settings
    assert list(study.members) == members
    for member, settings in study.members.items():
        file = f"{VARIANT.sub('', member)}.yaml"
        assert Path(settings.recipe).resolve() == (RECIPES / tree / file).resolve()
    assert (study.name, study.baseline) == (name, members[0])
    assert study.stages == (["train", "measure", "claims", "report"] if name == "pico" else None)
    assert study.seeds == list(range(seeds))
    overrides = dict(text.split("=") for text in study.overrides)
    every = int(overrides.get("training.save_steps", recipe(tree, "full_rank").training["save_steps"]))
    steps = study.evaluate.steps
    assert study.stages or steps in (None, "last") or all(step % every == 0 for step in steps)
    assert study.measure.preset == ("paper" if name.startswith("paper") else "fast")
    assert (study.jobs, study.threads) == ((1, None) if name.startswith("paper") else (2, 1))


@pytest.mark.parametrize(("name", "width", "seeds", "least"), [("nano", 128, 5, 0.6), ("pico", 64, 3, 20)])
def test_studies_that_answer_train_every_member_alike(name, width, seeds, least):
    study = load_study(RECIPES / f"studies/{name}.yaml").settings
    one = load_recipe(RECIPES / "nano/full_rank.yaml", study.overrides)
    one = load_recipe(
        RECIPES / "nano/full_rank.yaml", [*study.overrides, f"model.vocab_size={one.data.vocabulary_size}"]
    )
    with torch.device("meta"):
        model = one.method.build_model(one.config(), one.settings, 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    steps, every = one.training["max_steps"], one.training["save_steps"]
    tokens = steps * one.training["per_device_train_batch_size"] * one.data.sequence_length
    assert len(study.seeds) == seeds
    assert one.model["hidden_size"] == width
    assert tokens / parameters >= least
    assert steps // every == 10
    assert (len(study.measure.steps), study.measure.steps[-1]) == (4, steps)
    scored = study.evaluate.steps if study.stages is None else []
    assert all(step % every == 0 for step in [*scored, *study.measure.steps])
    if scored:
        assert (len(scored), scored[-1]) == (5, steps)
    assert study.measure.pairs == "last"


def test_the_nano_study_tunes_every_member_alike():
    study = load_study(RECIPES / "studies/nano.yaml").settings
    assert study.sweep.seed not in study.seeds
    assert (study.sweep.trials, study.sweep.steps) == (8, round(400 / 3))
    for member in study.members.values():
        ranges = study.sweep.ranges(member)
        assert len(ranges) == 2
        assert "training.learning_rate" in ranges
        assert all(isinstance(given, dict) for given in ranges.values())  # no list of two, whose winner is at an edge
    swept = {path.stem for path in (RECIPES / "studies").glob("*.yaml") if load_study(path).settings.sweep is not None}
    assert swept == {"nano"}


def test_the_pico_study_takes_the_winners_of_the_nano_sweep():
    trials = json.loads((RECIPES.parent / "benchmarks/results/nano_sweep.json").read_text())["trials"]
    winners = {trial["member"]: trial["values"] for trial in trials if trial["chosen"]}
    study = load_study(RECIPES / "studies/pico.yaml").settings
    assert set(winners) == set(study.members)
    for name, member in study.members.items():
        overrides = dict(text.split("=") for text in member.overrides)
        assert {key: float(overrides[key]) for key in winners[name]} == winners[name]


def test_strangers_are_measured_without_training():
    study = load_study(RECIPES / "studies/pythia.yaml").settings
    assert not {"sweep", "train"} & set(study.stages)
    for member in study.members.values():
        assert (member.recipe, member.revisions) == (None, "step*")
        assert all(run.startswith("EleutherAI/pythia-70m") for run in member.runs)
    assert Path(study.evaluation_text).is_file()
