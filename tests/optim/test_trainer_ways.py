"""The ways to use an optimizer: Trainer's two, the method table, and a custom loop with accelerate."""

import inspect
import io
import json

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from hf_lowrank import METHODS
from hf_lowrank.errors import UserError
from hf_lowrank.optim import FiraAdamW, GaLoreAdamW, adam_arguments, check_coverage, param_groups


class Tokens(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 48, (12,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **more):
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    return TrainingArguments(**options)


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def built(name, model, args, **settings):
    method = METHODS[name]
    return method.build_optimizer(model, method.settings(**settings), args)


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_three_ways_give_the_same_bits(tmp_path, tiny_llama, name):
    args = arguments(tmp_path)
    start = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    ends = []

    def train(**ways):
        tiny_llama.load_state_dict(start)
        Trainer(model=tiny_llama, args=args, train_dataset=Tokens(), **ways).train()
        ends.append(weights(tiny_llama))

    optimizer = built(name, tiny_llama, args, rank=4, update_proj_gap=3)
    train(optimizers=(optimizer, None))

    kwargs = {"model": tiny_llama, "rank": 4, "update_proj_gap": 3, "seed": args.seed, **adam_arguments(args)}
    train(optimizer_cls_and_kwargs=(type(optimizer), kwargs))

    groups = param_groups(tiny_llama, rank=4, weight_decay=0.2, update_proj_gap=3, seed=args.seed)
    adam = {"betas": (0.8, 0.95), "eps": 1e-7}
    train(optimizer_cls_and_kwargs=(type(optimizer), {"params": groups, "lr": 3e-3, **adam}))

    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], torch.cat([start[name].flatten() for name, _ in tiny_llama.named_parameters()]))


def test_by_hand_with_accelerate(tiny_llama):
    accelerator = Accelerator(cpu=True)
    optimizer = GaLoreAdamW(tiny_llama, lr=1e-2, rank=4, update_proj_gap=5)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 40)
    model, optimizer, schedule = accelerator.prepare(tiny_llama, optimizer, schedule)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_training_arguments_reach_the_groups(tmp_path, tiny_llama):
    for module in tiny_llama.model.layers[0].self_attn.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    args = arguments(tmp_path)
    optimizer = built("galore", tiny_llama, args, rank=4)
    trainer = Trainer(model=tiny_llama, args=args)
    decayed = set(trainer.get_decay_parameter_names(tiny_llama))
    seen = set()
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.95), 1e-7)
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.2 if name in decayed else 0.0), name
            is_target = ".layers." in name and name.endswith("proj.weight")
            assert (group["rank"] == 4) == is_target, name
            seen.add(name)
    assert seen == {name for name, _ in tiny_llama.named_parameters()}


def test_resumed_trainer_ends_with_the_same_bits(tmp_path, tiny_llama):
    start = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    ends = {}
    for run, stop in (("whole", None), ("cut", 4)):
        args = arguments(tmp_path / run, max_steps=9, save_strategy="steps", save_steps=4)
        tiny_llama.load_state_dict(start)
        options = {"rank": 4, "update_proj_gap": 3}
        trainer = Trainer(
            model=tiny_llama,
            args=args,
            train_dataset=Tokens(),
            optimizers=(built("fira", tiny_llama, args, **options), None),
        )
        trainer.train()
        if stop:
            with torch.no_grad():
                for param in tiny_llama.parameters():
                    param.zero_()
            fresh = built("fira", tiny_llama, args, **options)
            trainer = Trainer(model=tiny_llama, args=args, train_dataset=Tokens(), optimizers=(fresh, None))
            trainer.train(resume_from_checkpoint=str(tmp_path / run / f"checkpoint-{stop}"))
        ends[run] = weights(tiny_llama)
        saved = torch.load(tmp_path / run / "checkpoint-4" / "optimizer.pt", weights_only=True)
        for state in saved["state"].values():
            assert all(isinstance(value, (torch.Tensor, int, float)) for value in state.values())
        rates = json.loads((tmp_path / run / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        assert rates[0]["learning_rate"] == pytest.approx(3e-3)
    assert torch.equal(ends["whole"], ends["cut"])


def test_errors_name_what_is_wrong(tmp_path, tiny_llama):
    args = arguments(tmp_path)
    with pytest.raises(UserError, match=r"rank must be from 1 to 16 for model\.layers\.0\.self_attn\.q_proj\.weight"):
        built("galore", tiny_llama, args, rank=17)
    with pytest.raises(UserError, match=r"'nothing_like_it' matches no linear module"):
        built("galore", tiny_llama, args, rank=4, target_modules=["nothing_like_it"])
    with pytest.raises(UserError, match="needs rank"):
        GaLoreAdamW(tiny_llama)
    with pytest.raises(UserError, match="at least one group with a rank"):
        GaLoreAdamW(tiny_llama.parameters())
    with pytest.raises(UserError, match=r"model\.norm\.weight of shape \(16,\) is not a matrix"):
        GaLoreAdamW([("model.norm.weight", tiny_llama.model.norm.weight)], rank=2)
    with pytest.raises(UserError, match="residual of FiraAdamW must be one of official, paper, got 'both'"):
        FiraAdamW(tiny_llama, rank=2, residual="both")
    with pytest.raises(
        UserError, match="proj_type of FiraAdamW must be one of std, reverse_std, right, left, got 'full'"
    ):
        FiraAdamW(tiny_llama, rank=2, proj_type="full")
    with pytest.raises(UserError, match="unknown option 'update_gap'"):
        GaLoreAdamW(param_groups(tiny_llama, rank=2, update_gap=3))
    groups = param_groups(tiny_llama, rank=2)
    groups[-1]["params"].pop()
    with pytest.raises(UserError, match=r"1 are in none: model\.norm\.weight"):
        check_coverage(tiny_llama, groups)
    for layer in tiny_llama.model.layers:
        layer.requires_grad_(False)
    with pytest.raises(UserError, match="only frozen parameters"):
        param_groups(tiny_llama, rank=2)


def test_state_survives_a_file_in_its_own_types(tiny_llama):
    tiny_llama.bfloat16()
    ids = torch.arange(24).view(2, 12)

    def backward(model):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    optimizer = FiraAdamW(tiny_llama, lr=1e-2, rank=4, update_proj_gap=3, state_dtype="float32")
    for _ in range(4):
        backward(tiny_llama)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = FiraAdamW(tiny_llama, lr=1e-2, rank=4, update_proj_gap=3, state_dtype="float32")
    again.load_state_dict(torch.load(file, weights_only=True))
    for param in tiny_llama.parameters():
        old, new = optimizer.state[param], again.state[param]
        assert old.keys() == new.keys()
        for key, value in old.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == new[key].dtype, key
                assert torch.equal(value, new[key]), key
                assert value.data_ptr() != new[key].data_ptr(), key
            else:
                assert value == new[key], key


@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW])
def test_signatures_list_every_option_with_its_default(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:5] == ["params", "lr", "betas", "eps", "weight_decay"]
    assert parameters["scale"].default == 0.25
    assert parameters["rank"].default is None
    assert set(cls.settings.model_fields) <= set(parameters)
    assert ("residual" in parameters) == (cls is FiraAdamW)
    assert parameters["update_proj_gap"].kind is inspect.Parameter.KEYWORD_ONLY
