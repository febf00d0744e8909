"""Xet storage as buckets use it, from its public specification: xorbs of compressed chunks, and shards that say of
which chunks a file consists.

A hash is written as four little-endian numbers of 64 bits. Compressed chunks are decoded only by `Xet.content`, which
shares nothing with the client: the drill compares with it.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path
from typing import Any, NamedTuple

from tests.hub.refusals import RefusedError

ENTRY = 48
VERIFICATION, METADATA = 1 << 31, 1 << 30
END = b"\xff" * 32


class Chunk(NamedTuple):
    """A chunk of a xorb: where it lies with its header, how it is compressed, and its size."""

    start: int
    end: int
    scheme: int
    size: int


def hash_text(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def chunks_of(xorb: bytes) -> list[Chunk]:
    """The chunks of a xorb; a footer, which clients may send, ends them."""
    found, at = [], 0
    while at < len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        version, scheme = xorb[at], xorb[at + 4]
        packed, size = (int.from_bytes(xorb[at + k : at + k + 3], "little") for k in (1, 5))
        if version != 0 or scheme > 2 or at + 8 + packed > len(xorb):
            raise RefusedError(400, f"not a xorb: chunk {len(found)}")
        found.append(Chunk(at, at + 8 + packed, scheme, size))
        at += 8 + packed
    return found


def unpacked(xorb: bytes, chunk: Chunk) -> bytes:
    data = xorb[chunk.start + 8 : chunk.end]
    if chunk.scheme:
        import pyarrow

        data = pyarrow.decompress(data, decompressed_size=chunk.size, codec="lz4", asbytes=True)
    if chunk.scheme == 2:  # the bytes of each group of four were sorted by their place in it
        whole, at = bytearray(chunk.size), 0
        for place in range(4):
            count = len(range(place, chunk.size, 4))
            whole[place::4] = data[at : at + count]
            at += count
        data = bytes(whole)
    assert len(data) == chunk.size
    return data


def files_of(shard: bytes) -> dict[str, list[tuple[str, int, int, int]]]:
    """The files of a shard: (xorb, first chunk, chunk after the last, bytes) of each piece."""
    found: dict[str, list[tuple[str, int, int, int]]] = {}
    at = ENTRY
    while shard[at : at + 32] != END:
        name = hash_text(shard[at : at + 32])
        flags, count = struct.unpack("<2I", shard[at + 32 : at + 40])
        pieces = [shard[at + ENTRY * k : at + ENTRY * (k + 1)] for k in range(1, count + 1)]
        found[name] = []
        for piece in pieces:
            _, size, first, end = struct.unpack("<4I", piece[32:48])
            found[name].append((hash_text(piece[:32]), first, end, size))
        at += ENTRY * (1 + count + (count if flags & VERIFICATION else 0) + (1 if flags & METADATA else 0))
    return found


class Xet:
    """The storage under one folder. Every change is written before it is answered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("xorbs", "xet-files"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def _write(self, file: Path, data: bytes) -> None:
        temporary = file.with_name(f".{file.name}.{threading.get_ident()}")
        temporary.write_bytes(data)
        os.replace(temporary, file)

    def add_xorb(self, name: str, data: bytes) -> bool:
        chunks_of(data)
        there = (self.root / "xorbs" / name).is_file()
        self._write(self.root / "xorbs" / name, data)
        return not there

    def xorb(self, name: str) -> bytes:
        file = self.root / "xorbs" / name
        if not file.is_file():
            raise RefusedError(404, f"no such xorb: {name}")
        return file.read_bytes()

    def add_shard(self, data: bytes) -> None:
        """Registers its files.

        A shard that names chunks that are not there is refused.
        """
        files = files_of(data)
        for name, pieces in files.items():
            for xorb, first, end, size in pieces:
                if not (self.root / "xorbs" / xorb).is_file():
                    raise RefusedError(400, f"file {name} needs xorb {xorb}, which is not there")
                if sum(chunk.size for chunk in chunks_of(self.xorb(xorb))[first:end]) != size:
                    raise RefusedError(400, f"file {name}: chunks {first} to {end} of {xorb} have other sizes")
        for name, pieces in files.items():
            self._write(self.root / "xet-files" / f"{name}.json", json.dumps(pieces).encode())

    def pieces(self, name: str) -> list[tuple[str, int, int, int]]:
        file = self.root / "xet-files" / f"{name}.json"
        if not file.is_file():
            raise RefusedError(404, f"no such file: {name}")
        return [tuple(piece) for piece in json.loads(file.read_text())]

    def size(self, name: str) -> int:
        return sum(size for *_, size in self.pieces(name))

    def content(self, name: str) -> bytes:
        return b"".join(
            unpacked(data, chunk)
            for xorb, first, end, _ in self.pieces(name)
            for data in [self.xorb(xorb)]
            for chunk in chunks_of(data)[first:end]
        )

    def reconstruction(self, name: str, url: str, wanted: tuple[int, int]) -> dict[str, Any]:
        """How to get the bytes from `wanted[0]` to before `wanted[1]`, in whole chunks."""
        terms, fetch, offset, at = [], {}, None, 0
        for xorb, first, end, _ in self.pieces(name):
            chunks = chunks_of(self.xorb(xorb))
            taken = []
            for number in range(first, end):
                if at < wanted[1] and at + chunks[number].size > wanted[0]:
                    taken.append(number)
                    offset = wanted[0] - at if offset is None else offset
                at += chunks[number].size
            if taken:
                some = {"start": taken[0], "end": taken[-1] + 1}
                size = sum(chunks[number].size for number in taken)
                place = {"start": chunks[taken[0]].start, "end": chunks[taken[-1]].end - 1}
                terms.append({"hash": xorb, "unpacked_length": size, "range": some})
                fetch.setdefault(xorb, []).append({"range": some, "url": f"{url}/{xorb}", "url_range": place})
        if not terms:
            raise RefusedError(416, "range not satisfiable")
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}


