"""Every method trained by a recipe and in a custom loop with accelerate, in one process and in several."""

import random
import shutil
from types import SimpleNamespace

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from hf_lowrank.methods import METHODS
from hf_lowrank.training.pretrain import pretrain
from hf_lowrank.training.recipe import load_recipe
from tests.distributed.processes import in_processes
from tests.distributed.sharded_training import FSDP, free_port, launched
from tests.distributed.training import state_bytes, whole_weights

SUBSPACE = {"rank": 4, "update_proj_gap": 5}
# The recipe's `method:` block of each case, by its name unless it names a method.
CASES = {
    "full_rank": {},
    "galore": SUBSPACE,
    "q_galore": {**SUBSPACE, "update_proj_gap": 1},
    "q_galore_8bit": {"name": "q_galore", **SUBSPACE, "update_proj_gap": 1, "weight_dtype": "8bit"},
    "fira": SUBSPACE,
    "apollo": SUBSPACE,
    "apollo_mini": {"update_proj_gap": 5},
    "frugal": SUBSPACE,
    "frugal_blocks": {"name": "frugal", **SUBSPACE, "subspace": "blocks"},
    "muon": {"ns_dtype": "float32"},
    "muon_bfloat16": {"name": "muon"},
    "normuon": {"ns_dtype": "float32"},
    "dion": {"rank": 4},
    "dion2": {"ns_dtype": "float32"},
    "ldadam": {"rank": 4},
    "ldadam_no_feedback": {"name": "ldadam", "rank": 4, "error_feedback": False},
    "cosmos": {"rank": 4, "ns_dtype": "float32"},
    "relora": {"r": 4, "restart_every": 4, "restart_warmup_steps": 1},
    "cola": {"r": 4},
    "sltrain": {"r": 4},
    "structured": {"r": 4, "blocks": 2, "guide_share": 0.0},
    "sst": {"r": 4, "redraw_every": 4, "redraw_warmup_steps": 1, "svd_every": 2},
    "low_rank": {"r": 4},
    "low_rank_refactorised": {"name": "low_rank", "r": 4, "refactorise_every": 4, "recovery_steps": 2},
    "sltrain_refactorised": {"name": "sltrain", "r": 4, "refactorise_every": 4, "recovery_steps": 2},
}
# Refused under FSDP2: groups of values that share a scale could be split between two processes.
UNSHARDED = ("q_galore", "q_galore_8bit")
BATCH = 8
SHAPE = {
    "hidden_size": 28,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def method_of(case):
    """The method of a case and its settings."""
    settings = dict(CASES[case])
    return METHODS[settings.pop("name", case)], settings


# -- accelerate by hand


def by_hand(cases, way, steps, rank=0, world=1):
    """Each case for `steps` under accelerate, in `way` (alone, ddp, fsdp), in float64.

    Adam divides by the gradient's size: if that is only rounding error, float32 differs in the first digit.
    """
    if way != "alone":
        launched(rank, world, on_accelerators=way == "fsdp")
    return {case: _by_hand(case, way, steps, rank, world) for case in cases}


def _by_hand(case, way, steps, rank, world):
    method, own = method_of(case)
    settings = method.settings(**own)
    torch.manual_seed(0)
    model = method.build_model(LlamaConfig(vocab_size=46, **SHAPE), settings, 0).double()
    args = SimpleNamespace(
        learning_rate=3e-3, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-6, weight_decay=0.1, seed=0,
        get_warmup_steps=lambda steps: 2, lr_scheduler_type="linear", lr_scheduler_kwargs=None,
        report_to=[],
    )  # fmt: skip
    optimizer = method.optimizer(model, settings, args) or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-6, weight_decay=0.1
    )
    scheduler = method.build_scheduler(optimizer, settings, args, steps) if method.build_scheduler else None
    torch.manual_seed(1 + rank)  # torch's global generator differs between processes
    restarts = [callback for callback in method.callbacks(settings, args) if hasattr(callback, "restart")]
    accelerator, wrapped, inner = None, model, optimizer
    if way != "alone":
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin if way == "fsdp" else None)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        inner = optimizer.optimizer
    losses, count = [], 0
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step % 5)
        ids = torch.randint(0, 46, (BATCH, 12), generator=generator).chunk(world)[rank]
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for callback in restarts:
            if step % callback.restart_every == 0:
                callback.restart(model, inner, step)
                count += 1
        optimizer.zero_grad()
        losses.append(_mean(loss, world))
    assert bool(count) == bool(restarts)
    return {"losses": losses, "weights": whole_weights(model), "bytes": state_bytes(inner)}


