"""Repositories on disk as the loopback Hub keeps them: blobs, commits, branches, tags, large files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from tests.hub.refusals import RefusedError
from tests.hub.xet import Buckets

INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Store:
    """All repositories under one folder. Every change is written before it is answered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.buckets = Buckets(root)
        (root / "lfs").mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        (root / "commits").mkdir(exist_ok=True)
        (root / "repos").mkdir(exist_ok=True)

    # -- repositories

    def _file(self, repo: str) -> Path:
        return self.root / "repos" / (repo.replace("/", "--") + ".json")

    def exists(self, repo: str) -> bool:
        return self._file(repo).is_file()

    def repo(self, repo: str) -> dict[str, Any]:
        if not self.exists(repo):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return json.loads(self._file(repo).read_text())

    def _write(self, repo: str, state: dict[str, Any]) -> None:
        temporary = self._file(repo).with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._file(repo))

    def create(self, repo: str, private: bool) -> None:
        with self.lock:
            if self.exists(repo):
                raise RefusedError(409, "You already created this model repo")
            files = {path: self.add_blob(data) for path, data in INITIAL.items()}
            oid = self._add_commit({"repo": repo, "parent": None, "title": "initial commit", "files": files})
            self._write(repo, {"private": private, "branches": {"main": oid}, "tags": {}})

    # -- objects

    def add_blob(self, data: bytes) -> dict[str, Any]:
        oid = git_oid(data)
        (self.root / "blobs" / oid).write_bytes(data)
        return {"oid": oid, "size": len(data)}

    def has_lfs(self, oid: str) -> bool:
        return (self.root / "lfs" / oid).is_file()

    def add_lfs(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, "content does not have the announced SHA-256")
        temporary = self.root / "lfs" / f".{oid}.{threading.get_ident()}"
        temporary.write_bytes(data)
        os.replace(temporary, self.root / "lfs" / oid)

    def lfs_entry(self, oid: str) -> dict[str, Any]:
        size = (self.root / "lfs" / oid).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        return {
            "oid": git_oid(pointer),
            "size": size,
            "lfs": {"oid": oid, "size": size, "pointerSize": len(pointer)},
        }

    def content(self, entry: dict[str, Any]) -> bytes:
        if "lfs" in entry:
            return (self.root / "lfs" / entry["lfs"]["oid"]).read_bytes()
        return (self.root / "blobs" / entry["oid"]).read_bytes()

    def _add_commit(self, commit: dict[str, Any]) -> str:
        text = json.dumps(commit, sort_keys=True)
        oid = hashlib.sha1(text.encode()).hexdigest()
        (self.root / "commits" / oid).write_text(text)
        return oid

    def commit_at(self, oid: str) -> dict[str, Any]:
        return json.loads((self.root / "commits" / oid).read_text())

    # -- revisions

    def resolve(self, repo: str, revision: str) -> str:
        """The commit that a branch, a tag or a commit id names."""
        state = self.repo(repo)
        for table in (state["branches"], state["tags"]):
            if revision in table:
                return table[revision]
        if len(revision) == 40 and (self.root / "commits" / revision).is_file():
            return revision
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, repo: str, revision: str) -> dict[str, dict[str, Any]]:
        return self.commit_at(self.resolve(repo, revision))["files"]

    def history(self, repo: str, revision: str) -> list[dict[str, Any]]:
        oid: str | None = self.resolve(repo, revision)
        found = []
        while oid is not None:
            commit = self.commit_at(oid)
            found.append({"id": oid, **commit})
            oid = commit["parent"]
        return found

    def commit(
        self, repo: str, branch: str, operations: list[dict[str, Any]], title: str, message: str, parent: str | None
    ) -> str:
        """Adds one commit to a branch, all of it or nothing."""
        with self.lock:
            state = self.repo(repo)
            if branch not in state["branches"]:
                raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = state["branches"][branch]
            if parent is not None and not head.startswith(parent):
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(self.commit_at(head)["files"])
            for operation in operations:
                self._apply(files, operation)
            oid = self._add_commit(
                {
                    "repo": repo,
                    "parent": head,
                    "title": title,
                    "message": message,
                    "files": dict(sorted(files.items())),
                }
            )
            state["branches"][branch] = oid
            self._write(repo, state)
            return oid

    def _apply(self, files: dict[str, dict[str, Any]], operation: dict[str, Any]) -> None:
        kind, path = operation["key"], operation["path"]
        if kind == "file":
            files[path] = self.add_blob(operation["data"])
        elif kind == "lfsFile":
            if not self.has_lfs(operation["oid"]):
                raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = self.lfs_entry(operation["oid"])
        elif kind == "deletedFile":
            if path not in files:
                raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

    def create_ref(self, repo: str, table: str, name: str, start: str | None) -> None:
        with self.lock:
            state = self.repo(repo)
            if name in state[table]:
                raise RefusedError(409, f"Reference already exists: {name}")
            state[table][name] = self.resolve(repo, start or "main")
            self._write(repo, state)

    def delete_ref(self, repo: str, table: str, name: str) -> None:
        with self.lock:
            state = self.repo(repo)
            if name not in state[table]:
                raise RefusedError(404, f"Reference not found: {name}", "RevisionNotFound")
            if table == "branches" and name == "main":
                raise RefusedError(403, "Cannot delete the default branch")
            del state[table][name]
            self._write(repo, state)
