"""Our optimizers compared with the official packages and torch's AdamW, in one run, on gradients of real steps.

    python benchmarks/optimizers.py [--device cpu|cuda] [--shapes 60m,350m] [--layers 6] [--quick]

Per optimizer: time of a plain step, what a refresh adds, the mean step at T = 200, bytes of state and of temporary
memory. The optimizers are interleaved, so that other load on the machine affects all of them. Writes JSON to
benchmarks/results/ and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parent))
import official as packages
from _common import SIZES, llama, machine, real_gradients, spread, versions, write_result

from hf_lowrank.optim import (
    ApolloAdamW,
    CosmosAdamW,
    Dion2AdamW,
    DionAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    MuonAdamW,
    NorMuonAdamW,
    QGaLoreAdamW,
    param_groups,
)

GAP = 200
TORCH_MUON = "torch's Muon, target matrices alone"
SLOW_ON_CPU = (
    "hf_lowrank Muon",
    "hf_lowrank NorMuon",
    "hf_lowrank Dion",
    "hf_lowrank Dion2",
    "hf_lowrank LDAdam",
    "hf_lowrank COSMOS",
    TORCH_MUON,
)
WITHOUT_REFRESH = ("AdamW", *SLOW_ON_CPU)
Builder = Callable[[int], Optimizer]


def builders_of(model: torch.nn.Module, rank: int, with_official: bool) -> dict[str, Builder]:
    """Each optimizer by name, as a function of its refresh interval."""
    groups = param_groups(model, rank=rank)
    targets = [param for group in groups if group["rank"] for _, param in group["params"]]
    rest = [param for group in groups if not group["rank"] for _, param in group["params"]]

    def ours(optimizer: type[Optimizer], **options: Any) -> Builder:
        return lambda gap: optimizer(param_groups(model, rank=rank, update_proj_gap=gap), lr=1e-5, **options)

    def official(optimizer: type[Optimizer], **options: Any) -> Builder:
        def build(gap: int) -> Optimizer:
            group = {"params": targets, "rank": rank, "update_proj_gap": gap, "proj_type": "std", **options}
            return optimizer([{"params": rest}, group], lr=1e-5, no_deprecation_warning=True)

        return build

    table: dict[str, Builder] = {
        "hf_lowrank GaLore": ours(GaLoreAdamW, subspace="randomized"),
        "hf_lowrank GaLore, exact": ours(GaLoreAdamW, subspace="svd"),
        "hf_lowrank GaLore, cosines": ours(GaLoreAdamW, subspace="dct"),
        "hf_lowrank Q-GaLore": ours(QGaLoreAdamW),
        "hf_lowrank Fira": ours(FiraAdamW, subspace="randomized"),
        "hf_lowrank APOLLO": ours(ApolloAdamW),
        "AdamW foreach": lambda gap: torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True),
        "AdamW fused": lambda gap: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
    }
    # Whose products take seconds on a CPU: there they are left out unless --only names them.
    table |= {
        "hf_lowrank Muon": lambda gap: MuonAdamW(model, lr=1e-5),
        "hf_lowrank NorMuon": lambda gap: NorMuonAdamW(model, lr=1e-5),
        "hf_lowrank Dion": lambda gap: DionAdamW(model, lr=1e-5, rank=rank),
        "hf_lowrank Dion2": lambda gap: Dion2AdamW(model, lr=1e-5),
        "hf_lowrank LDAdam": lambda gap: LDAdamW(model, lr=1e-5, rank=rank, subspace="randomized"),
        "hf_lowrank COSMOS": lambda gap: CosmosAdamW(model, lr=1e-5, subspace="randomized"),
        TORCH_MUON: lambda gap: torch.optim.Muon(targets, lr=1e-5),
    }
    if with_official:
        apollo_torch, fira, galore_torch = map(packages.official, ("apollo_torch", "fira", "galore_torch"))
        table["galore-torch"] = official(galore_torch.GaLoreAdamW, scale=0.25)
        table["fira"] = official(fira.FiraAdamW, alpha=0.25)
        table["apollo-torch"] = official(apollo_torch.APOLLOAdamW, scale=1.0, scale_type="channel", proj="random")
    return table


# Ours over theirs, with the bound on a CPU and on a GPU.
RATIOS = [
    ("mean_step", "hf_lowrank GaLore", "galore-torch", 0.42, 0.15),
    ("mean_step", "hf_lowrank Fira", "fira", 0.33, 0.15),
    ("mean_step", "hf_lowrank APOLLO", "apollo-torch", 0.42, 0.15),
    ("refresh", "hf_lowrank GaLore", "galore-torch", 0.1, 0.05),
    ("mean_step", "hf_lowrank GaLore", "AdamW fused", None, 1.5),
    ("mean_step", "hf_lowrank Fira", "AdamW fused", None, 1.5),
    ("mean_step", "hf_lowrank APOLLO", "AdamW fused", None, 1.5),
]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors of the optimizer, including those in projector objects."""

    def size(value: Any) -> int:
        if torch.is_tensor(value):
            return value.numel() * value.element_size()
        if isinstance(value, (list, tuple)):
            return sum(map(size, value))
        return size(list(vars(value).values())) if hasattr(value, "__dict__") else 0

    return sum(size(value) for state in optimizer.state.values() for value in state.values())


