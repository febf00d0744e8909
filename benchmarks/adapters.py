"""Our layers beside a dense linear layer, PEFT's LoRA, and SLTrain as one would write it straight away.

    python benchmarks/adapters.py [--device cpu|cuda] [--shapes 60m,350m] [--tokens 2048] [--quick]

Per layer shape and per model: time of forward and backward together, memory kept between them, and peak memory above
what was there before. All take turns, so that what else the machine does falls on all. The result goes to
benchmarks/results/ as JSON, and as a Markdown table to the terminal.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _common import LENGTH, SIZES, VOCABULARY, llama, machine, spread, versions, write_result

from hf_lowrank.adapters import CoLAConfig, LowRankConfig, LowRankForCausalLM, SLTrainConfig
from hf_lowrank.adapters.layers import CoLALinear, SLTrainLinear
from hf_lowrank.adapters.tuners import SLTrainModel

SPARSITY, ALPHA = 0.03, 32
# What is asked of a layer's time, relative to the dense linear's: the sum over a block's seven shapes, on CPU.
ASKED = {"SLTrain": 1.25, "CoLA": 1.0}


class NaiveSLTrain(nn.Module):
    """Builds W densely and leaves the rest to autograd, which keeps W and makes its dense gradient."""

    def __init__(self, layer: SLTrainLinear) -> None:
        super().__init__()
        self.A, self.B, self.values = (nn.Parameter(p.detach().clone()) for p in layer.parameters())
        self.register_buffer("support", layer.sltrain_support["default"].long())
        self.scaling = layer.scaling["default"]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scaling * (self.B @ self.A)
        weight = weight.flatten().index_put((self.support,), self.values, accumulate=True).view_as(weight)
        return nn.functional.linear(x, weight)


def layers(out: int, fan_in: int, r: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    def linear() -> nn.Linear:
        return nn.Linear(fan_in, out, bias=False, device=device, dtype=dtype)

    def replaced(kind: type, options: dict[str, Any]) -> Any:
        layer = kind(linear(), "layer")
        layer.update_layer("default", r, init="random", seed=0, weight=None, options=options)
        return layer

    sltrain = replaced(SLTrainLinear, {"scaling": ALPHA / r, "sparsity": SPARSITY})
    lora = LoraLinear(linear(), "default", config=LoraConfig(r=r, lora_alpha=ALPHA), r=r, lora_alpha=ALPHA).to(dtype)
    lora.get_base_layer().requires_grad_(False)
    return {
        "dense": linear(),
        "LoRA (PEFT)": lora,
        "SLTrain, naive": NaiveSLTrain(sltrain),
        "SLTrain": sltrain,
        "CoLA": replaced(CoLALinear, {"bottleneck_act": "silu", "keep_bottleneck": False}),
    }


def naive(model: nn.Module) -> nn.Module:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SLTrainModel.tuner_layer_cls):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, NaiveSLTrain(layer))
    return model


def models(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    r = SIZES[size][-1]

    def adapted(config: Any) -> nn.Module:
        return LowRankForCausalLM(LowRankConfig(base_config=llama(size).config, adapter_config=config))

    sltrain = SLTrainConfig(r=r, lora_alpha=ALPHA, sparsity=SPARSITY)
    builders: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: llama(size),
        "LoRA (PEFT)": lambda: adapted(LoraConfig(r=r, lora_alpha=ALPHA)),
        "SLTrain, naive": lambda: naive(adapted(sltrain)),
        "SLTrain": lambda: adapted(sltrain),
        "CoLA": lambda: adapted(CoLAConfig(r=r)),
        "CoLA-M": lambda: adapted(CoLAConfig(r=r, checkpoint_activations=True)),
    }
    return {name: lambda build=build: build().to(device, dtype).train() for name, build in builders.items()}


def layer_step(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], Callable[[], None]]:
    """A function that runs forward and gives one that runs backward."""

    def forward() -> Callable[[], None]:
        y = layer(x)
        return lambda: y.backward(upstream)

    return forward


def model_step(model: nn.Module, ids: Tensor) -> Callable[[], Callable[[], None]]:
    def forward() -> Callable[[], None]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss.backward

    return forward


def clear(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def timed(forward: Callable[[], Callable[[], None]], leaves: list[Tensor], device: torch.device) -> float:
    clear(leaves)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    forward()()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(forward: Callable[[], Callable[[], None]], leaves: list[Tensor], device: torch.device) -> dict[str, int]:
    """Bytes kept between forward and backward, and the peak over both; gradients of the leaves are in the peak."""
    clear(leaves)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        backward = forward()
        kept = torch.cuda.memory_allocated() - start
        backward()
        return {"kept_bytes": kept, "peak_bytes": torch.cuda.max_memory_allocated() - start}
    kept, high, backward = _allocations(forward)
    _, more, _ = _allocations(backward)
    return {"kept_bytes": kept, "peak_bytes": max(high, kept + more)}


def _allocations(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """What torch's CPU allocator gave out and took back during `function`: the balance at the end, and the highest."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    balance = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        balance += event.nbytes()
        highest = max(highest, balance)
    return balance, highest, result


