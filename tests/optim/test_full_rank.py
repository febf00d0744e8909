"""Full-rank AdamW with a learning rate of its own for the target matrices, next to AdamW in float64."""

import math

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_lowrank import METHODS
from hf_lowrank.errors import UserError
from tests.optim.test_trainer_ways import Tokens, arguments

BASE, SCALE, STEPS, DECAY = 3e-3, 0.25, 6, 0.2


def built(model, args, **settings):
    method = METHODS["full_rank"]
    return method.optimizer(model, method.settings(**settings), args)


def is_target(name):
    return name.endswith("_proj.weight")


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_one_rate_leaves_trainer_its_own_optimizer(tmp_path, tiny_llama, scale):
    assert built(tiny_llama, arguments(tmp_path), matrix_lr_scale=scale) is None


def test_only_the_targets_have_the_other_rate(tmp_path, tiny_llama):
    args = arguments(tmp_path)
    optimizer = built(tiny_llama, args, matrix_lr_scale=SCALE)
    found = {}
    for group in optimizer.param_groups:
        found |= {id(param): (group["lr"], group["weight_decay"]) for param in group["params"]}
    decayed = set(Trainer(model=tiny_llama, args=args).get_decay_parameter_names(tiny_llama))
    names = dict(tiny_llama.named_parameters())
    assert len(found) == len(names)
    for name, param in names.items():
        assert found[id(param)] == (BASE * (SCALE if is_target(name) else 1), DECAY if name in decayed else 0.0), name
    assert {is_target(name) for name in names} == {True, False}
    assert optimizer.param_groups[0]["lr"] == BASE


def test_trainer_follows_adamw_in_float64(tmp_path, tiny_llama):
    """Each parameter by its own rate and the schedule, from the gradients that the training has."""
    args = arguments(tmp_path, max_steps=STEPS, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.0)
    start = {name: param.detach().double().numpy().copy() for name, param in tiny_llama.named_parameters()}
    grads = []

    class Recorder(Trainer):
        def training_step(self, model, *given, **more):
            loss = super().training_step(model, *given, **more)
            grads.append({name: param.grad.double().numpy().copy() for name, param in model.named_parameters()})
            return loss

    trainer = Recorder(
        model=tiny_llama,
        args=args,
        train_dataset=Tokens(),
        optimizers=(built(tiny_llama, args, matrix_lr_scale=SCALE), None),
    )
    decayed = set(trainer.get_decay_parameter_names(tiny_llama))
    trainer.train()
    rates = [min(step / 2, 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))) for step in range(STEPS)]
    assert [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ] == pytest.approx([BASE * rate for rate in rates])
    for name, param in tiny_llama.named_parameters():
        weight, first, second = start[name], np.zeros_like(start[name]), np.zeros_like(start[name])
        for step, rate in enumerate(rates, start=1):
            lr, grad = BASE * rate * (SCALE if is_target(name) else 1), grads[step - 1][name]
            weight = weight * (1 - lr * (DECAY if name in decayed else 0))
            first, second = 0.8 * first + 0.2 * grad, 0.95 * second + 0.05 * grad**2
            corrected = np.sqrt(second / (1 - 0.95**step)) + 1e-7
            weight = weight - lr * first / (1 - 0.8**step) / corrected
        moved = np.abs(weight - start[name]).max()
        assert np.abs(param.detach().double().numpy() - weight).max() < 1e-4 * moved, name


def test_target_modules_choose_the_matrices(tmp_path, tiny_llama):
    optimizer = built(tiny_llama, arguments(tmp_path), matrix_lr_scale=0.5, target_modules=["q_proj"])
    slow = [param for group in optimizer.param_groups if group["lr"] == BASE / 2 for param in group["params"]]
    assert {id(param) for param in slow} == {id(layer.self_attn.q_proj.weight) for layer in tiny_llama.model.layers}
    with pytest.raises(UserError, match="matches no linear module"):
        built(tiny_llama, arguments(tmp_path), matrix_lr_scale=0.5, target_modules=["r_proj"])


def test_another_optimizer_of_trainer(tmp_path, tiny_llama):
    optimizer = built(tiny_llama, arguments(tmp_path, optim="sgd"), matrix_lr_scale=0.5)
    assert type(optimizer) is torch.optim.SGD
    assert {group["lr"] for group in optimizer.param_groups} == {BASE, BASE / 2}
