"""The files that the package reads: valid ones, how they are written, and what reads them."""

import json

import torch
from safetensors.torch import save

from hf_lowrank.storage.parsing import parse_json
from tests.fuzz import mutations
from tests.fuzz.side_files import SIDE_FILES

MODEL = {
    "architecture": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
DATA = {"source": "files", "train_files": ["text.txt"], "sequence_length": 8, "vocabulary_size": 300}
TRAINING = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "warmup_steps": 1,
}
METHODS = [
    {"name": "full_rank"},
    {"name": "galore", "rank": 4, "update_proj_gap": 2, "scale": 0.25},
    {"name": "cola", "r": 4},
    {"name": "sltrain", "r": 4, "sparsity": 0.03},
    {"name": "relora", "r": 4, "restart_every": 2, "restart_warmup_steps": 1},
    {"name": "sst", "r": 4, "redraw_every": 2, "redraw_warmup_steps": 1},
]
RECIPES = [{"seed": 0, "method": m, "model": MODEL, "data": DATA, "training": TRAINING} for m in METHODS]


def read_recipe(folder, content):
    from hf_lowrank.training import load_recipe

    (folder / "text.txt").write_text("some text " * 50)
    (folder / "recipe.yaml").write_bytes(content)
    load_recipe(folder / "recipe.yaml")


