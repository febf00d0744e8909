"""Layerwise updates, diagnostics and compiled models under Trainer."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowrank import METHODS
from hf_lowrank.errors import UserError
from hf_lowrank.optim import GaLoreAdamW, SubspaceLogCallback


class Tokens(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        ids = torch.randint(0, 48, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **more):
    options = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    return TrainingArguments(**options)


def build(name, model, args, **settings):
    method = METHODS[name]
    return method.build_optimizer(model, method.settings(**settings), args)


class LargestGradient(TrainerCallback):
    """Elements of gradients that exist between two backward passes."""

    def __init__(self):
        self.most = 0

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.most = max(self.most, sum(p.grad.numel() for p in model.model.layers.parameters() if p.grad is not None))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("galore", {"rank": 4, "subspace": "columns", "update_proj_gap": 3}),
        ("fira", {"rank": 4, "subspace": "columns", "update_proj_gap": 3}),
        ("apollo", {"rank": 4, "update_proj_gap": 3}),
        ("frugal", {"rank": 4, "update_proj_gap": 3}),
        ("muon", {"ns_dtype": "float32"}),
        ("normuon", {"ns_dtype": "float32"}),
        ("dion", {"rank": 4}),
        ("dion2", {"ns_dtype": "float32"}),
        ("ldadam", {"rank": 4}),
        ("cosmos", {"rank": 4, "ns_dtype": "float32"}),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_layerwise_is_the_same_training(tmp_path, tiny_llama, name, settings, accumulation):
    """Five batches per epoch: the last step of each epoch has a single batch."""
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    start = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    ends, logs, watch = [], [], LargestGradient()
    for layerwise in (False, True):
        tiny_llama.load_state_dict(start)
        optimizer = build(name, tiny_llama, args, layerwise=layerwise, **settings)
        trainer = Trainer(
            model=tiny_llama,
            args=args,
            train_dataset=Tokens(),
            optimizers=(optimizer, None),
            callbacks=[watch] if layerwise else [],
        )
        trainer.train()
        ends.append(torch.cat([param.detach().flatten() for param in tiny_llama.parameters()]))
        logs.append([entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry])
        del optimizer, trainer
        gc.collect()
    assert torch.allclose(ends[0], ends[1], rtol=1e-3, atol=1e-5)
    assert logs[0] == logs[1]
    assert logs[1][0] == pytest.approx(3e-3)
    assert len(set(logs[1])) == len(logs[1])
    if name == "galore":
        norms = sum(p.numel() for n, p in tiny_llama.model.layers.named_parameters() if "norm" in n)
        assert watch.most == (norms if accumulation == 2 else 0)  # only projections of the matrices are kept


def test_options_incompatible_with_layerwise_are_refused(tmp_path, tiny_llama):
    with pytest.raises(UserError, match=r"max_grad_norm must be 0 with layerwise=True, got 1\.0"):
        build("galore", tiny_llama, arguments(tmp_path, max_grad_norm=1.0), rank=4, layerwise=True)


def test_layerwise_frees_each_gradient_inside_backward():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
    optimizer = GaLoreAdamW([(n, p) for n, p in model.named_parameters()], rank=4, layerwise=True)
    alive = []
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.weight.grad is not None for other in model))
        )
    model(torch.randn(3, 32)).sum().backward()
    assert alive == [0] * 6
    assert all(optimizer.state[layer.weight]["step"] == 1 for layer in model)


def test_diagnostics_reach_the_log(tmp_path, tiny_llama):
    args = arguments(tmp_path, max_steps=7)
    method = METHODS["galore"]
    settings = method.settings(rank=4, update_proj_gap=3, diagnostics=True)
    callbacks = method.callbacks(settings, args)
    assert [type(callback) for callback in callbacks] == [SubspaceLogCallback]
    optimizer = method.build_optimizer(tiny_llama, settings, args)
    trainer = Trainer(
        model=tiny_llama, args=args, train_dataset=Tokens(), optimizers=(optimizer, None), callbacks=callbacks
    )
    trainer.train()
    history = trainer.state.log_history
    assert 0 < history[0]["subspace/captured_energy"] <= 1
    assert "subspace/subspace_overlap" not in history[0]
    assert 0 < history[5]["subspace/subspace_overlap"] <= 1.001
    assert set(optimizer.diagnostics) == {n for n, _ in tiny_llama.named_parameters() if "proj" in n}
    assert method.callbacks(method.settings(rank=4), args) == []


def test_a_compiled_model_trains_the_same(tiny_llama):
    ids = torch.arange(24).view(2, 12)
    start = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    ends = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        tiny_llama.load_state_dict(start)
        optimizer = GaLoreAdamW(tiny_llama, rank=4, update_proj_gap=2)
        model = wrap(tiny_llama)
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        ends.append(torch.cat([param.detach().flatten() for param in tiny_llama.parameters()]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-4, atol=1e-6)
