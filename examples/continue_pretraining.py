"""Continue the pre-training of an existing model on your own text, with an optimizer of the table.

Shows how any method that changes only the optimizer is built by its name from the table of methods, for a model that
somebody else trained, and how Trainer gets it. What comes out is the same plain architecture.

    python examples/continue_pretraining.py
    python examples/continue_pretraining.py --model EleutherAI/pythia-70m --text corpus.txt --method apollo --steps 500

Needs nothing but this package: without --model a small model and its tokenizer are made first, without --text the text
is this Python's own source files.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_lowrank import METHODS


def python_sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))


def make_model(folder: Path, text: str) -> str:
    """Writes a small random model with a tokenizer of 300 tokens to a folder, as if somebody had published it."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hub repository; default: a small random model")
    parser.add_argument("--text", type=Path, help="a text file; default: Python's own sources")
    parser.add_argument(
        "--method",
        default="galore",
        choices=[name for name, method in METHODS.items() if method.kind == "optimizer"],
    )
    parser.add_argument("--rank", type=int, default=16, help="of methods that have one")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--output", type=Path, default=Path("runs/continue_pretraining"))
    given = parser.parse_args()

    text = given.text.read_text(encoding="utf-8") if given.text else python_sources()
    source = given.model or make_model(given.output / "published", text)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)

    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // given.length * given.length].view(-1, given.length)
    sequences = [{"input_ids": row, "labels": row} for row in rows]
    held_out = max(len(sequences) // 10, 1)

    args = TrainingArguments(
        output_dir=str(given.output / "training"),
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        warmup_steps=given.steps // 10,
        per_device_train_batch_size=8,
        logging_steps=max(given.steps // 4, 1),
        save_strategy="no",
        report_to="none",
    )
    method = METHODS[given.method]
    settings = {"rank": given.rank} if "rank" in method.settings.model_fields else {}
    optimizer = method.optimizer(model, method.settings(**settings), args)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=sequences[held_out:],
        eval_dataset=sequences[:held_out],
        optimizers=(optimizer, None),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(str(given.output / "continued"))
    tokenizer.save_pretrained(given.output / "continued")
    after = trainer.evaluate()["eval_loss"]
    print(f"{method.title}: held-out loss {before:.3f} before, {after:.3f} after {given.steps} steps")


if __name__ == "__main__":
    main()
