"""Trainer with GaLore: a plain training script whose only change is its optimizer.

Shows how `param_groups` splits a model into target matrices and the rest, and how `GaLoreAdamW` goes into an
unmodified `Trainer`. The state of the optimizer is tensors, so checkpoints resume: delete the last one and run the
script again with the same --output.

    python examples/trainer_galore.py
    python examples/trainer_galore.py --steps 400 --hidden-size 256 --rank 64

Needs nothing but this package: the text is this Python's own source files, read as bytes, one token each.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_lowrank import GaLoreAdamW, param_groups


def byte_sequences(length: int) -> list[dict[str, torch.Tensor]]:
    """The source of Python's `json` package as sequences of byte tokens."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", default="runs/trainer_galore")
    given = parser.parse_args()

    sequences = byte_sequences(128)
    split = len(sequences) * 9 // 10
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=given.hidden_size,
        intermediate_size=3 * given.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)

    # Target matrices get GaLore, embeddings, norms and the head plain AdamW.
    groups = param_groups(model, rank=given.rank, update_proj_gap=50, scale=0.25, weight_decay=0.01)
    optimizer = GaLoreAdamW(groups, lr=1e-2)

    args = TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=8,
        save_steps=max(given.steps // 2, 1),
        logging_steps=max(given.steps // 4, 1),
        lr_scheduler_type="cosine",
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=sequences[:split],
        eval_dataset=sequences[split:],
        optimizers=(optimizer, None),
    )
    last = get_last_checkpoint(given.output) if Path(given.output).is_dir() else None
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=last)
    state = sum(value.numel() for one in optimizer.state.values() for value in one.values() if torch.is_tensor(value))
    print(f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {given.steps} steps")
    print(f"{state} numbers of optimizer state for {model.num_parameters()} parameters; AdamW keeps two each")


if __name__ == "__main__":
    main()
