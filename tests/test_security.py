"""No code path loads a pickle: not by reading the code, and not when a run full of them is resumed and measured."""

import ast
import io
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import hf_lowrank
from hf_lowrank.errors import UserError
from hf_lowrank.runs.trajectory import Trajectory

PACKAGE = Path(hf_lowrank.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_YAML = {"load", "load_all", "full_load", "unsafe_load"}


def faults_of(source):
    """Lines of `source` that could load a pickle, run code from a file, or trust code from a repository."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            faults += [(node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("torch.load", "load_state_dict_from_url") and options.get("weights_only") != "True":
            faults.append((node.lineno, called))
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            faults.append((node.lineno, called))
        if called in {f"yaml.{name}" for name in UNSAFE_YAML} and options.get("Loader") != "_Loader":
            faults.append((node.lineno, called))
        if options.get("trust_remote_code") == "True" or called in ("eval", "exec", "os.system"):
            faults.append((node.lineno, called))
        if options.get("shell") == "True":
            faults.append((node.lineno, called))
    return faults


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_reading_finds(source):
    assert faults_of(source)


def test_no_code_loads_a_pickle_or_trusts_code():
    found = {
        f"{file.relative_to(PACKAGE)}:{line}": what
        for file in PACKAGE.rglob("*.py")
        for line, what in faults_of(file.read_text(encoding="utf-8"))
    }
    assert not found


class Bomb:
    """A pickle that makes the file it was told of, when it is loaded."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (open, (self.trace, "w"))


def bomb(trace, *, archive):
    """The bomb as a bare pickle, or inside the zip archive that torch.save writes."""
    if not archive:
        return pickle.dumps(Bomb(trace))
    buffer = io.BytesIO()
    torch.save({"state": Bomb(trace)}, buffer)
    return buffer.getvalue()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A recipe and its run, half done."""
    from hf_lowrank.training import load_recipe, pretrain

    monkeypatch.setenv("HF_LOWRANK_CACHE", str(tmp_path / "cache"))
    for name in ("text", "held"):
        (tmp_path / f"{name}.txt").write_text(f"to be or not to be, that is the {name}. " * 400)
    recipe = {
        "method": {"name": "galore", "rank": 4, "update_proj_gap": 2},
        "model": {
            "architecture": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
        "data": {
            "source": "files",
            "train_files": ["text.txt"],
            "held_out_files": ["held.txt"],
            "sequence_length": 16,
            "vocabulary_size": 300,
            "evaluation_sequences": 4,
        },
        "training": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path / "recipe.yaml")
    run = pretrain(loaded, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-2")
    return loaded, run


def test_a_bomb_goes_off_where_it_is_loaded(tmp_path):
    trace = tmp_path / "went off"
    pickle.loads(bomb(trace, archive=False)).close()
    assert trace.exists()


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_resumed_run_loads_no_pickle(finished, tmp_path, name, archive):
    from hf_lowrank.training import pretrain

    recipe, run = finished
    trace = tmp_path / "went off"
    (run / "checkpoint-1" / name).write_bytes(bomb(trace, archive=archive))
    try:
        pretrain(recipe, run)
    except (UserError, pickle.UnpicklingError) as error:
        refused = str(error)
        assert "weights" in refused.lower() or name in refused
    assert not trace.exists()


def test_measuring_and_reporting_load_no_pickle(finished, tmp_path):
    from hf_lowrank.measuring import measure
    from hf_lowrank.report import write_report

    _, run = finished
    trace = tmp_path / "went off"
    checkpoint = run / "checkpoint-1"
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (checkpoint / name).write_bytes(bomb(trace, archive=True))
    loaded = []
    sys.addaudithook(lambda event, arguments: loaded.append(arguments) if event == "pickle.find_class" else None)
    rows = measure([run], steps="last", metrics="perplexity,weight_stable_rank")
    write_report([run], tmp_path / "report")
    assert rows
    assert not loaded
    assert not trace.exists()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint|is a pickle"):
        Trajectory(run).model(1)
    assert not trace.exists()
    assert os.listdir(checkpoint)
