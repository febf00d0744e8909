"""The token loss against transformers' own, in every way of computing it."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowrank.geometry import TokenLoss
from hf_lowrank.geometry.directions import Gaussian
from hf_lowrank.geometry.engine import movable

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 90,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(0, 90, (7, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return ids, mask


def reference(model, ids, mask):
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 10}, {"batch_tokens": 30}, {"vocabulary_chunk": 13}])
def test_equals_transformers_own_loss(model, batch, options):
    assert TokenLoss(*batch, **options)(model) == pytest.approx(reference(model, *batch), rel=2e-6)


def test_capped_logits_are_not_taken_apart(batch):
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, num_key_value_heads=4, head_dim=8, final_logit_softcapping=0.5)
    model = Gemma2ForCausalLM(config).eval()
    expected = reference(model, *batch)
    assert TokenLoss(*batch, vocabulary_chunk=13)(model) == pytest.approx(expected, rel=2e-6)


def test_chunks_of_a_perturbed_head_in_low_memory_mode(model, batch):
    values = {}
    for memory in ("copy", "low"):
        with movable(model, memory=memory) as move:
            loss = TokenLoss(*batch, vocabulary_chunk=13)
            move([(Gaussian(0, 0), 0.05)])
            values[memory] = loss(model)
    assert values["low"] == pytest.approx(values["copy"], rel=1e-6)
    assert values["low"] != pytest.approx(TokenLoss(*batch)(model), rel=1e-4)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        TokenLoss(torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(N, T\)"):
        TokenLoss(torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 5))