def take_turns(
    entries: dict[str, tuple[Callable[[], Callable[[], None]], list[Tensor]]], rounds: int, device: torch.device
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(rounds + 2):
        for name, (forward, leaves) in entries.items():
            taken = timed(forward, leaves, device)
            if turn > 1:  # the first two warm up
                seconds[name].append(taken)
    rows = {}
    for name, (forward, leaves) in entries.items():
        rows[name] = {"seconds": spread(seconds[name]), **memory(forward, leaves, device)}
        clear(leaves)
    for row in rows.values():
        row["time_over_dense"] = row["seconds"]["median"] / rows["dense"]["seconds"]["median"]
    return rows


def measure(
    size: str, device: torch.device, dtype: torch.dtype, *, tokens: int, rounds: int, whole: bool
) -> dict[str, Any]:
    hidden, mlp, _, _, r = SIZES[size]
    shapes = {"q_proj": (hidden, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    counts = {"q_proj": 4, "up_proj": 2, "down_proj": 1}
    per_layer = {}
    for name, (out, fan_in) in shapes.items():
        x = torch.randn(tokens, fan_in, device=device, dtype=dtype, requires_grad=True)
        upstream = torch.randn(tokens, out, device=device, dtype=dtype)
        entries = {
            kind: (layer_step(layer, x, upstream), [x, *layer.parameters()])
            for kind, layer in layers(out, fan_in, r, device, dtype).items()
        }
        per_layer[name] = {"out": out, "in": fan_in, "rows": take_turns(entries, rounds, device)}
    kinds = per_layer["q_proj"]["rows"]
    block = {
        kind: sum(counts[name] * shape["rows"][kind]["seconds"]["median"] for name, shape in per_layer.items())
        for kind in kinds
    }
    result: dict[str, Any] = {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "rank": r,
        "sparsity": SPARSITY,
        "layers": per_layer,
        "block_time_over_dense": {kind: seconds / block["dense"] for kind, seconds in block.items()},
    }
    if whole:
        # A quarter of the layers' tokens: a whole model's step is long enough as it is.
        ids = torch.randint(VOCABULARY, (max(1, tokens // 4 // LENGTH), LENGTH), device=device)
        result["model_tokens"] = ids.numel()
        built = {kind: build() for kind, build in models(size, device, dtype).items()}
        entries = {
            kind: (model_step(model, ids), [p for p in model.parameters() if p.requires_grad])
            for kind, model in built.items()
        }
        result["model"] = take_turns(entries, max(3, rounds // 4), device)
    return result


def table(result: dict[str, Any]) -> str:
    def line(place: str, kind: str, row: dict[str, Any]) -> str:
        seconds = row["seconds"]
        half = 1000 * (seconds["q3"] - seconds["q1"]) / 2
        return (
            f"| {place} | {kind} | {1000 * seconds['median']:.2f} ± {half:.2f} | {row['time_over_dense']:.2f} "
            f"| {row['kept_bytes'] / 2**20:.1f} | {row['peak_bytes'] / 2**20:.1f} |"
        )

    lines = ["| | | forward + backward, ms | over dense | kept, MiB | peak, MiB |", "|---|---|---|---|---|---|"]
    for name, shape in result["layers"].items():
        place = f"{name} {shape['out']} × {shape['in']}"
        lines += [line(place, kind, row) for kind, row in shape["rows"].items()]
    lines += [line("model", kind, row) for kind, row in result.get("model", {}).items()]
    for kind, ratio in result["block_time_over_dense"].items():
        asked = f" (asked: at most {ASKED[kind]})" if kind in ASKED else ""
        lines.append(f"\nA block's seven layers, {kind}: {ratio:.3f} of the dense time{asked}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="of 60m, 130m, 350m; default: 60m, and on a GPU 350m too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, on a GPU bfloat16")
    parser.add_argument("--tokens", type=int, help="default: 2048, on a GPU 32768")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="repeats of each layer; default: 21, quick 5")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, layers only")
    parser.add_argument("--name", help="of the result file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu here: no GPU is available")
    on_cpu = device.type == "cpu"
    shapes = (options.shapes or ("60m" if on_cpu else "60m,350m")).split(",")
    unknown = [shape for shape in shapes if shape not in SIZES]
    if unknown:
        parser.error(f"--shapes must be of {', '.join(SIZES)}, got {unknown[0]!r}")
    dtype = getattr(torch, options.dtype or ("float32" if on_cpu else "bfloat16"))
    tokens = options.tokens or (2048 if on_cpu else 32768)
    results = []
    for shape in shapes:
        rounds = options.rounds or (5 if options.quick else 21)
        results.append(measure(shape, device, dtype, tokens=tokens, rounds=rounds, whole=not options.quick))
        print(f"\nLLaMA-{shape}, {dtype}, {device}, {tokens} tokens\n\n{table(results[-1])}")
    name = options.name or f"adapters_{device.type}"
    content = {"machine": machine(device), "versions": versions(), "quick": options.quick, "results": results}
    print(f"\n{write_result(name, content)}")


if __name__ == "__main__":
    main()
