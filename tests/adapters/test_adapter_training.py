"""Under an unmodified Trainer: restarts, accumulation, two processes, resume after SIGKILL."""

import json
import os
import runpy
import socket
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, TrainingArguments

from hf_lowrank.adapters.relora import factors, lora_layers, merge_and_reinit, prune_moments
from hf_lowrank.errors import UserError
from hf_lowrank.methods import METHODS

train = runpy.run_path(str(Path(__file__).with_name("small_training.py")))["train"]


def forked(function, **environment):
    """Runs `function` in a fork of this process, which has imported everything; returns its process id."""
    process = os.fork()
    if process:
        return process
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def weights(folder, step):
    return load_file(Path(folder) / f"checkpoint-{step}" / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(str(folder), 8)
    return folder


def test_restarts_happen_are_logged_and_leave_the_loss_whole(uninterrupted):
    state = json.loads((uninterrupted / "checkpoint-8" / "trainer_state.json").read_text())
    restarts = [(e["step"], e["relora_restarts"]) for e in state["log_history"] if "relora_restarts" in e]
    assert restarts == [(3, 1), (6, 2)]
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert [step for step, rate in rates.items() if rate == 0] == [1, 4, 7]
    for step, zero in ((2, False), (3, True), (5, False), (6, True)):
        B = [tensor for name, tensor in weights(uninterrupted, step).items() if "lora_B" in name]
        assert all((not tensor.any()) == zero for tensor in B)
    frozen = [name for name in weights(uninterrupted, 1) if name.endswith("base_layer.weight")]
    first, before, after = (weights(uninterrupted, step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], before[name]) for name in frozen)
    assert not any(torch.equal(before[name], after[name]) for name in frozen)


