"""Time and peak memory of the metrics compared with the forward passes they contain, and with packages from PyPI.

    python benchmarks/geometry.py [--device cpu|cuda] [--shape llama_60m|tiny] [--sequences 8]
        [--only landscape,spectra,…] [--output FILE]

On a GPU only times are measured: memory is that of the process, and the peers are small. Each part runs in its own
process, so that peaks do not mix. Writes JSON with the machine, the versions and the results; a peer that is not
installed is null with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import geometry as g
from hf_lowrank.geometry.spectra import difference_factors, map_threads
from hf_lowrank.measuring.layers import BATCH_TOKENS
from hf_lowrank.targets import target_modules

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama_60m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
}
VOCABULARY = {"tiny": 512, "llama_60m": 32000}
LENGTH = 256
RESULTS = Path(__file__).parent / "results"


def make_model(shape: str, seed: int = 0, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY[shape])).eval().to(device)


def make_loss(shape: str, sequences: int, **options: Any) -> g.TokenLoss:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY[shape], (sequences, LENGTH), generator=generator)
    return g.TokenLoss(ids, **options)


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    start = now()
    for _ in range(repeats):
        work()
    return (now() - start) / repeats


def now() -> float:
    """The clock, after all pending work of a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """A loss that records the time inside the model's forward passes."""

    def __init__(self, loss: Callable[[torch.nn.Module], float]) -> None:
        self.loss, self.inside, self.calls = loss, 0.0, 0

    def __call__(self, model: torch.nn.Module) -> float:
        start = now()
        value = self.loss(model)
        self.inside += now() - start
        self.calls += 1
        return value


def landscape(shape: str, sequences: int, device: str) -> dict[str, Any]:
    """Fraction of the time of metrics 1–6 inside forward passes."""
    model, other = make_model(shape, device=device), make_model(shape, 1, device)
    loss = make_loss(shape, sequences)
    loss(model)
    works: dict[str, Callable[[Timed], Any]] = {
        "random (metrics 1, 2)": lambda timed: g.random_curve(
            model, timed, offsets=g.symmetric_grid(0.003, 5), draws=1
        ),
        "pca (metrics 3, 4)": lambda timed: g.pca_curve(model, timed, offsets=g.symmetric_grid(0.1, 5), count=2),
        "barriers (metrics 5, 6)": lambda timed: g.refined_path(
            lambda positions: g.interpolation_curve(model, other, timed, positions=positions), g.path_grid(9)
        ),
    }
    result = {}
    for name, work in works.items():
        timed = Timed(loss)
        total = seconds(lambda work=work, timed=timed: work(timed))
        result[name] = {
            "seconds": total,
            "evaluations": timed.calls,
            "seconds_in_forward": timed.inside,
            "share_in_forward": timed.inside / total,
        }
    return result


