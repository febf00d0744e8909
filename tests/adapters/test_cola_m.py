"""CoLA-M computes CoLA's numbers and keeps a fraction of its activations."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_lowrank.adapters import CoLAConfig, LowRankConfig, LowRankForCausalLM
from hf_lowrank.errors import UserError


class Living(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are still alive; views of `model`'s parameters do not count."""

    def __init__(self, model):
        super().__init__()
        self.made = {}
        self.given = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self):
        made = ((size, storage) for key, (storage, size) in self.made.items() if key not in self.given)
        return sum(size for size, storage in made if not storage.expired())


def kept_by_a_block(checkpoint_activations, attention):
    """Bytes that one more decoder block adds to what a forward keeps for backward."""

    def kept(blocks):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            attn_implementation=attention,
        )
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config),
            CoLAConfig(r=16, checkpoint_activations=checkpoint_activations),
        ).train()
        ids = torch.randint(32, (4, 48))
        with Living(model) as living:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        size = living.bytes()
        loss.backward()
        return size

    return kept(3) - kept(2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_keeps_at_most_a_third(attention):
    plain, checkpointed = kept_by_a_block(False, attention), kept_by_a_block(True, attention)
    # The block's input and seven r-wide products, in float32, and nothing else of the tokens' size.
    tokens, hidden, r = 4 * 48, 64, 16
    assert checkpointed <= 4 * tokens * (hidden + 7 * r) * 1.05
    assert plain / checkpointed >= 3


def gradients(model, ids):
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
def test_same_numbers(base_config, dense, ids, autocast):
    results = []
    for checkpointed in (False, True):
        model = get_peft_model(dense(base_config), CoLAConfig(r=4, checkpoint_activations=checkpointed))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(model, ids))
    (plain_loss, plain), (loss, checkpointed) = results
    assert torch.equal(loss, plain_loss)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_it_survives_saving_and_can_be_turned_off(llama_config, ids, tmp_path):
    adapter = CoLAConfig(r=4, checkpoint_activations=True)
    model = LowRankForCausalLM(LowRankConfig(base_config=llama_config, adapter_config=adapter))
    assert model.is_activation_checkpointing
    _, wanted = gradients(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.is_activation_checkpointing
    loaded.activation_checkpointing_disable()
    assert not loaded.is_activation_checkpointing
    _, got = gradients(loaded, ids)
    assert all(torch.allclose(got[name], wanted[name], atol=1e-7) for name in wanted)


def test_a_model_that_cannot_checkpoint_is_refused():
    with pytest.raises(UserError, match=r"checkpoint_activations needs a transformers model.*got Sequential"):
        get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), CoLAConfig(r=2, target_modules=["0"], checkpoint_activations=True)
        )
