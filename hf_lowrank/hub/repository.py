"""A Hub repository whose revisions appear complete or not at all.

A revision's files go into one commit, and its branch is created at that commit. Files that the Hub already has are not
sent again. Every method is idempotent: it checks the current state and does the rest.
"""

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
from huggingface_hub.utils import validate_repo_id

from hf_lowrank.errors import UserError
from hf_lowrank.hub.contents import MANIFEST, Files, PushFile, is_ours
from hf_lowrank.hub.privacy import one_line
from hf_lowrank.storage.parsing import parse_json

INCOMING = "incoming-"
LOST_UPLOAD = "LFS pointer pointed to a file that does not exist"


class UnreachedError(Exception):
    """The Hub could not be reached, or failed temporarily: worth another try."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as listed by the Hub; `sha256` only for large ones."""

    size: int
    git_oid: str
    sha256: str | None

    def same(self, file: PushFile) -> bool:
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.git_oid == file.git_oid


def check_repo_id(repo_id: str) -> None:
    """Raises a `UserError` unless `repo_id` is `user/name` as the Hub allows it."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        shown = one_line(repr(repo_id), limit=100)
        raise UserError(f"{shown}: not a repository id; it must be user/name: {one_line(error)}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r}: not a repository id; it must be user/name, e.g. somebody/llama-60m-galore")


def understood(error: Exception, repo_id: str) -> Exception:
    """Classifies an error: `UnreachedError` to try again, `UserError` to give up with a clear message.

    Errors unrelated to the Hub are returned unchanged.
    """
    if isinstance(error, UserError | UnreachedError):
        return error
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # how the client wraps a failed upload
        return understood(error.__cause__, repo_id)
    if isinstance(error, HFValidationError):
        return UserError(f"{repo_id}: not a repository id; it must be user/name: {one_line(error)}")
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"{repo_id}: not logged in to the Hub; run `hf auth login`")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed")
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        return UnreachedError(one_line(error))
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return UserError(f"{repo_id}: the Hub rejected the token; run `hf auth login` for a new one")
    if status == 403:
        return UserError(f"{repo_id}: no write access with this token, or the name belongs to somebody else")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return UserError(f"{repo_id}: no such repository or bucket on the Hub that you can write to")
    if (status == 400 and LOST_UPLOAD not in str(error)) or "Invalid metadata" in str(error):
        return UserError(f"{repo_id}: the Hub rejected it: {one_line(error)}")
    if isinstance(error, HTTPError | OSError | ValueError):  # ValueError: a truncated or invalid response
        return UnreachedError(one_line(error))
    return error


class Repository:
    """One model repository on the Hub; token and endpoint are by default those of the login and of `HF_ENDPOINT`."""

    def __init__(self, repo_id: str, *, token: str | None = None, endpoint: str | None = None) -> None:
        self.repo_id = repo_id
        self.api = HfApi(endpoint=endpoint, token=token, library_name="hf_lowrank")
        self._trees: dict[str, dict[str, RemoteFile]] = {}

    def create(self, *, private: bool) -> None:
        """Creates the repository if needed; the visibility of an existing one does not change."""
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)

    def branches(self) -> dict[str, str]:
        """The commit of every branch."""
        return {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).branches}

    def tree(self, commit: str) -> dict[str, RemoteFile]:
        """All files of a commit, cached."""
        if commit not in self._trees:
            listed = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            self._trees[commit] = {
                item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
                for item in listed
                if isinstance(item, RepoFile)
            }
        return self._trees[commit]

    def read(self, path: str, commit: str) -> bytes | None:
        """The content of a small file of a commit; None if it does not exist."""
        if path not in self.tree(commit):
            return None
        with tempfile.TemporaryDirectory(prefix="hf-lowrank-") as folder:
            return Path(self.api.hf_hub_download(self.repo_id, path, revision=commit, local_dir=folder)).read_bytes()

    def manifest(self, commit: str) -> dict[str, object]:
        """The manifest of a revision; empty for one that this package did not write."""
        data = self.read(MANIFEST, commit)
        try:
            content = parse_json(data) if data is not None else {}
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def differing(self, commit: str, files: Files) -> tuple[list[PushFile], list[str]]:
        """The files that are missing or different in a commit, and files of ours in it that should not be there."""
        tree = self.tree(commit)
        changed = [file for path, file in files.items() if path not in tree or not tree[path].same(file)]
        return changed, [path for path in tree if path not in files and is_ours(path)]

    def bring(
        self, branch: str, head: str, files: Files, title: str, description: str = "", *, keep: bool = False
    ) -> str:
        """Commits `files` to an existing branch, if they differ; returns the branch's commit.

        With `keep`, other files of ours are kept.
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
            # The Hub rejects this after a commit in between, and the next try starts from that.
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
        """Commits `files` to `branch`, creating it only once it is complete; returns its commit.

        Args:
            branch, files: its name, and everything that it must have.
            title, description: of the commit.
            branches: as returned by `branches()`.
            base: the commit that a new branch starts from; unchanged files are not sent.
            carrier: an existing branch that takes the commit too; None: a temporary one.
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
        """Deletes a branch, if it exists."""
        try:
            self.api.delete_branch(self.repo_id, branch=branch)
        except RevisionNotFoundError:
            return
