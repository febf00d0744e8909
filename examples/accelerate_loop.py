"""A training loop by hand with accelerate, and Fira as its optimizer.

Shows that the optimizers are `torch.optim.Optimizer`s: `accelerator.prepare`, gradient accumulation and clipping, a
schedule of torch's own, and a state that `save_state` writes and `load_state` reads.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --steps 400 --mixed-precision bf16

Needs nothing but this package: the text is this Python's own source files, read as bytes, one token each.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import FiraAdamW, param_groups


def byte_sequences(length: int) -> torch.Tensor:
    """The source of Python's `json` package as sequences (N, length) of byte tokens."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=2, help="batches per optimizer step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--output", default="runs/accelerate_loop")
    given = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=given.accumulate, mixed_precision=given.mixed_precision)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    groups = param_groups(model, rank=16, update_proj_gap=50, scale=0.25, weight_decay=0.01)
    optimizer = FiraAdamW(groups, lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / given.steps, 1))))
    loader = DataLoader(byte_sequences(128), batch_size=8, shuffle=True, drop_last=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    step, losses = 0, []
    while step < given.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            step += accelerator.sync_gradients
            if step == given.steps:
                break

    accelerator.save_state(given.output)
    accelerator.load_state(given.output)
    accelerator.print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {step} steps; state in {given.output}")


if __name__ == "__main__":
    main()
