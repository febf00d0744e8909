"""Does the fast subspace train as well as the exact one? Three seeds at nano scale, GaLore, on the Python library.

    python benchmarks/subspace_quality.py [--steps 300] [--gap 50] [--seeds 3]

Writes benchmarks/results/subspace_quality.json: the final held-out losses of both, and for early, middle and late
refreshes the share of the exact basis' captured gradient energy that the fast basis captures, in the fast runs.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from _common import machine, spread, versions, write_result

from hf_lowrank.optim import GaLoreAdamW
from hf_lowrank.optim.subspaces import Request as Choice
from hf_lowrank.optim.subspaces import captured_energy, cosines, exact_basis
from hf_lowrank.training.corpus import Corpus, prepare_corpus
from hf_lowrank.training.recipe import DataSettings
from hf_lowrank.training.sequences import collate

LENGTH, VOCABULARY, RANK = 128, 2048, 32


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def energy_shares(optimizer: GaLoreAdamW) -> list[float]:
    """Per target, the energy that its basis captures relative to the exact basis."""
    shares = []
    for info, _, param in optimizer._registered():
        if info.layout is None:
            continue
        layout, basis = info.layout, optimizer.state[param]["basis"]
        grads = torch.stack(layout.matrices(param.grad))
        choice = Choice(grads=grads, rank=layout.rank, transposed=layout.transposed, previous=None, keys=[(0,)])
        if not basis.is_floating_point():
            basis = cosines(layout.columns, grads.dtype, grads.device)[basis].mT
        shares.append(float(captured_energy(grads[0], basis) / captured_energy(grads[0], exact_basis(choice)[0])))
    return shares


def held_out_loss(model: LlamaForCausalLM, corpus: Corpus) -> float:
    ids = corpus.evaluation.input_ids
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) for part in ids.split(32)]
    return sum(losses) / len(losses)


def train(corpus: Corpus, subspace: str, seed: int, steps: int, gap: int, batch: int) -> dict[str, Any]:
    model = model_of(seed)
    optimizer = GaLoreAdamW(model, lr=1e-2, rank=RANK, update_proj_gap=gap, subspace=subspace, seed=seed)
    warmup = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.1, 1 - (step - warmup) / (steps - warmup)))
    )
    data = corpus.training_set(steps * batch, seed)
    refreshes = list(range(0, steps, gap))
    watched = {"early": refreshes[1], "middle": refreshes[len(refreshes) // 2], "late": refreshes[-1]}
    shares = {}
    start = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        model(**collate([data[step * batch + row] for row in range(batch)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for label, when in watched.items():
            if step == when and subspace != "svd":
                found = energy_shares(optimizer)
                shares[label] = {"step": step, "least": min(found), **spread(found)}
        schedule.step()
    loss = held_out_loss(model, corpus)
    seconds = time.perf_counter() - start
    print(f"{subspace} seed {seed}: {loss:.4f} after {seconds:.0f} s {shares}", file=sys.stderr, flush=True)
    return {"subspace": subspace, "seed": seed, "loss": loss, "energy_shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gap", type=int, default=50, help="steps between refreshes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subspaces", default="svd,randomized,dct")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    data = DataSettings(
        source="python-library",
        shape="packed",
        vocabulary_size=VOCABULARY,
        sequence_length=LENGTH,
        evaluation_sequences=256,
    )
    corpus = prepare_corpus(data)
    kinds = options.subspaces.split(",")
    runs = [
        train(corpus, kind, seed, options.steps, options.gap, options.batch)
        for seed in range(options.seeds)
        for kind in kinds
    ]
    losses = {kind: [run["loss"] for run in runs if run["subspace"] == kind] for kind in kinds}
    means = {kind: sum(values) / len(values) for kind, values in losses.items()}
    result = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "setting": {
            "steps": options.steps,
            "rank": RANK,
            "update_proj_gap": options.gap,
            "batch": options.batch,
            "length": LENGTH,
        },
        "runs": runs,
        "mean_loss": means,
        "difference": {kind: means[kind] - means["svd"] for kind in kinds},
        "spread_of_seeds": max(losses["svd"]) - min(losses["svd"]),
        "least_energy_share": {
            kind: min(
                share["least"] for run in runs if run["subspace"] == kind for share in run["energy_shares"].values()
            )
            for kind in kinds
            if kind != "svd"
        },
    }
    spread_of_seeds = result["spread_of_seeds"]
    result["within_spread"] = {kind: abs(gap) < spread_of_seeds for kind, gap in result["difference"].items()}
    print(write_result("subspace_quality", result))


if __name__ == "__main__":
    main()
