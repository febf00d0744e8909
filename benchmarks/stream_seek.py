"""What it costs to go on from a place late in a stream: against reading to it, and against the start of a stream.

python benchmarks/stream_seek.py --records 1000000
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import machine, spread, versions, write_result

from hf_lowrank.training.recipe import DataSettings
from hf_lowrank.training.sources import hub_stream

TEXT = "record {number}: a few words of text that stand for a short document"


def write_records(folder: Path, records: int, files: int) -> None:
    """JSON-lines files with `records` in all."""
    each = records // files
    for number in range(files):
        with (folder / f"train-{number:03d}.jsonl").open("w") as file:
            for place in range(number * each, (number + 1) * each):
                file.write(json.dumps({"text": TEXT.format(number=place)}) + "\n")


def seconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return spread(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = {}
    for files in (1, 16):
        with tempfile.TemporaryDirectory() as place:
            write_records(Path(place), args.records, files)
            data = DataSettings(
                source="hub", dataset=place, streaming=True, shape="packed", sequence_length=128, tokenizer="any"
            )
            late = args.records // files * files * 95 // 100
            begin = time.perf_counter()
            for document in hub_stream(data, "train").read(0, None):
                if document.number == late:
                    break
            reading = time.perf_counter() - begin

            def first(documents: int, state: object, data: DataSettings = data) -> str:
                return next(iter(hub_stream(data, "train").read(documents, state))).text

            assert first(late, document.before) == document.text == TEXT.format(number=late)
            results[f"{files} files"] = {
                "records": args.records, "place": late, "reading_s": reading,
                "seek_s": seconds(lambda late=late, state=document.before: first(late, state), args.repeats),
                "start_s": seconds(lambda: first(0, None), args.repeats),
            }  # fmt: skip
            print(files, "files:", json.dumps(results[f"{files} files"]))
    write_result("stream_seek", {**results, "machine": machine(torch.device("cpu")), "versions": versions()})


if __name__ == "__main__":
    main()
