"""Measure a folder of anybody's checkpoints: the geometry of a training run that knew nothing of this package.

Shows the measurements as a function call on a folder of `checkpoint-N` folders (Trainer's own layout, plain
`save_pretrained` files) with a text file as held-out data, and how to read the rows. A second folder is the baseline.

    python examples/measure_checkpoints.py
    python examples/measure_checkpoints.py FOLDER --text held_out.txt --metrics spectra,random_sharpness
    python examples/measure_checkpoints.py FOLDER --baseline OTHER_FOLDER --text held_out.txt --metrics all

Needs nothing but this package: without FOLDER two small models are trained first, with plain AdamW at two learning
rates, on this Python's own source files. The same from the shell:

    hf-lowrank measure FOLDER --evaluation-set held_out.txt --output measurements
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowrank import METRICS
from hf_lowrank.measuring import measure


def train_somewhere_else(folder: Path, text: str, lr: float) -> None:
    """What anybody's training leaves: a model and a tokenizer per checkpoint, saved by transformers alone."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    sequences = ids[: len(ids) // 64 * 64].view(-1, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(1, 21):
        batch = sequences[torch.arange(8 * step, 8 * step + 8) % len(sequences)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            model.save_pretrained(folder / f"checkpoint-{step}")
            tokenizer.save_pretrained(folder / f"checkpoint-{step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="checkpoint-N folders; default: trained here")
    parser.add_argument("--baseline", type=Path, help="checkpoints to compare with")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--metrics", help="ids or dimensions, comma-separated; default: the sixteen")
    parser.add_argument("--output", type=Path, default=Path("runs/measure_checkpoints"))
    given = parser.parse_args()

    folder, baseline, text = given.folder, given.baseline, given.text
    if folder is None:
        folder, baseline, text = (given.output / name for name in ("slow", "fast", "held_out.txt"))
        sources = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
        train_somewhere_else(folder, "\n".join(sources[1:]), lr=1e-3)
        train_somewhere_else(baseline, "\n".join(sources[1:]), lr=1e-2)
        text.write_text(sources[0], encoding="utf-8")
    elif text is None:
        parser.error("--text is needed: checkpoints alone hold no held-out data")

    rows = measure(
        folder,
        baseline=baseline,
        evaluation_set=text,
        metrics=given.metrics,
        settings={"sequences": 8, "random": {"steps": 2, "draws": 3}, "pca": {"steps": 2, "count": 2}},
        output=given.output / "measurements",
    )
    of_model = [row for row in rows if row.scope == "model" and row.metric in METRICS]
    for row in sorted(of_model, key=lambda row: (list(METRICS).index(row.metric), row.step)):
        interval = "" if math.isnan(row.ci_low) else f" [{row.ci_low:.4g}, {row.ci_high:.4g}]"
        why = f"  ({row.reason})" if row.reason else ""
        print(f"step {row.step:5} {METRICS[row.metric].title:32} {row.value:.4g}{interval}{why}")
    print(f"{len(rows)} rows, per layer too, in {given.output / 'measurements'}")


if __name__ == "__main__":
    main()
