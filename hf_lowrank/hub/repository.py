"""A Hub repository as a set of revisions that are whole or not there.

A revision's files go into one commit, and its branch is made at that commit, so nobody sees a part of it. What the
Hub has already is read from its tree first and is not sent again. Every method can be repeated: it looks at what is
there and does the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from hf_lowrank.errors import UserError
from hf_lowrank.hub.contents import MANIFEST, Files, PushFile, is_ours
from hf_lowrank.hub.privacy import one_line
from hf_lowrank.storage.parsing import parse_json

INCOMING = "incoming-"
LOST_UPLOAD = "LFS pointer pointed to a file that does not exist"


class UnreachedError(Exception):
    """The Hub could not be reached, or could not do it now: worth another try."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub's tree lists it; `sha256` only for large ones."""

    size: int
    git_oid: str
    sha256: str | None

    def same(self, file: PushFile) -> bool:
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.git_oid == file.git_oid


def understood(error: Exception, repo_id: str) -> Exception:
    """The error as the caller needs it: `UnreachedError` to try again, `UserError` to give up with a clear line.

    What has nothing to do with the Hub comes back as it is.
    """
    if isinstance(error, UserError | UnreachedError):
        return error
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # how the client wraps a failed upload
        return understood(error.__cause__, repo_id)
    if isinstance(error, HFValidationError):
        return UserError(f"{repo_id}: not a repository id; it must be user/name: {one_line(error)}")
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"{repo_id}: nobody is logged in to the Hub; `hf auth login` does it")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed")
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        return UnreachedError(one_line(error))
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return UserError(f"{repo_id}: the Hub refused the token; `hf auth login` gives a new one")
    if status == 403:
        return UserError(f"{repo_id}: not writable with this token, or the name belongs to somebody else")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return UserError(f"{repo_id}: no such repository on the Hub that you can write to")
    if (status == 400 and LOST_UPLOAD not in str(error)) or "Invalid metadata" in str(error):
        return UserError(f"{repo_id}: the Hub refused it: {one_line(error)}")
    if isinstance(error, HTTPError | OSError | ValueError):  # the last: answers that are cut off or make no sense
        return UnreachedError(one_line(error))
    return error


class Repository:
    """One model repository on the Hub.

    Args:
        repo_id: `user/name`.
        token: for this repository alone; None: the login's.
        endpoint: another Hub; None: `HF_ENDPOINT` or the public one.
    """

    def __init__(self, repo_id: str, *, token: str | None = None, endpoint: str | None = None) -> None:
        self.repo_id = repo_id
        self.api = HfApi(endpoint=endpoint, token=token, library_name="hf_lowrank")
        self._trees: dict[str, dict[str, RemoteFile]] = {}

    def create(self, *, private: bool) -> None:
        """Makes the repository if there is none; an existing one stays as visible as it is."""
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)

    def branches(self) -> dict[str, str]:
        """The commit of every branch."""
        return {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).branches}

    def tree(self, commit: str) -> dict[str, RemoteFile]:
        """All files of a commit; asked for once."""
        if commit not in self._trees:
            listed = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            self._trees[commit] = {
                item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
                for item in listed
                if isinstance(item, RepoFile)
            }
        return self._trees[commit]

    def read(self, path: str, commit: str) -> bytes | None:
        """A small file of a commit; None where there is none."""
        if path not in self.tree(commit):
            return None
        with tempfile.TemporaryDirectory(prefix="hf-lowrank-") as folder:
            return Path(self.api.hf_hub_download(self.repo_id, path, revision=commit, local_dir=folder)).read_bytes()

    def manifest(self, commit: str) -> dict[str, object]:
        """What the revision says about itself; empty for one that somebody else made."""
        data = self.read(MANIFEST, commit)
        try:
            content = parse_json(data) if data is not None else {}
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def differing(self, commit: str, files: Files) -> tuple[list[PushFile], list[str]]:
        """Which files a commit lacks or has otherwise, and which of ours it has too much."""
        there = self.tree(commit)
        changed = [file for path, file in files.items() if path not in there or not there[path].same(file)]
        return changed, [path for path in there if path not in files and is_ours(path)]

    def is_whole(self, commit: str, files: Files) -> bool:
        """Whether a commit holds exactly these files."""
        return self.differing(commit, files) == ([], [])

    def bring(
        self, branch: str, head: str, files: Files, title: str, description: str = "", *, keep: bool = False
    ) -> str:
        """One commit that makes an existing branch hold `files`; none if it does. Returns the branch's commit.

        With `keep`, files of ours that are not among `files` stay.
        """
        changed, extra = self.differing(head, files)
        extra = [] if keep else extra
        if not changed and not extra:
            return head
        additions = [
            CommitOperationAdd(file.path, file.source if isinstance(file.source, bytes) else str(file.source))
            for file in changed
        ]
        commit = self.api.create_commit(
            self.repo_id,
            [*additions, *(CommitOperationDelete(path) for path in extra)],
            commit_message=title,
            commit_description=description,
            revision=branch,
            # Somebody else's commit in between is seen: the Hub refuses, and the next try looks again.
            parent_commit=head,
        )
        return commit.oid

    def publish(
        self,
        branch: str,
        files: Files,
        title: str,
        description: str = "",
        *,
        branches: Mapping[str, str],
        base: str,
        carrier: str | None = None,
    ) -> str:
        """Makes `branch` hold `files`: it appears whole. Returns its commit.

        Args:
            branches: what `branches()` said.
            base: the commit that a new branch starts from; files that it shares are not sent.
            carrier: an existing branch that takes the commit and moves along; None: a temporary one.
        """
        if branch in branches:
            return self.bring(branch, branches[branch], files, title, description)
        temporary = INCOMING + branch
        if carrier is None:
            if temporary not in branches:
                self.api.create_branch(self.repo_id, branch=temporary, revision=base, exist_ok=True)
            head = branches.get(temporary, base)
            commit = self.bring(temporary, head, files, title, description)
        else:
            commit = self.bring(carrier, branches[carrier], files, title, description)
        self.api.create_branch(self.repo_id, branch=branch, revision=commit, exist_ok=True)
        if carrier is None:
            self.remove(temporary)
        return commit

    def remove(self, branch: str) -> None:
        """Deletes a branch if it is there."""
        try:
            self.api.delete_branch(self.repo_id, branch=branch)
        except RevisionNotFoundError:
            return