class PeakMemory:
    """Peak memory above that at the start: the allocator's on a GPU, else the process's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = self._peak = _resident()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._stop.set()
            self._thread.join()
            self.bytes = self._peak - self._start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(optimizer: Optimizer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: int | None,
    cycles: int,
    plain: int,
    only: list[str] | None,
) -> dict[str, Any]:
    model = llama(size, layers=layers).to(device)
    sequences = 4 if device.type == "cpu" else 64
    gradients = real_gradients(model, steps=4, keep=2, sequences=sequences)
    model.to(dtype)
    gradients = [[grad.to(dtype) for grad in kept] for kept in gradients]
    params = list(model.parameters())
    builders = builders_of(model, SIZES[size][-1], with_official=True)
    if only:
        builders = {name: builder for name, builder in builders.items() if name in only}
    elif device.type == "cpu":
        builders = {name: builder for name, builder in builders.items() if name not in SLOW_ON_CPU}
    optimizers = {name: builder(plain + 1) for name, builder in builders.items()}

    def use(number: int) -> None:
        for param, grad in zip(params, gradients[number % len(gradients)], strict=True):
            param.grad = grad

    rows: dict[str, dict[str, Any]] = {name: {} for name in optimizers}
    times: dict[str, dict[str, list[float]]] = {name: {"plain": [], "refresh": []} for name in optimizers}
    for cycle in range(cycles + 1):
        use(cycle)
        for name, optimizer in optimizers.items():
            if cycle == 1:
                with PeakMemory(device) as peak:
                    first = timed(optimizer, device)
                rows[name]["peak_bytes_refresh"] = peak.bytes
            else:
                first = timed(optimizer, device)
            with PeakMemory(device) as peak:
                found = [timed(optimizer, device)]
            rows[name]["peak_bytes_plain"] = peak.bytes
            found += [timed(optimizer, device) for _ in range(plain - 1)]
            if cycle:  # the first warms up and chooses the first subspaces
                times[name]["refresh"].append(first)
                times[name]["plain"].extend(found[1:])
            print(
                f"{size} {cycle}/{cycles} {name}: {first:.3f} s, then {min(found):.3f} s", file=sys.stderr, flush=True
            )
    for name, optimizer in optimizers.items():
        row = rows[name]
        row["plain_step"] = spread(times[name]["plain"])
        refresh = [value - row["plain_step"]["median"] for value in times[name]["refresh"]]
        row["refresh"] = None if name.startswith(WITHOUT_REFRESH) else spread(refresh)
        added = max(0.0, row["refresh"]["median"]) / GAP if row["refresh"] else 0.0
        row["mean_step"] = row["plain_step"]["median"] + added
        row["state_bytes"] = state_bytes(optimizer)
    # The process still holds memory from other optimizers' steps; so measure each one alone, without refreshes.
    optimizers.clear()
    for name, builder in builders.items() if device.type == "cpu" else ():
        optimizer = builder(10**9)
        optimizer.step()
        with PeakMemory(device) as peak:
            optimizer.step()
        rows[name]["peak_bytes_plain"] = peak.bytes
    return {
        "size": size,
        "layers": len(model.model.layers),
        "dtype": str(dtype).removeprefix("torch."),
        "optimizers": rows,
        "ratios": ratios(rows, device),
    }


def ratios(rows: dict[str, dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    found = []
    for key, ours, theirs, on_cpu, on_gpu in RATIOS:
        most = on_gpu if device.type == "cuda" else on_cpu
        if ours not in rows or theirs not in rows or most is None:
            continue
        values = [rows[name][key] for name in (ours, theirs)]
        medians = [value["median"] if isinstance(value, dict) else value for value in values]
        ratio = medians[0] / medians[1]
        entry = {"what": key, "ours": ours, "theirs": theirs, "ratio": ratio, "at_most": most, "met": ratio <= most}
        found.append(entry)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| optimizer | plain step, ms | refresh adds, ms | mean step at T = 200, ms | state, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["optimizers"].items():
        plain, refresh = row["plain_step"], row["refresh"]
        half = 1000 * (plain["q3"] - plain["q1"]) / 2
        added = f"{1000 * refresh['median']:.0f}" if refresh else "–"
        lines.append(
            f"| {name} | {1000 * plain['median']:.1f} ± {half:.1f} | {added} | {1000 * row['mean_step']:.1f} "
            f"| {row['state_bytes'] / 2**20:.0f} |"
        )
    for ratio in result["ratios"]:
        verdict = "met" if ratio["met"] else "missed"
        lines.append(
            f"\n{ratio['what']} of {ratio['ours']} over {ratio['theirs']}: {ratio['ratio']:.3f} "
            f"(at most {ratio['at_most']}: {verdict})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="of 60m, 130m, 350m; default: 60m, and on a GPU 350m too")
    parser.add_argument(
        "--layers", type=int, help="fewer than the shape has; the official packages' SVDs take minutes"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, on a GPU bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="names of optimizers, separated by ';'")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--name", help="of the result file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu here: no GPU is available")
    shapes = (options.shapes or ("60m" if device.type == "cpu" else "60m,350m")).split(",")
    unknown = [shape for shape in shapes if shape not in SIZES]
    if unknown:
        parser.error(f"--shapes must be of {', '.join(SIZES)}, got {unknown[0]!r}")
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    cycles, plain = (2, 4) if options.quick else (5, 6)
    results = []
    for shape in shapes:
        only = options.only.split(";") if options.only else None
        results.append(measure(shape, device, dtype, layers=options.layers, cycles=cycles, plain=plain, only=only))
        print(f"\nLLaMA-{shape}, {dtype}, {device}\n\n{table(results[-1])}", flush=True)
        where = {"machine": {**machine(device), "load": os.getloadavg()}, "versions": versions()}
        path = write_result(
            options.name or f"optimizers_{device.type}",
            {**where, "gap": GAP, "quick": options.quick, "results": results},
        )
    print(f"\n{path}")


if __name__ == "__main__":
    main()