ADAPTERS = [
    {"peft_type": "COLA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"peft_type": "SLTRAIN", "r": 4, "sparsity": 0.1, "target_modules": "all-linear"},
    {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
    {"peft_type": "STRUCTURED", "r": 4, "blocks": 2, "target_modules": "all-linear"},
    {"peft_type": "SST", "r": 4, "target_modules": "all-linear"},
]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = [{"model_type": "lowrank", "base_config": CONFIG, "adapter_config": adapter} for adapter in ADAPTERS]


def read_config(folder, content):
    from hf_lowrank.runs.trajectory import Trajectory

    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_bytes(content)
    (checkpoint / "model.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    assert Trajectory(folder).targets is not None


def read_adapter(folder, content):
    from hf_lowrank.adapters.configuration import adapter_from_dict

    try:
        entries = parse_json(content)
    except ValueError:
        return
    if isinstance(entries, dict):
        adapter_from_dict(entries)


def read_weights(folder, content):
    from hf_lowrank.runs.trajectory import Trajectory

    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    (checkpoint / "model.safetensors").write_bytes(content)
    trajectory = Trajectory(folder)
    for name in trajectory.targets:
        trajectory.dense_weight(1, name)
    trajectory.model(1)


def weights():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    state = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).state_dict()
    return [save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"})]


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": {"weight": "model-00001-of-00001.safetensors"},
}


def read_index(folder, content):
    from hf_lowrank.runs.trajectory import Trajectory

    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    (checkpoint / "model.safetensors.index.json").write_bytes(content)
    (checkpoint / "model-00001-of-00001.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    trajectory = Trajectory(folder)
    for name in trajectory.tensor_names(1):
        trajectory.tensor(1, name)


def evaluation_sets():
    ids, mask = torch.arange(12, dtype=torch.int32).view(3, 4), torch.ones(3, 4, dtype=torch.uint8)
    plain = save({"input_ids": ids, "attention_mask": mask})
    foreign = save({"input_ids": ids.float(), "attention_mask": torch.ones(2, 4)}, metadata={"fingerprint": "0"})
    return [plain, foreign, save({"input_ids": ids}), save({"input_ids": ids, "attention_mask": mask[0]})]


def read_evaluation(folder, content):
    from hf_lowrank.runs.evaluation_set import EvaluationSet

    (folder / "evaluation.safetensors").write_bytes(content)
    EvaluationSet.load(folder)


MEASUREMENT = {
    "run": "galore",
    "method": "galore",
    "seed": 0,
    "step": 100,
    "metric": "random_sharpness",
    "scope": "model",
    "value": 0.25,
    "ci_low": 0.2,
    "ci_high": 0.3,
    "n": 10,
    "baseline": None,
    "settings": {"t": 0.1, "draws": 10},
    "reason": None,
}
SCORE = {
    "run": "galore",
    "method": "galore",
    "seed": 0,
    "step": 100,
    "task": "pylib_syntax",
    "metric": "acc",
    "value": 0.75,
    "stderr": 0.01,
    "ci_low": 0.7,
    "ci_high": 0.8,
    "n": 700,
    "chance": 0.5,
    "higher_is_better": True,
    "group": None,
    "task_version": "1",
    "lm_eval_version": "0.4.13",
    "items": "abc",
}
FACTS = {"parameters": 100, "training_seconds": 3.5, "tokens_seen": 800, "memory": {"measured_peak": 10}}
STATE = {"global_step": 1, "max_steps": 1, "log_history": [{"step": 1, "eval_loss": 3.5}, {"step": 1, "loss": 3.6}]}


def lines(tree):
    """A file of two lines, the first always whole."""
    return mutations.as_json(MEASUREMENT) + b"\n" + mutations.as_json(tree) + b"\n"


def score_lines(tree):
    return mutations.as_json(SCORE) + b"\n" + mutations.as_json(tree) + b"\n"


def run_folder(folder):
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    (checkpoint / "model.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    (checkpoint / "trainer_state.json").write_text(json.dumps(STATE))
    return checkpoint


def show(folder):
    from hf_lowrank.report import terminal_table, write_report

    terminal_table([folder])
    write_report([folder], folder / "report")


def read_measurements(folder, content):
    from hf_lowrank.measuring import runner as measure

    run_folder(folder)
    (folder / "measurements.jsonl").write_bytes(content)
    measure.read_measurements(folder)
    show(folder)


def read_scores(folder, content):
    from hf_lowrank.downstream.figures import score_table
    from hf_lowrank.runs.scores import read_scores

    run_folder(folder)
    (folder / "downstream.jsonl").write_bytes(content)
    score_table(read_scores(folder))
    show(folder)


def read_facts(folder, content):
    run_folder(folder)
    (folder / "facts.json").write_bytes(content)
    show(folder)


def read_state(folder, content):
    from hf_lowrank.runs.checkpoints import last_resumable_checkpoint
    from hf_lowrank.runs.trajectory import Trajectory

    (run_folder(folder) / "trainer_state.json").write_bytes(content)
    last_resumable_checkpoint(folder)
    Trajectory(folder).log_history()
    show(folder)


def read_settings(folder, content):
    from hf_lowrank.runs.measure_settings import resolve_settings

    (folder / "settings.yaml").write_bytes(content)
    resolve_settings("fast", folder / "settings.yaml")


SETTINGS = [{"random": {"draws": 4}, "pca": {"count": 3, "basis": "weights"}, "batch_tokens": 8, "steps": 2}]

STUDY = {
    "name": "tiny",
    "baseline": "full_rank",
    "members": {
        "full_rank": "recipe.yaml",
        "galore": {"recipe": "recipe.yaml", "learning_rate": 1e-2, "set": ["method.name=galore", "method.rank=4"]},
        "theirs": {"runs": ["."], "method": "theirs"},
    },
    "seeds": [0, 1],
    "set": ["training.max_steps=2"],
    "sweep": {"learning_rate": [1e-3, 2e-3], "seed": 7},
    "measure": {"steps": "last", "settings": {"sequences": 4}, "pairs": "last"},
    "evaluate": {"steps": "last", "limit": 10},
    "predict": {"permutations": 19},
    "jobs": 1,
    "threads": 1,
}


def read_study(folder, content):
    from hf_lowrank.study.spec import load_study

    run_folder(folder)
    (folder / "text.txt").write_text("some text " * 50)
    (folder / "recipe.yaml").write_bytes(mutations.as_yaml(RECIPES[0]))
    (folder / "study.yaml").write_bytes(content)
    load_study(folder / "study.yaml")


RESULTS = {
    "claims.json": {
        "alpha": 0.05,
        "claims": [
            {
                "id": "random_sharpness",
                "statement": "Full-rank is sharper.",
                "verdict": "reproduced",
                "effect": 0.5,
                "ci_low": 0.2,
                "ci_high": 0.8,
                "unit": "ln",
                "p_value": 0.01,
                "n": 5,
                "test": "paired t",
                "reason": "the interval lies above zero",
                "details": [{"label": "galore", "effect": 0.5, "p_value": 0.01, "n": 5}],
            }
        ],
    },
    "sweep.json": [
        {"member": "galore", "learning_rate": 1e-3, "loss": 4.0, "chosen": True, "at_edge": True, "run": "sweep/x"}
    ],
    "failures.json": [{"what": "galore-seed0", "stage": "train", "reason": "no space left"}],
    "prediction.json": {
        "unseen_method": {
            "methods": 8,
            "runs": 8,
            "gain": 0.1,
            "gain_low": 0.0,
            "gain_high": 0.2,
            "p_value": 0.04,
            "observed": [0.1, 0.2],
            "predicted_perplexity": [0.1, 0.1],
            "predicted_both": [0.1, 0.2],
            "rows": [["a", 1], ["a", 2]],
        },
        "unseen_run": {"methods": 8, "runs": 0, "reason": "too few runs"},
    },
}


def read_result(name):
    def read(folder, content):
        from hf_lowrank.report import write_report

        run_folder(folder)
        (folder / name).write_bytes(content)
        write_report([folder], folder / "report", study=folder)

    return read


# Each format: documents as plain data with how they are written, or contents to tear, and what reads them.
FORMATS = {
    "recipe": (RECIPES, mutations.as_yaml, read_recipe),
    "model_config": (CONFIGS, mutations.as_json, read_config),
    "adapter_config": (ADAPTERS, mutations.as_json, read_adapter),
    "weights": (weights, None, read_weights),
    "weights_index": ([INDEX], mutations.as_json, read_index),
    "evaluation_set": (evaluation_sets, None, read_evaluation),
    "measurements": ([MEASUREMENT], lines, read_measurements),
    "scores": ([SCORE], score_lines, read_scores),
    "facts": ([FACTS], mutations.as_json, read_facts),
    "trainer_state": ([STATE], mutations.as_json, read_state),
    "measure_settings": (SETTINGS, mutations.as_yaml, read_settings),
    "study": ([STUDY], mutations.as_yaml, read_study),
    **{name: ([document], mutations.as_json, read_result(name)) for name, document in RESULTS.items()},
    **SIDE_FILES,
}