def spectra(shape: str, sequences: int, device: str) -> dict[str, Any]:
    """Metrics 7–13 of all targets of two checkpoints, compared with a loop of float32 svdvals."""
    old, new = (
        [module.weight.detach() for module in target_modules(make_model(shape, seed, device)).values()]
        for seed in (0, 1)
    )

    def plain() -> None:
        for before, after in zip(old, new, strict=True):
            for matrix in (before, after, after - before):
                torch.linalg.svdvals(matrix)

    def derive(sigma: torch.Tensor, delta: torch.Tensor | None) -> None:
        for measure in (g.effective_rank, g.stable_rank, g.spectral_gap, g.singular_value_fraction):
            measure(sigma)
        if delta is not None:
            g.relative_norm(delta, sigma), g.effective_rank(delta), g.stable_rank(delta)

    def ours() -> None:
        def one(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
            before, after = pair
            derive(g.singular_values(before), None)
            derive(g.singular_values(after), g.singular_values(after - before))

        map_threads(one, list(zip(old, new, strict=True)))

    generator = torch.Generator().manual_seed(0)
    pairs = []
    for matrix in old:
        (m, n), r = matrix.shape, min(matrix.shape) // 8
        pairs.append(
            [
                (*(torch.randn(shape, generator=generator).to(device) for shape in ((m, r), (r, n))), 1.0)
                for _ in range(2)
            ]
        )

    def factors() -> None:
        def one(pair: list) -> None:
            before, after = pair
            derive(g.product_singular_values(*before), None)
            derive(g.product_singular_values(*after), g.product_singular_values(*difference_factors(after, before)))

        map_threads(one, pairs)

    ours()
    times = {
        name: min(seconds(work) for _ in range(3))
        for name, work in (("plain", plain), ("ours", ours), ("factors", factors))
    }
    return {
        "matrices": len(old),
        "seconds_plain_svdvals_loop": times["plain"],
        "seconds_metrics_7_to_13": times["ours"],
        "ratio": times["ours"] / times["plain"],
        "seconds_from_factors_of_rank_an_eighth": times["factors"],
        "ratio_from_factors": times["factors"] / times["plain"],
    }


def activations(shape: str, sequences: int, device: str) -> dict[str, Any]:
    """Metrics 14–16, compared with the two models' forward passes."""
    one, other = make_model(shape, device=device), make_model(shape, 1, device)
    loss = make_loss(shape, sequences, batch_tokens=BATCH_TOKENS)
    few = make_loss(shape, min(sequences, 8), batch_tokens=BATCH_TOKENS)

    @torch.no_grad()
    def forwards() -> None:
        for ids, _ in loss.batches(one):
            one(input_ids=ids, use_cache=False)
            other(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def forwards_without_head() -> None:
        for ids, _ in loss.batches(one):
            one.model(input_ids=ids, use_cache=False)
            other.model(input_ids=ids, use_cache=False)

    g.activation_similarity(one, other, list(few.batches(one))[:1])
    before = peak_mib()
    ours = min(seconds(lambda: g.activation_similarity(one, other, loss.batches(one))) for _ in range(2))
    beyond = peak_mib() - before
    pure, headless = (min(seconds(work) for _ in range(2)) for work in (forwards, forwards_without_head))
    return {
        "seconds": ours,
        "seconds_two_forwards": pure,
        "seconds_two_forwards_without_head": headless,
        "ratio": ours / pure,
        "ratio_without_head": ours / headless,
        "tokens": sequences * LENGTH,
        "peak_growth_after_first_batch_mib": beyond,
    }


def activation_memory(shape: str, sequences: int, device: str) -> dict[str, Any]:
    """Memory of metrics 14–16 beyond that of the two models."""
    one, other = make_model(shape), make_model(shape, seed=1)
    loss = make_loss(shape, sequences, batch_tokens=BATCH_TOKENS)
    models = rss_mib()
    with Peak() as peak:
        g.activation_similarity(one, other, loss.batches(one))
    return {"models_mib": models, "beyond_models_mib": peak.mib - models}


def memory(shape: str, sequences: int, mode: str) -> dict[str, Any]:
    """Peak of metrics 1 and 2 in units of a float32 model, without what one batch needs."""
    empty = rss_mib()
    model = make_model(shape)
    size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    loss = make_loss(shape, min(sequences, 16), batch_tokens=512)
    loaded = rss_mib()
    with Peak() as one_batch:
        loss(model)
    with Peak() as peak:
        curve = g.random_curve(model, loss, offsets=g.symmetric_grid(0.003, 1), draws=1, memory=mode)
        g.random_sharpness(curve), g.random_variance(curve)
    batch = one_batch.mib - loaded
    return {
        "model_mib": size,
        "loaded_mib": loaded - empty,
        "one_batch_mib": batch,
        "peak_beyond_empty_mib": peak.mib - empty,
        "models_beside_one_batch": (peak.mib - loaded - batch + size) / size,
    }


def peers(shape: str, sequences: int, device: str) -> dict[str, Any]:
    """The same quantities by PyHessian, WeightWatcher and loss-landscapes, on a small model."""
    result: dict[str, Any] = {}
    for name, work in (
        ("pyhessian", _pyhessian),
        ("weightwatcher", _weightwatcher),
        ("loss_landscapes", _loss_landscapes),
    ):
        try:
            result[name] = work()
        except ImportError as error:
            result[name] = {"result": None, "reason": f"not installed: {error}"}
    return result


def _small_network() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 10)).eval()
    return network, torch.randn(256, 64), torch.randint(0, 10, (256,))


