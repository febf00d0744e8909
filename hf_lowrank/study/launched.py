"""The processes of a unit that has several, started by `launcher`.

`python -m hf_lowrank.study.launched launch PARENT FOLDER COUNT THREADS` is accelerate's launcher, and
`... perform PARENT FOLDER` each process that it starts. All of them end with their parent.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from hf_lowrank.compat import silence_torchao
from hf_lowrank.storage.files import write_text
from hf_lowrank.study.executors import die_with, log_to_stderr, perform
from hf_lowrank.study.launcher import CONFIG, UNIT, outcome_file


def launch(folder: Path, count: str, threads: str) -> None:
    """Starts the processes and waits for them; one that fails ends the others."""
    from accelerate.commands.launch import main

    options = ["--config_file", str(folder / CONFIG), "--num_processes", count, "--main_process_port", "0"]
    options += ["--num_cpu_threads_per_process", threads, "--module", "hf_lowrank.study.launched"]
    sys.argv = ["accelerate launch", *options, "perform", str(os.getpid()), str(folder)]
    main()


def perform_here(folder: Path) -> int:
    """Performs the unit in this process; returns the exit status."""
    from hf_lowrank.study.stages import unit_from

    log_to_stderr()
    outcome = perform(unit_from(json.loads((folder / UNIT).read_text(encoding="utf-8"))))
    write_text(outcome_file(folder, int(os.environ["RANK"])), json.dumps(asdict(outcome)))
    return 0 if outcome.reason is None else 1


if __name__ == "__main__":
    role, parent, where, *rest = sys.argv[1:]
    die_with(int(parent))
    silence_torchao()
    if role == "launch":
        launch(Path(where), *rest)
    else:
        sys.exit(perform_here(Path(where)))
