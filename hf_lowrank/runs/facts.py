"""`facts.json` of a run directory: what training records about the run and what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_lowrank.errors import UserError
from hf_lowrank.storage.checksums import sealed, unsealed
from hf_lowrank.storage.files import write_text
from hf_lowrank.storage.parsing import parse_json

FILE_NAME = "facts.json"


def read_facts(run: Path) -> dict[str, Any]:
    """What `facts.json` of a run directory says, nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    file = run / FILE_NAME
    if not file.is_file():
        return {}
    try:
        return unsealed(parse_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: damaged: {said}; remove it, and the run goes on without its record of costs"
        ) from None


def write_facts(run: Path, facts: dict[str, Any]) -> None:
    """Writes `facts.json`, whole."""
    write_text(run / FILE_NAME, json.dumps(sealed(facts), indent=2) + "\n")