def _pyhessian() -> dict[str, Any]:
    from pyhessian import hessian

    network, x, y = _small_network()
    criterion = torch.nn.CrossEntropyLoss()

    def terms(model: torch.nn.Module) -> Any:
        yield criterion(model(x), y)

    peer = hessian(network, criterion, data=(x, y), cuda=False)
    start = time.perf_counter()
    top = peer.eigenvalues(maxIter=200, tol=1e-6)[0][0]
    trace = sum(peer.trace(maxIter=200, tol=0)) / 200
    middle = time.perf_counter()
    ours = g.hessian_top_eigenvalue(network, terms, iterations=60, tolerance=1e-6)[0]
    our_trace = g.hessian_trace(network, terms, probes=200)
    end = time.perf_counter()
    return {
        "top": float(top), "our_top": ours, "trace": float(trace), "our_trace": our_trace.value,
        "our_trace_interval": [our_trace.low, our_trace.high],
        "seconds": middle - start, "our_seconds": end - middle,
    }  # fmt: skip


def _weightwatcher() -> dict[str, Any]:
    import weightwatcher

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(300, 400, bias=False))
    with torch.no_grad():
        heavy = torch.distributions.StudentT(3.0).sample((400, 300))
        network[0].weight.copy_(heavy * 0.05)
    start = time.perf_counter()
    details = weightwatcher.WeightWatcher(model=network).analyze()
    middle = time.perf_counter()
    sigma = g.singular_values(network[0].weight.detach())
    stable, tail = g.stable_rank(sigma), g.tail_exponent(sigma)
    end = time.perf_counter()
    return {
        "stable_rank": float(details.stable_rank.iloc[0]), "our_stable_rank": stable,
        "tail_exponent": float(details.alpha.iloc[0]), "our_tail_exponent": tail,
        "seconds": middle - start, "our_seconds": end - middle,
    }  # fmt: skip


def _loss_landscapes() -> dict[str, Any]:
    import loss_landscapes
    import loss_landscapes.metrics

    network, x, y = _small_network()
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 10)).eval()
    criterion = torch.nn.CrossEntropyLoss()
    steps = 20
    start = time.perf_counter()
    # loss_landscapes moves the first model itself and does not restore it.
    metric = loss_landscapes.metrics.Loss(criterion, x, y)
    theirs = loss_landscapes.linear_interpolation(copy.deepcopy(network), other, metric, steps)
    middle = time.perf_counter()
    # Its grid begins one step after the start and includes the end.
    positions = [(i + 1) / steps for i in range(steps)]
    ours = g.interpolation_curve(network, other, lambda m: float(criterion(m(x), y)), positions=positions)
    end = time.perf_counter()
    return {
        "largest_difference": float((torch.as_tensor(theirs).double() - ours).abs().max()),
        "seconds": middle - start,
        "our_seconds": end - middle,
    }


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Peak:
    """The peak resident memory within the block, as the kernel reports it."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *error: object) -> None:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        self.mib = int(line.split()[1]) / 1024


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "landscape": landscape,
    "spectra": spectra,
    "activations": activations,
    "activation_memory": activation_memory,
    "memory_copy": lambda shape, sequences, device: memory(shape, sequences, "copy"),
    "memory_low": lambda shape, sequences, device: memory(shape, sequences, "low"),
    "peers": peers,
}


ON_A_GPU = ("landscape", "spectra", "activations")


def run_part(name: str, shape: str, sequences: int, device: str, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    queue.put(PARTS[name](shape, sequences, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama_60m")
    parser.add_argument("--sequences", type=int, default=16, help=f"of {LENGTH} tokens")
    parser.add_argument("--only", help="parts, comma-separated; default: all, on a GPU " + ",".join(ON_A_GPU))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("--device must be cpu here: no GPU is available")
    output = arguments.output or RESULTS / ("geometry.json" if on_cpu else "geometry_cuda.json")
    parts = arguments.only.split(",") if arguments.only else PARTS if on_cpu else ON_A_GPU
    report: dict[str, Any] = {
        "device": arguments.device if on_cpu else torch.cuda.get_device_name(),
        "shape": arguments.shape,
        "sequences": arguments.sequences,
        "sequence_length": LENGTH,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "parts": {},
    }
    context = multiprocessing.get_context("spawn")
    for name in parts:
        queue = context.Queue()
        process = context.Process(
            target=run_part,
            args=(name, arguments.shape, arguments.sequences, arguments.device, arguments.threads, queue),
        )
        process.start()
        while process.is_alive() and queue.empty():
            time.sleep(0.05)
        report["parts"][name] = queue.get(timeout=5)
        process.join()
        print(name, json.dumps(report["parts"][name], indent=1))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
