"""A folder of a Hub bucket: storage without commits, for what is written often and published by nobody."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import BucketFile, HfApi
from huggingface_hub.errors import EntryNotFoundError

from hf_lowrank.errors import UserError
from hf_lowrank.hub.contents import PushFile
from hf_lowrank.hub.privacy import one_line

ADDRESS = re.compile(r"(?:hf://buckets/)?([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)/?", re.ASCII)


@dataclass(frozen=True)
class StoredFile:
    """A file as listed by the Hub."""

    size: int
    xet_hash: str

    def same(self, file: PushFile) -> bool:
        return self.size == file.size and (not self.size or self.xet_hash == file.xet_hash)


class Bucket:
    """A folder of a bucket on the Hub; token and endpoint are by default those of the login and of `HF_ENDPOINT`.

    Args:
        address: `user/bucket` or `user/bucket/folder`, with or without `hf://buckets/`.

    Raises:
        UserError: the address is malformed.
    """

    def __init__(self, address: str, *, token: str | None = None, endpoint: str | None = None) -> None:
        match = ADDRESS.fullmatch(address)
        if match is None:
            shown = one_line(repr(address), limit=100)
            raise UserError(f"{shown}: not a bucket; it must be user/bucket or user/bucket/folder")
        self.id, self.folder = match[1], match[2].strip("/")
        self.address = f"hf://buckets/{self.id}" + (f"/{self.folder}" if self.folder else "")
        self.api = HfApi(endpoint=endpoint, token=token, library_name="hf_lowrank")

    def create(self, *, private: bool) -> None:
        """Creates the bucket if needed; the visibility of an existing one does not change."""
        self.api.create_bucket(self.id, private=private, exist_ok=True)

    def files(self, folder: str = "") -> dict[str, StoredFile]:
        """All files in a subfolder, by their paths in this folder."""
        prefix = self._path(folder)
        try:
            listed = list(self.api.list_bucket_tree(self.id, prefix or None, recursive=True))
        except EntryNotFoundError:
            return {}
        return {
            str(PurePosixPath(item.path).relative_to(self.folder)): StoredFile(item.size, item.xet_hash)
            for item in listed
            # A prefix may match beginnings of names: checkpoint-10 is not in checkpoint-1.
            if isinstance(item, BucketFile) and (not prefix or item.path.startswith(f"{prefix}/"))
        }

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        with tempfile.TemporaryDirectory(prefix="hf-lowrank-") as folder:
            target = Path(folder) / "file"
            self.api.download_bucket_files(self.id, [(self._path(path), target)], raise_on_missing_files=True)
            return target.read_bytes()

    def write(self, files: Iterable[PushFile], delete: Iterable[str] = ()) -> None:
        """Adds and deletes files; some of them may be done if this fails."""
        add: list[tuple[str | Path | bytes, str]] = [(file.source, self._path(file.path)) for file in files]
        self.api.batch_bucket_files(self.id, add=add, delete=[self._path(path) for path in delete])

    def _path(self, path: str) -> str:
        return "/".join(part for part in (self.folder, path) if part)
