"""Run directories as `hf-lowrank train` leaves them, tiny and made without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowrank.runs.evaluation_set import EvaluationSet

VOCABULARY = 48
# A downstream score on a dataset of the Hub.
BENCHMARK = {
    "run": "nano-galore", "method": "galore", "seed": 0, "step": 30, "task": "arc_easy", "metric": "acc",
    "value": 0.375, "stderr": 0.01, "ci_low": 0.35, "ci_high": 0.4, "n": 2376, "chance": 0.25,
    "higher_is_better": True, "group": None, "task_version": "1.0", "lm_eval_version": "0.4.13", "items": "abc",
    "dataset": "allenai/ai2_arc", "subset": "ARC-Easy",
}  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1")


def make_model(seed: int, hidden: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=1,
        )
    )


def make_run(
    folder: Path, steps: tuple[int, ...] = (10, 20, 30), *, seed: int = 0, method: str = "galore", hidden: int = 16
) -> Path:
    """Writes a run: recipe, tokenizer, evaluation set, checkpoints with optimizer state, facts, measurements."""
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (4, 16), generator=generator)
    EvaluationSet(ids, torch.ones_like(ids)).save(folder)
    recipe = {
        "name": f"nano-{method}",
        "seed": seed,
        "method": {"name": method},
        "model": {"architecture": "llama", "hidden_size": hidden},
        "data": {"source": "python-library", "sequence_length": 16},
        "training": {"max_steps": steps[-1], "learning_rate": 0.001},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    log = []
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        make_model(1000 * seed + step, hidden).save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        log.append({"step": step, "loss": 4.0 - step / 100, "learning_rate": 0.001})
        log.append({"step": step, "eval_loss": 4.1 - step / 100})
        state = {"global_step": step, "log_history": log, "best_model_checkpoint": None}
        torch.save({"state": {0: {"exp_avg": torch.full((8, 8), float(step))}}}, checkpoint / "optimizer.pt")
        torch.save({"last_epoch": step}, checkpoint / "scheduler.pt")
        torch.save({"cpu": torch.get_rng_state()}, checkpoint / "rng_state.pth")
        (checkpoint / "training_args.bin").write_bytes(b"\x80pickle of /home/somebody")
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    facts = {"parameters": 362816, "training_seconds": 4.7, "peak_memory_bytes": 668205056, "tokens_seen": 122880}
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder
