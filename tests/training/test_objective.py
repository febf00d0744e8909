"""What a run learns and reports: the next token, for every architecture and method, whatever is added to its loss."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from hf_lowrank import Trajectory
from hf_lowrank.errors import UserError
from hf_lowrank.measuring import measure
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.training import load_recipe
from hf_lowrank.training.corpus import prepare_corpus
from tests.training.test_pretrain import mean_loss, state_of, trained

MIXTRAL = {
    "architecture": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}
BART = {
    "architecture": "bart",
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "max_position_embeddings": 64,
}
# Its logits are a slice of those of several streams; with a mask it computes NaN in float64.
PROPHETNET = {
    "architecture": "prophetnet",
    "hidden_size": 32,
    "num_decoder_layers": 2,
    "num_decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_position_embeddings": 64,
}
UNSHIFTED = {"bart": (BART, r"encoder_attn\.k_proj"), "prophetnet": (PROPHETNET, r"cross_attn\.key_proj")}
BERT = {
    "architecture": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
METHODS = {
    "full_rank": {"name": "full_rank"},
    "cola": {"name": "cola", "r": 8},
    "sltrain": {"name": "sltrain", "r": 8},
    "low_rank": {"name": "low_rank", "r": 8},
    "relora": {"name": "relora", "r": 8, "restart_every": 3, "restart_warmup_steps": 1},
}


def first_loss(path, run, smoothing):
    """The loss of the first step: next-token cross-entropy mixed with that of a uniform target, in float64."""
    data = prepare_corpus(load_recipe(path).data).training_set(4, 0)
    ids = torch.from_numpy(np.stack([data[index]["ids"] for index in range(4)]).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-0").eval()
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits[:, :-1].double(), -1)
    right = -logs.gather(-1, ids[:, 1:, None]).mean().item()
    return (1 - smoothing) * right - smoothing * logs.mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_label_smoothing_is_of_the_next_token_and_not_of_what_is_reported(write_recipe, tmp_path, method):
    path = write_recipe(method=METHODS[method], training__label_smoothing_factor=0.1)
    run = trained(path, tmp_path / "run")
    logs = state_of(run, 6)["log_history"]
    assert logs[0]["loss"] == pytest.approx(first_loss(path, run, 0.1), rel=1e-5)
    for entry in logs:
        if "eval_loss" in entry:
            by_hand = mean_loss(run / f"checkpoint-{entry['step']}", EvaluationSet.load(run))
            assert entry["eval_loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("architecture", UNSHIFTED)
@pytest.mark.parametrize("method", ["full_rank", "cola"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_an_architecture_that_does_not_shift_its_labels_learns_the_next_token(
    write_recipe, tmp_path, architecture, method, smoothing
):
    model, unused = UNSHIFTED[architecture]
    path = write_recipe(
        model=model,
        method=METHODS[method],
        training__label_smoothing_factor=smoothing,
        training__gradient_accumulation_steps=2,
        training__per_device_train_batch_size=2,
    )
    with pytest.warns(UserWarning, match=rf"{unused}.* and \d+ more, \d+% of the model, take no part"):
        run = trained(path, tmp_path / "run")
    logs = state_of(run, 6)["log_history"]
    assert logs[0]["loss"] == pytest.approx(first_loss(path, run, smoothing), rel=1e-5)
    last = [entry["eval_loss"] for entry in logs if "eval_loss" in entry][-1]
    assert last == pytest.approx(mean_loss(run / "checkpoint-6", EvaluationSet.load(run), torch.float32), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", ["full_rank", "cola", "relora"])
def test_a_mixture_that_balances_its_experts_reports_the_plain_loss(write_recipe, tmp_path, method, smoothing):
    model = {**MIXTRAL, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    path = write_recipe(model=model, method=METHODS[method], training__label_smoothing_factor=smoothing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its experts
        run = trained(path, tmp_path / "run")
    logs = state_of(run, 6)["log_history"]
    # A balanced router's auxiliary loss is about 2, the number of experts per token; training has it, reports do not.
    assert logs[0]["loss"] - first_loss(path, run, smoothing) == pytest.approx(0.5 * 2, abs=0.1)
    last = [entry["eval_loss"] for entry in logs if "eval_loss" in entry][-1]
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-6", output_router_logits=False).eval()
    ids = EvaluationSet.load(run).input_ids
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    by_hand = -torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).mean().item()
    assert last == pytest.approx(by_hand, rel=1e-5)


def test_a_mixtures_auxiliary_loss_does_not_grow_with_the_parts_of_a_step(write_recipe, tmp_path):
    model = {**MIXTRAL, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    losses = []
    for size, parts in ((8, 1), (2, 4)):
        changes = {"training__per_device_train_batch_size": size, "training__gradient_accumulation_steps": parts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its experts
            run = trained(write_recipe(model=model, **changes), tmp_path / f"run{parts}")
        losses.append(state_of(run, 6)["log_history"][0]["loss"])
    # Balance is a property of each part, so that the two differ a little; a sum over four parts differs by 3.
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_a_bidirectional_architecture_is_refused_before_the_run_begins(write_recipe, tmp_path):
    path = write_recipe(model=BERT)
    with pytest.raises(UserError, match=r"tiny\.yaml: bert is not causal here: .*set is_decoder: true"):
        trained(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = trained(write_recipe(model={**BERT, "is_decoder": True}), tmp_path / "decoder")
    assert (run / "checkpoint-6").is_dir()


def test_a_bidirectional_checkpoint_is_neither_measured_nor_evaluated(tmp_path):
    fields = {key: value for key, value in BERT.items() if key != "architecture"}
    folder = tmp_path / "run" / "checkpoint-1"
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(vocab_size=64, **fields)).save_pretrained(folder)
    EvaluationSet(torch.randint(64, (4, 16)), torch.ones(4, 16)).save(folder.parent)
    with pytest.raises(UserError, match="checkpoint-1: bert is not causal here"):
        Trajectory(folder.parent).model(1)
    rows = measure(folder.parent, metrics=["loss"])
    assert all("not causal" in row.reason for row in rows)


def test_trying_a_model_changes_neither_it_nor_the_generator(write_recipe, tmp_path):
    run = trained(write_recipe(model__attention_dropout=0.1), tmp_path / "run")
    torch.manual_seed(0)
    recipe = load_recipe(write_recipe())
    expected = recipe.method.build_model(recipe.config(**_special(run)), recipe.settings, 0).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in load_file(run / "checkpoint-0/model.safetensors").items())


def _special(run):
    config = json.loads((run / "checkpoint-0" / "config.json").read_text())
    return {key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
