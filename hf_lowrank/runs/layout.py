"""The names of files and folders in a run directory.

RUN/
  recipe.yaml               the resolved recipe
  facts.json                what training records about the run and its cost
  evaluation.safetensors    the held-out sequences
  tokenizer/
  checkpoint-N/             as Trainer saves it, with checksums.json written last
  measurements.jsonl        one row per measurement
  downstream.jsonl          one row per downstream score
  downstream/step-N/TASK.jsonl   the scores of single items
"""

import re
from pathlib import Path

from hf_lowrank.storage import checksums

RECIPE = "recipe.yaml"
FACTS = "facts.json"
EVALUATION_SET = "evaluation.safetensors"
TOKENIZER = "tokenizer"
MEASUREMENTS = "measurements.jsonl"
SCORES = "downstream.jsonl"
ITEM_SCORES = "downstream"

# In a checkpoint.
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"
PICKLES = "*_model*.bin"
# In a checkpoint that holds an adapter of PEFT and no model.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINER_STATE = "trainer_state.json"
CHECKSUMS = checksums.FILE_NAME
OPTIMIZER, SCHEDULER, SCALER, RANDOM_STATES = "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"
# Where a stream of text goes on, and the mark of a checkpoint off the schedule, which a stopped run wrote.
STREAM_PLACE, INTERIM = "stream.json", "interim.json"
# What Trainer writes for a sharded model instead of optimizer.pt; the metadata of each comes last.
SHARDED_STATE = ("pytorch_model_fsdp_0", "optimizer_0")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)

# What a study writes from the tables of its runs.
PREDICTION = "prediction.json"

STEP_FOLDER = re.compile(r"(?:checkpoint|(?:global_?)?step)[-_]?(\d+)")


def checkpoint_folder(run: Path, step: int) -> Path:
    """`checkpoint-N` of a run directory."""
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps of a folder `checkpoint-N`; 0 for a name without a number."""
    match = re.search(r"(\d+)$", checkpoint.name)
    return int(match[1]) if match else 0


def has_checksums(run: Path) -> bool:
    """Whether the checkpoints of `run` end with checksums."""
    return any(run.glob(f"checkpoint-*/{CHECKSUMS}"))


def step_folders(run: Path) -> dict[int, Path]:
    """The folders in `run` that are named like checkpoints (`checkpoint-N`, `step-N`), in step order."""
    if not run.is_dir():
        return {}
    named = ((STEP_FOLDER.fullmatch(folder.name), folder) for folder in sorted(run.iterdir()))
    return dict(sorted((int(match[1]), folder) for match, folder in named if match and folder.is_dir()))