def test_moments_of_the_factors_alone_are_pruned(uninterrupted):
    state = torch.load(uninterrupted / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    zeros = [(entry["exp_avg"] == 0).float().mean().item() for entry in state.values()]
    assert sum(share > 0.9 for share in zeros) == 2 * 7
    assert sum(share < 0.3 for share in zeros) == len(zeros) - 2 * 7 > 0
    assert {entry["step"].item() for entry in state.values()} == {6}


@pytest.mark.parametrize(
    ("kill", "moment"), [(2, "save"), (3, "save"), (3, "step"), (4, "save")], ids=["before", "at", "after-at", "after"]
)
def test_resume_after_sigkill_is_bit_exact(uninterrupted, tmp_path, kill, moment):
    assert exit_of(forked(lambda: train(str(tmp_path), 8, kill=kill, moment=moment))) == -9
    train(str(tmp_path), 8, resume=str(tmp_path / f"checkpoint-{kill}"))
    assert same(weights(tmp_path, 8), weights(uninterrupted, 8))


@pytest.mark.parametrize("name", ["cola", "sltrain", "low_rank"])
def test_the_other_methods_resume_bit_exactly_too(tmp_path, name):
    train(str(tmp_path / "whole"), 5, name, save_steps=5)
    assert exit_of(forked(lambda: train(str(tmp_path / "killed"), 5, name, kill=3))) == -9
    train(str(tmp_path / "killed"), 5, name, resume=str(tmp_path / "killed" / "checkpoint-3"))
    assert same(weights(tmp_path / "killed", 5), weights(tmp_path / "whole", 5))


@pytest.mark.parametrize("name", ["cola", "sltrain"])
def test_the_other_methods_agree_in_two_processes(tmp_path, name):
    first, second = in_two_processes(tmp_path / "two", name=name)
    assert same(first, second)
    train(str(tmp_path / "one"), 8, name, save_steps=8)
    alone = weights(tmp_path / "one", 8)
    assert all(torch.allclose(first[key], tensor, atol=2e-5) for key, tensor in alone.items())


def test_accumulated_gradients_restart_at_the_same_optimizer_steps(uninterrupted, tmp_path):
    train(str(tmp_path), 8, accumulation=2)
    once, twice = weights(uninterrupted, 8), weights(tmp_path, 8)
    assert all(torch.allclose(once[name], twice[name], atol=2e-5) for name in once)
    # The new factors are drawn, not computed: up to the next step they are the same bits.
    once, twice = weights(uninterrupted, 3), weights(tmp_path, 3)
    assert all(torch.equal(once[name], twice[name]) for name in once if "lora_A" in name)


def in_two_processes(folder, **options):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run(rank):
        trainer = train(str(folder), 8, save_steps=8, **options)
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), f"{folder}/rank{rank}.pt")

    ranks = [forked(lambda rank=rank: run(rank), **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    assert [exit_of(process) for process in ranks] == [0, 0]
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_agree_bit_for_bit_and_with_one(uninterrupted, tmp_path):
    first, second = in_two_processes(tmp_path)
    assert same(first, second)
    alone = weights(uninterrupted, 8)
    assert all(torch.allclose(first[name], tensor, atol=2e-5) for name, tensor in alone.items())


def test_warm_start(tmp_path):
    train(str(tmp_path), 8, warm_start_steps=3)
    history = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "relora_restarts" in e] == [6]
    start, changed, later, restarted = (weights(tmp_path, step) for step in (1, 3, 5, 6))
    dense = [name for name in start if name.endswith("base_layer.weight")]
    parts = [name for name in start if "lora_" in name]
    assert not any(torch.equal(start[name], changed[name]) for name in dense)
    assert all(torch.equal(start[name], changed[name]) for name in parts)
    assert all(torch.equal(changed[name], later[name]) for name in dense)
    assert not any(torch.equal(changed[name], later[name]) for name in parts)
    assert not any(torch.equal(later[name], restarted[name]) for name in dense)
    for resumed in (2, 3, 4):
        folder = tmp_path / f"resumed{resumed}"
        train(str(folder), 8, warm_start_steps=3, resume=str(tmp_path / f"checkpoint-{resumed}"))
        assert same(weights(folder, 8), weights(tmp_path, 8)), resumed


def test_warm_start_in_two_processes(tmp_path):
    first, second = in_two_processes(tmp_path / "two", warm_start_steps=3)
    assert same(first, second)
    train(str(tmp_path / "one"), 8, warm_start_steps=3, save_steps=8)
    alone = weights(tmp_path / "one", 8)
    assert all(torch.allclose(first[name], tensor, atol=2e-5) for name, tensor in alone.items())


def sharded_restart(pruning, mesh=None):
    """Three steps of AdamW and a restart; all tensors whole."""
    method = METHODS["relora"]
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = method.build_model(config, method.settings(r=3), 0)
    if mesh is not None:
        for block in model.lm.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(24).view(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    merge_and_reinit(model, seed=0, step=3)
    prune_moments(optimizer, factors(model), mode=pruning, ratio=0.8, seed=0, step=3)
    found = dict(model.named_parameters())
    found |= {f"{name} moment": optimizer.state[factor]["exp_avg"] for name, factor in factors(model).items()}
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach() for name, t in found.items()}


@pytest.mark.parametrize("pruning", ["random", "magnitude"])
def test_restarts_of_sharded_models(tmp_path, pruning):
    def run(rank):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        torch.save(sharded_restart(pruning, init_device_mesh("cpu", (2,))), tmp_path / f"rank{rank}.pt")
        torch.distributed.destroy_process_group()

    assert [exit_of(process) for process in [forked(lambda rank=rank: run(rank)) for rank in range(2)]] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)
    alone = sharded_restart(pruning)
    assert all(torch.allclose(first[name], tensor, atol=1e-6) for name, tensor in alone.items())


def test_a_model_without_lora_is_refused(llama_config, dense):
    callback = METHODS["relora"].callbacks(METHODS["relora"].settings(), TrainingArguments("unused", use_cpu=True))[0]
    with pytest.raises(UserError, match=r"ReLoRA needs a model with LoRA layers, got LlamaForCausalLM"):
        callback.on_init_end(None, None, None, model=dense(llama_config))
    assert lora_layers(METHODS["relora"].build_model(llama_config, METHODS["relora"].settings(r=2), 0))
