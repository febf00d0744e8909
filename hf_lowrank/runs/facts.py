"""`facts.json` of a run directory: what training records about the run and its cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.layout import FACTS
from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json


def read_facts(run: Path) -> dict[str, Any]:
    """The facts of a run; empty where none were recorded.

    Raises:
        UserError: the file is damaged.
    """
    file = run / FACTS
    if not file.is_file():
        return {}
    try:
        return unsealed(parse_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: damaged: {one_line(error)}; remove it, and the run continues without its record of costs"
        ) from None


def write_facts(run: Path, facts: dict[str, Any]) -> None:
    """Writes the facts of a run, replacing the file in one piece."""
    write_text(run / FACTS, json.dumps(sealed(facts), indent=2) + "\n")
