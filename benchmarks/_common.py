"""What the benchmarks share: the machine's description, spreads, real gradients, result files."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.storage.files import write_text
from hf_lowrank.training.corpus import prepare_corpus
from hf_lowrank.training.recipe import DataSettings
from hf_lowrank.training.sequences import collate

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("hf-lowrank", "torch", "transformers", "peft", "galore-torch", "fira", "apollo-torch", "numpy")
# hidden, MLP, layers, heads, rank: the published sizes (vocabulary 32 000, sequences of 256).
SIZES = {"60m": (512, 1376, 8, 8, 128), "130m": (768, 2048, 12, 12, 256), "350m": (1024, 2736, 24, 16, 256)}
VOCABULARY, LENGTH = 32_000, 256


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    found = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {"median": float(middle), "q1": float(low), "q3": float(high), "n": len(values)}


def llama(size: str, seed: int = 0, layers: int | None = None) -> LlamaForCausalLM:
    hidden, mlp, depth, heads, _ = SIZES[size]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers or depth,
            num_attention_heads=heads,
            max_position_embeddings=LENGTH,
        )
    )


def real_gradients(model: LlamaForCausalLM, *, steps: int, keep: int, sequences: int) -> list[list[torch.Tensor]]:
    """The gradients of the last `keep` of `steps` training steps on the Python library; `model` is trained."""
    data = DataSettings(
        source="python-library",
        shape="packed",
        vocabulary_size=VOCABULARY,
        sequence_length=LENGTH,
        evaluation_sequences=64,
    )
    train = prepare_corpus(data).training_set(steps * sequences, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    kept = []
    for step in range(steps):
        batch = collate([train[step * sequences + row] for row in range(sequences)])
        model.zero_grad()
        model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
        if step >= steps - keep:
            kept.append([param.grad.clone() for param in model.parameters()])
        optimizer.step()
    model.zero_grad()
    return kept


def write_result(name: str, result: dict[str, Any]) -> Path:
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path