class Buckets:
    """Buckets under one folder: their files by path, each a name in `Xet`."""

    def __init__(self, root: Path) -> None:
        self.root = root / "buckets"
        self.root.mkdir(parents=True, exist_ok=True)
        self.xet = Xet(root)
        self.lock = threading.RLock()

    def _file(self, bucket: str) -> Path:
        return self.root / (bucket.replace("/", "--") + ".json")

    def exists(self, bucket: str) -> bool:
        return self._file(bucket).is_file()

    def bucket(self, bucket: str) -> dict[str, Any]:
        if not self.exists(bucket):
            raise RefusedError(404, "Bucket not found", "BucketNotFound")
        return json.loads(self._file(bucket).read_text())

    def _write(self, bucket: str, state: dict[str, Any]) -> None:
        temporary = self._file(bucket).with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._file(bucket))

    def create(self, bucket: str, private: bool) -> None:
        with self.lock:
            if self.exists(bucket):
                raise RefusedError(409, "You already created this bucket")
            self._write(bucket, {"private": private, "files": {}})

    def files(self, bucket: str) -> dict[str, dict[str, Any]]:
        return self.bucket(bucket)["files"]

    def content(self, bucket: str, path: str) -> bytes:
        return self.xet.content(self.files(bucket)[path]["xetHash"])

    def batch(self, bucket: str, operations: list[dict[str, Any]]) -> list[dict[str, str]]:
        """Applies what can be applied; returns what failed."""
        failed = []
        with self.lock:
            state = self.bucket(bucket)
            for operation in operations:
                path = operation["path"]
                try:
                    if operation["type"] == "addFile":
                        name = operation["xetHash"]
                        entry = {"xetHash": name, "size": self.xet.size(name), "mtime": operation["mtime"]}
                        state["files"][path] = entry
                    elif operation["type"] == "deleteFile":
                        if path not in state["files"]:
                            raise RefusedError(404, "file does not exist")
                        del state["files"][path]
                    else:
                        raise RefusedError(400, f"unknown operation {operation['type']}")
                except RefusedError as error:
                    failed.append({"path": path, "error": error.message})
            self._write(bucket, state)
        return failed
