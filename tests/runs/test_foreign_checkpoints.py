"""Checkpoints that come from elsewhere: pickles, adapters, quantised weights, other names, few positions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import Trajectory
from hf_lowrank.errors import UserError
from hf_lowrank.runs.selection import evaluation_set_from_text
from hf_lowrank.training.sequences import train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the slow red cat "


def small_llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_attention_heads": 4, "max_position_embeddings": 64, **changes})
    )


@pytest.mark.parametrize("single", [True, False])
def test_pickled_weights_are_refused_once_with_what_to_do(tmp_path, single):
    folder = tmp_path if single else tmp_path / "checkpoint-1"
    model = small_llama()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    about = "pytorch_model.bin is a pickle, which is not read; save the model with save_pretrained"
    if single:
        with pytest.raises(UserError, match=about):
            Trajectory(tmp_path)
    else:
        with pytest.warns(UserWarning, match=about), pytest.raises(UserError, match="no complete checkpoint"):
            Trajectory(tmp_path)


def test_a_text_is_cut_into_sequences_that_the_model_has_positions_for(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + (TEXT * 40).encode())
    (tmp_path / "plain.txt").write_text(TEXT * 40)
    for positions, length in ((64, 64), (1024, 256)):
        folder = tmp_path / f"model{positions}"
        small_llama(max_position_embeddings=positions).save_pretrained(folder)
        tokenizer = train_tokenizer([TEXT], 300)
        tokenizer.save_pretrained(folder)
        sequences, plain = (
            evaluation_set_from_text(tmp_path / name, Trajectory(folder)) for name in ("text.txt", "plain.txt")
        )
        ids = tokenizer(TEXT * 40)["input_ids"]
        assert sequences.input_ids.shape == (len(ids) // length, length)
        assert sequences.input_ids.flatten().tolist() == ids[: len(ids) // length * length]
        assert sequences.fingerprint == plain.fingerprint
