"""The application that commands register with, and what is set up before each of them."""

import logging
import os

import typer

from hf_lowrank.compat import silence_torchao
from hf_lowrank.formats import hide_hub_progress_bars, is_first_process

app = typer.Typer(
    name="hf-lowrank",
    help="Pre-train with low-rank methods, measure which solution was found, and report it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def prepare() -> None:
    """Pre-train with low-rank methods, measure which solution was found, and report it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hide_hub_progress_bars()
    silence_torchao()
    logger = logging.getLogger("hf_lowrank")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hf-lowrank: %(message)s"))
        logger.addHandler(handler)
        # The processes of a launch log the same lines; one of them prints them.
        logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
