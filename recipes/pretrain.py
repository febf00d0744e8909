"""`hf-lowrank train` in one or several processes of `accelerate launch`, for example

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 8 \
        recipes/pretrain.py recipes/llama_130m/galore.yaml --set training.gradient_accumulation_steps=1 \
        --set training.per_device_train_batch_size=64 --output runs/galore
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from hf_lowrank.errors import STOPPED_STATUS, StoppedError, UserError
from hf_lowrank.memory import memory_recorder
from hf_lowrank.training import load_recipe, pretrain


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a recipe under `accelerate launch`.")
    parser.add_argument("recipe", type=Path, help="a recipe, e.g. recipes/nano/galore.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key"
    )
    parser.add_argument("--seed", type=int, help="override the recipe's seed")
    parser.add_argument("--output", type=Path, help="the run directory")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_lowrank").setLevel(logging.INFO if first else logging.ERROR)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides, seed=arguments.seed)
        run = pretrain(recipe, arguments.output, recorder=memory_recorder)
    except UserError as error:
        if first:
            sys.stderr.write("pretrain.py: " + " ".join(str(error).split()) + "\n")
        sys.exit(2)
    except StoppedError as stop:
        if first:
            sys.stderr.write(f"pretrain.py: {stop}\n")
        sys.exit(STOPPED_STATUS)
    if first:
        sys.stdout.write(f"run directory: {run}\n")


if __name__ == "__main__":
    main()
