"""Estimated peaks of a training step at 350M and 7B, which README shows.

    python benchmarks/memory_examples.py

Nothing is trained: the steps run on tensors without memory.
"""

from pathlib import Path

from _common import versions, write_result

from hf_lowrank.memory import estimate

RECIPES = Path(__file__).parent.parent / "recipes"
METHODS = ("full_rank", "galore", "apollo_mini", "q_galore")
BATCHES = {"350m": 16, "7b": 1}
KEPT = (
    "batch_size", "sequence_length", "gradient_checkpointing", "weights", "gradients", "optimizer_state",
    "activations", "peak",
)  # fmt: skip


def main() -> None:
    estimates = {}
    for size, batch in BATCHES.items():
        estimates[size] = {}
        for method in METHODS:
            recipe = RECIPES / f"llama_{size}" / f"{method}.yaml"
            found = estimate(recipe, batch_size=batch, dtype="bfloat16", device="cpu")
            estimates[size][method] = {key: getattr(found, key) for key in KEPT}
            print(f"{size:5} {method:12} {found.peak / 2**30:6.1f} GiB", flush=True)
    write_result("memory_examples", {"dtype": "bfloat16", "estimates": estimates, "versions": versions()})


if __name__ == "__main__":
    main()
