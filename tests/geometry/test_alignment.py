"""Permutation alignment: a permuted model computes the same, and the permutation is found again."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hf_lowrank import geometry as g
from hf_lowrank.geometry.alignment import Permutations, blocks_of

HEADS, GROUPS, HIDDEN, INNER = 6, 2, 24, 20
LAYOUT = g.Layout(HEADS, GROUPS)


def grouped_model(seed=0):
    """Qwen2 has biases on its projections, grouped queries here."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def random_permutations(state, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count):
        return torch.randperm(count, generator=generator)

    def heads():
        inner = [shuffled(HEADS // GROUPS) for _ in range(GROUPS)]
        return torch.cat([inner[i] + int(j) * (HEADS // GROUPS) for i, j in enumerate(shuffled(GROUPS))])

    blocks = blocks_of(state)
    return Permutations(shuffled(HIDDEN), {b: shuffled(INNER) for b in blocks}, {b: heads() for b in blocks})


def logits(model, state=None):
    ids = torch.arange(12)[None]
    with torch.no_grad():
        if state is not None:
            model.load_state_dict(state)
        return model(input_ids=ids).logits


def test_permuting_leaves_the_function_and_is_found_again():
    model = grouped_model()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = logits(model)
    permuted = g.permute(original, random_permutations(original), LAYOUT)
    assert not torch.equal(permuted["lm_head.weight"], original["lm_head.weight"])
    torch.testing.assert_close(logits(model, permuted), expected, rtol=1e-4, atol=1e-4)
    found = g.match_weights(original, permuted, LAYOUT)
    back = g.permute(permuted, found, LAYOUT)
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name


def test_without_the_residual_stream():
    model = grouped_model()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn = random_permutations(original)
    permuted = g.permute(original, Permutations(torch.arange(HIDDEN), drawn.mlp, drawn.heads), LAYOUT)
    found = g.match_weights(original, permuted, LAYOUT, residual=False)
    assert torch.equal(found.residual, torch.arange(HIDDEN))
    back = g.permute(permuted, found, LAYOUT)
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_another_model_gets_nearer_and_keeps_its_function():
    one, other = grouped_model(0), grouped_model(1)
    ours, theirs = ({n: p.detach().clone() for n, p in m.named_parameters()} for m in (one, other))
    expected = logits(other)
    moved = g.permute(theirs, g.match_weights(ours, theirs, LAYOUT), LAYOUT)

    def distance(state):
        return sum(float((ours[name] - state[name]).square().sum()) for name in ours)

    assert distance(moved) < distance(theirs)
    torch.testing.assert_close(logits(other, moved), expected, rtol=1e-4, atol=1e-4)


def test_other_architectures_are_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, n_positions=8))
    with pytest.raises(ValueError, match="Llama"):
        blocks_of(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="divide"):
        g.Layout(6, 4)
