r"""`accelerate launch` with two processes: Trainer under DDP with APOLLO.

Shows that the script is the one for a single process: the launcher starts it twice, Trainer wraps the model, and the
optimizer, which draws its projections from a seed, takes the same steps in both. The script checks that at the end.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 examples/two_processes.py --cpu
    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 examples/two_processes.py --steps 400

Needs two GPUs, or none with --cpu, and nothing but this package: the text is this Python's own source files, read as
bytes, one token each. A recipe runs under the same launcher:

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 \
        --module hf_lowrank train recipes/nano/apollo.yaml
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate.utils import gather
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_lowrank import ApolloAdamW
from hf_lowrank.optim import adam_arguments


def byte_sequences(length: int) -> list[dict[str, torch.Tensor]]:
    """The source of Python's `json` package as sequences of byte tokens."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, whatever else there is")
    parser.add_argument("--output", default="runs/two_processes")
    given = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    args = TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=max(given.steps // 2, 1),
        save_strategy="no",
        report_to="none",
        use_cpu=given.cpu,
    )
    # Trainer builds the optimizer after it has placed the model, as FSDP needs it.
    options = {"model": model, "rank": 16, "update_proj_gap": 5, **adam_arguments(args)}
    trainer = Trainer(
        model=model, args=args, train_dataset=byte_sequences(64), optimizer_cls_and_kwargs=(ApolloAdamW, options)
    )
    loss = trainer.train().training_loss

    total = sum(parameter.detach().double().sum() for parameter in model.parameters())
    sums = gather(torch.as_tensor(total).reshape(1)).tolist()
    if args.process_index == 0:
        print(f"{args.world_size} processes, loss {loss:.3f}, sums of all weights {sums}")
    if len(set(sums)) > 1:
        raise SystemExit("the processes ended with different weights")


if __name__ == "__main__":
    main()