def _mean(loss, world):
    loss = loss.detach().clone()
    if world > 1:
        dist.all_reduce(loss)
    return loss.item() / world


# -- a Trainer by a recipe


def write_texts(folder):
    """The corpus of `write_recipe`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for number in range(6):
        words = [f"{generator.choice(['alpha', 'beta', 'gamma'])}{generator.randrange(90)}" for _ in range(500)]
        (folder / f"text{number}.txt").write_text(" ".join(words))


def write_recipe(folder, case, world, way, *, steps, saved):
    """A recipe with `BATCH` sequences per step for any number of processes."""
    method, own = method_of(case)
    recipe = {
        "name": case,
        "method": {"name": method.name, **own},
        "model": {"architecture": "llama", **SHAPE},
        "data": {
            "source": "files",
            "train_files": ["text[1-9].txt"],
            "held_out_files": ["text0.txt"],
            "sequence_length": 16,
            "vocabulary_size": 301,
            "evaluation_sequences": 8,
        },
        "training": {
            "max_steps": steps,
            "save_steps": saved,
            "per_device_train_batch_size": BATCH // world,
            "learning_rate": 3e-3,
            "adam_epsilon": 1e-6,
            "weight_decay": 0.1,
            "logging_steps": 1,
            **(FSDP if way == "fsdp" else {}),
        },
    }
    path = folder / f"{case}-{way}{world}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class AtTheEnd(TrainerCallback):
    """Losses, weights and bytes of this process when a Trainer ends."""

    found = None

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        entries = [(entry["step"], key, entry[key]) for entry in state.log_history for key in ("loss", "eval_loss")
                   if key in entry]  # fmt: skip
        type(self).found = {
            "losses": {f"{key} {step}": value for step, key, value in entries},
            "weights": whole_weights(model),
            "bytes": state_bytes(optimizer),
        }


def by_trainer(path, run, way, rank=0, world=1):
    """Trains the recipe at `path` in this process, one of `world`; what `AtTheEnd` finds."""
    if way != "alone":
        launched(rank, world, on_accelerators=way == "fsdp")
    DEFAULT_CALLBACKS.append(AtTheEnd)
    try:
        pretrain(load_recipe(path), run)
    finally:
        DEFAULT_CALLBACKS.remove(AtTheEnd)
    return AtTheEnd.found


def launch(job, world, folder):
    """`job(rank, world)` in `world` processes that are connected like those of `accelerate launch`."""
    shutil.rmtree(folder, ignore_errors=True)
    found = in_processes(world, job, folder, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    shutil.rmtree(folder)
    return found


# -- comparing


def differences(alone, ranks):
    """The largest differences of losses and weights from those of one process, and whether replicas are identical."""
    ours = alone["losses"] if isinstance(alone["losses"], dict) else dict(enumerate(alone["losses"]))
    distances = []
    for found in ranks:
        theirs = found["losses"] if isinstance(found["losses"], dict) else dict(enumerate(found["losses"]))
        assert theirs.keys() == ours.keys()
        distances.append(max(abs(theirs[key] - value) for key, value in ours.items()))
    weights = alone["weights"]
    assert all(found["weights"].keys() == weights.keys() for found in ranks)
    return {
        "loss_difference": max(distances),
        "weight_difference": max(
            (found["weights"][key] - weight).abs().max().item() for found in ranks for key, weight in weights.items()
        ),
        "replicas_identical": all(
            torch.equal(found["weights"][key], weight)
            for found in ranks[1:]
            for key, weight in ranks[0]["weights"].items()
        ),
        "bytes_ratio": max(found["bytes"] for found in ranks) / max(1, alone["bytes"]),
    }
