"""Low-rank layers with PEFT: CoLA and SLTrain in place of a model's linear layers.

Shows `get_peft_model` with this package's configurations, what each trains and stores, and that an SLTrain adapter
merges into plain dense weights, while CoLA, whose layer is not linear, cannot be merged and says so.

    python examples/peft_layers.py
    python examples/peft_layers.py --model HuggingFaceTB/SmolLM2-135M --steps 100      # downloads it

Needs nothing but this package: by default a small random model is made, and the text is this Python's own source
files, read as bytes.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowrank import CoLAConfig, SLTrainConfig
from hf_lowrank.errors import UserError


def byte_sequences(length: int) -> torch.Tensor:
    """The source of Python's `json` package as sequences (N, length) of byte tokens."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)


def make_model(name: str | None) -> torch.nn.Module:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def train(model: torch.nn.Module, sequences: torch.Tensor, steps: int) -> float:
    """Trains what requires a gradient with AdamW, and returns the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        batch = sequences[torch.arange(8 * step, 8 * step + 8) % len(sequences)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hub repository; default: a small random model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()

    sequences = byte_sequences(64)
    options = {"r": given.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for config in (CoLAConfig(**options), SLTrainConfig(sparsity=0.03, **options)):
        adapted = get_peft_model(make_model(given.model), config)
        adapted.print_trainable_parameters()
        loss = train(adapted, sequences, given.steps)
        with torch.no_grad():
            logits = adapted(input_ids=sequences[:1]).logits
            try:
                dense = adapted.merge_and_unload()
            except UserError as refusal:
                print(f"{config.peft_type.value}: loss {loss:.3f}; {refusal}")
                continue
            change = (dense(input_ids=sequences[:1]).logits - logits).abs().max()
        print(f"{config.peft_type.value}: loss {loss:.3f}; merged into dense weights, logits change by {change:.1e}")


if __name__ == "__main__":
    main()
