"""Every causal model of transformers that builds small, with five methods: trained, resumed, measured, exported.

    python -m benchmarks.architectures [ARCHITECTURE ...] [--out DIR]

Each pair of an architecture and a method trains 4 steps, loses its last checkpoint and resumes, is measured, and is
exported to its base architecture. Outcomes: `ok`; `refused` before the first step, with the line that names what is
wrong; `not small` for architectures whose parts have sizes that cannot be set here; `failed` for anything else: a
traceback, other bits after the resume, a null row, or a target matrix that does not move and was not named.
"""

import argparse
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks._common import RESULTS, machine, versions
from hf_lowrank import Trajectory
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.measuring import measure
from hf_lowrank.runs.export import export
from hf_lowrank.storage.files import write_text
from hf_lowrank.training import load_recipe, pretrain
from hf_lowrank.training.blocks import architectures, build_config

METHODS: dict[str, dict[str, Any]] = {
    "full_rank": {},
    "galore": {"rank": 4, "update_proj_gap": 2},
    "cola": {"r": 4},
    "sltrain": {"r": 4},
    "relora": {"r": 4, "restart_every": 2, "restart_warmup_steps": 1},
}
# Sizes by the names that architectures have for them; each gets those that its configuration declares.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size", "hidden_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim",), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LARGEST = 5_000_000


def small_model(architecture: str) -> dict[str, Any] | str:
    """The recipe's `model:` block, or why the architecture is not tried."""
    config_class: Any = CONFIG_MAPPING[architecture]
    names = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    aliases = {alias for alias, name in config_class.attribute_map.items() if name in SIZES}
    section = {key: value for key, value in SIZES.items() if key in names - aliases}
    try:
        config = build_config({"architecture": architecture, **section}, vocab_size=300)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 150)}"
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count} parameters" if count > LARGEST else {"architecture": architecture, **section}


def write_corpus(folder: Path) -> dict[str, Any]:
    generator = random.Random(0)
    words = ["".join(generator.choice("abcdefgh") for _ in range(3)) for _ in range(40)]
    for name, count in (("train", 4000), ("held_out", 800)):
        (folder / f"{name}.txt").write_text(" ".join(generator.choice(words) for _ in range(count)))
    files = {"train_files": [str(folder / "train.txt")], "held_out_files": [str(folder / "held_out.txt")]}
    sizes = {"sequence_length": 16, "vocabulary_size": 300, "evaluation_sequences": 8}
    return {"source": "files", **files, **sizes}


def attempt(folder: Path, model: dict[str, Any], method: str, data: dict[str, Any]) -> tuple[str, str]:
    """The outcome of one pair, and what there is to say about it."""
    training = {
        "learning_rate": 0.01,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    recipe = {"method": {"name": method, **METHODS[method]}, "model": model, "data": data, "training": training}
    file, run = folder / "recipe.yaml", folder / "run"
    file.write_text(yaml.safe_dump(recipe))
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            pretrain(load_recipe(file), run)
    except UserError as error:
        return ("failed" if run.exists() else "refused"), str(error)
    whole = load_file(run / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(run / "checkpoint-4")
    pretrain(load_recipe(file), run)
    again = load_file(run / "checkpoint-4" / "model.safetensors")
    if any(not torch.equal(tensor, again[name]) for name, tensor in whole.items()):
        return "failed", "other bits after the resume"
    trajectory = Trajectory(run)
    still = [
        name
        for name in trajectory.targets
        if torch.equal(trajectory.dense_weight(0, name), trajectory.dense_weight(4, name))
    ]
    named = [str(warning.message) for warning in given if "take no part in a prediction" in str(warning.message)]
    if still and not named:
        return "failed", f"{still[0]} and {len(still) - 1} more do not move"
    rows = measure(run, metrics=["loss", "weight_stable_rank"])
    # A router may begin at zero, where a rank is undefined.
    empty = [row for row in rows if row.step == 4 and (row.value is None or row.value != row.value)]
    if empty:
        return "failed", f"{empty[0].metric} of {empty[0].scope}: {empty[0].reason}"
    try:
        AutoModelForCausalLM.from_pretrained(export(run / "checkpoint-4", folder / "exported"))
    except UserError as error:
        return ("ok" if method == "cola" else "failed"), "; ".join([*named, str(error)])
    return "ok", "; ".join(named)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_LOWRANK_CACHE"] = f"{temporary}/cache"
        data = write_corpus(Path(temporary))
        for architecture in args.architectures or architectures():
            model = small_model(architecture)
            if isinstance(model, str):
                results[architecture] = {"small": model}
                print(f"{architecture}: not small: {model}", flush=True)
                continue
            results[architecture] = {}
            for method in args.methods.split(","):
                folder = Path(tempfile.mkdtemp(dir=temporary))
                try:
                    outcome, remark = attempt(folder, model, method, data)
                except Exception as error:
                    outcome, remark = "failed", f"{type(error).__name__}: {one_line(error)}"
                    if os.environ.get("TRACEBACKS"):
                        traceback.print_exc()
                shutil.rmtree(folder)
                results[architecture][method] = [outcome, remark.replace(temporary, "")]
                print(f"{architecture} {method}: {outcome} {remark}"[:300], flush=True)
    pairs = Counter(found[0] for of in results.values() for found in of.values() if isinstance(found, list))
    print(dict(pairs), "not small:", sum("small" in of for of in results.values()))
    content = {"versions": versions(), "machine": machine(torch.device("cpu")), "outcomes": pairs, "results": results}
    write_text(args.out / "architectures.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
