"""The Hub's HTTP interface over a `Store`: one method a route."""

from __future__ import annotations

import base64
import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.refusals import RefusedError

LARGE = re.compile(r"\.(safetensors|pt|pth|bin|ckpt|gguf|zip|gz)$")


class Routes:
    """The Hub's interface; each route returns (status, answer, headers)."""

    def __init__(self, hub: Any, headers: Any, request: Any, fault: str | None) -> None:
        self.hub, self.store, self.headers, self.request, self.fault = hub, hub.store, headers, request, fault

    def route(self, method: str, target: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        split = urlsplit(target)
        path, self.query = split.path, parse_qs(split.query)
        for verbs, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verbs:
                groups = [unquote(group) if group is not None else None for group in match.groups()]
                result = getattr(self, name)(body, *groups)
                return result if isinstance(result, tuple) else (200, result, {})
        raise RefusedError(404, f"no such route: {method} {path}")

    # -- who may

    def user(self) -> tuple[str, bool] | None:
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if not bearer:
            return None
        if bearer not in self.hub.settings.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.settings.tokens[bearer]

    def may_read(self, repo: str) -> None:
        user = self.user()
        if self.store.exists(repo) and (
            not self.store.repo(repo)["private"] or (user and repo.startswith(user[0] + "/"))
        ):
            return
        raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")

    def may_write(self, repo: str) -> None:
        user = self.user()
        self.may_read(repo)
        if user is None or not user[1] or not repo.startswith(user[0] + "/"):
            raise RefusedError(403, f"You don't have the rights to write to {repo}")

    # -- accounts and repositories

    def whoami(self, body: bytes) -> Any:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        role = "write" if user[1] else "read"
        return {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": role}}}

    def create_repo(self, body: bytes) -> Any:
        user, order = self.user(), json.loads(body)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        repo = f"{order.get('organization') or user[0]}/{order['name']}"
        if not user[1] or not repo.startswith(user[0] + "/"):
            raise RefusedError(403, "You don't have the rights to create a model this namespace")
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        try:
            self.store.create(repo, order.get("visibility") == "private" or bool(order.get("private")))
        except RefusedError as error:
            return error.status, {"error": error.message, **answer}, {}
        return answer

    def info(self, body: bytes, repo: str, revision: str | None = None) -> Any:
        self.may_read(repo)
        oid = self.store.resolve(repo, revision or "main")
        siblings = [{"rfilename": path} for path in self.store.commit_at(oid)["files"]]
        if "evalResults" in self.query.get("expand", []):
            return {"id": repo, "sha": oid, "evalResults": self._eval_results(oid)}
        return {
            "id": repo, "modelId": repo, "sha": oid, "siblings": siblings, "tags": [], "gated": False,
            "private": self.store.repo(repo)["private"], "disabled": False, "downloads": 0, "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def _eval_results(self, oid: str) -> list[dict[str, Any]]:
        """Every entry of every file, or the error of a file that is not as the format asks."""
        found: list[dict[str, Any]] = []
        for path, entry in self.store.commit_at(oid)["files"].items():
            if not re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", path):
                continue
            try:
                data = yaml.safe_load(self.store.content(entry))
                entries = [{"filename": path, "data": item} for item in data]
                bad = [e for e in data if not re.fullmatch(r"[\w.-]+/[\w.-]+", e["dataset"]["id"])
                       or not isinstance(e["dataset"]["task_id"], str) or "value" not in e]  # fmt: skip
                found += [{"filename": path, "error": f"not an entry: {bad[0]}"}] if bad else entries
            except (yaml.YAMLError, TypeError, KeyError) as error:
                found.append({"filename": path, "error": str(error)})
        return found

    def refs(self, body: bytes, repo: str) -> Any:
        self.may_read(repo)
        state = self.store.repo(repo)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in state[table].items()]
            for kind, table in (("heads", "branches"), ("tags", "tags"))
        )
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> Any:
        self.may_read(repo)
        files = self.store.files(repo, revision)
        prefix = folder.strip("/") + "/" if folder else ""
        inside = {path: entry for path, entry in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        items, folders = [], set()
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for path, entry in inside.items():
            parents = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(len(parents)):
                folders.add(prefix + "/".join(parents[: depth + 1]))
            if recursive or not parents:
                items.append({"type": "file", "path": path, **entry})
        listed = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)
                  if recursive or "/" not in f.removeprefix(prefix)]  # fmt: skip
        items = sorted([*items, *listed], key=lambda item: item["path"])
        start, size = int(self.query.get("cursor", ["0"])[0]), self.hub.settings.page_size
        headers = {}
        if start + size < len(items):
            path = urlsplit(self.request.path).path
            query = f"recursive={str(recursive).lower()}&cursor={start + size}"
            headers["Link"] = f'<{self.hub.url}{path}?{query}>; rel="next"'
        return 200, items[start : start + size], headers

    def paths_info(self, body: bytes, repo: str, revision: str) -> Any:
        self.may_read(repo)
        files = self.store.files(repo, revision)
        wanted = parse_qs(body.decode()).get("paths", [])
        return [{"type": "file", "path": path, **files[path]} for path in wanted if path in files]

    def commits(self, body: bytes, repo: str, revision: str) -> Any:
        self.may_read(repo)
        return [
            {"id": c["id"], "title": c["title"], "message": c.get("message", ""), "authors": [{"user": "user"}],
             "date": "2026-01-01T00:00:00.000Z"} for c in self.store.history(repo, revision)
        ]  # fmt: skip

    def branch(self, body: bytes, repo: str, name: str) -> Any:
        self.may_write(repo)
        self.store.create_ref(repo, "branches", name, json.loads(body or b"{}").get("startingPoint"))
        return {}

    def delete_branch(self, body: bytes, repo: str, name: str) -> Any:
        self.may_write(repo)
        self.store.delete_ref(repo, "branches", name)
        return {}

    def tag(self, body: bytes, repo: str, revision: str) -> Any:
        self.may_write(repo)
        self.store.create_ref(repo, "tags", json.loads(body)["tag"], revision)
        return {}

    def delete_tag(self, body: bytes, repo: str, name: str) -> Any:
        self.may_write(repo)
        self.store.delete_ref(repo, "tags", name)
        return {}

    # -- commits and uploads

    def validate_yaml(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.S)
        if not match:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            data = yaml.safe_load(match[1])
            faults = [] if isinstance(data, dict) else ["metadata is no mapping"]
        except yaml.YAMLError as error:
            faults = [str(error)]
        return 400 if faults else 200, {"errors": [{"message": f} for f in faults], "warnings": []}, {}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        self.may_write(repo)
        files = self.store.files(repo, revision)
        answer = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = (
                LARGE.search(path)
                or file["size"] > self.hub.settings.regular_limit
                or b"\0" in base64.b64decode(file["sample"])
            )
            entry = files.get(path)
            oid = None if entry is None else entry.get("lfs", entry)["oid"]
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, body: bytes, repo: str) -> Any:
        self.may_write(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if not self.store.has_lfs(oid):
                upload: dict[str, Any] = {"href": f"{self.hub.url}/__lfs__/{oid}"}
                parts = -(-size // self.hub.settings.part_size)
                if parts > 1:
                    upload["href"] = f"{self.hub.url}/__lfs__/{oid}/complete"
                    upload["header"] = {"chunk_size": str(self.hub.settings.part_size)} | {
                        str(part + 1): f"{self.hub.url}/__lfs__/{oid}/part/{part + 1}" for part in range(parts)
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/__lfs__/{repo}/verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes, oid: str) -> Any:
        if oid in self.hub.acknowledged:
            self.hub.repeated.append(oid)
        if self.fault != "forget":
            self.store.add_lfs(oid, body)
        return b""

    def upload_part(self, body: bytes, oid: str, part: str) -> Any:
        if self.fault != "forget":
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        return 200, b"", {"ETag": f'"{part}"'}

    def complete(self, body: bytes, oid: str) -> Any:
        parts = self.hub.parts.pop(oid, {})
        self.store.add_lfs(oid, b"".join(parts[number] for number in sorted(parts)))
        return {}

    def verify(self, body: bytes, repo: str) -> Any:
        # A forgotten upload is noticed by the commit, which is later and worse.
        return {}

    def commit(self, body: bytes, repo: str, branch: str) -> Any:
        self.may_write(repo)
        lines = [json.loads(line) for line in body.decode().splitlines()]
        header, operations = lines[0]["value"], []
        before = self.store.files(repo, branch)
        for line in lines[1:]:
            operation = {"key": line["key"], **line["value"]}
            if operation["key"] == "file":
                operation["data"] = base64.b64decode(operation.pop("content"))
                entry = self.store.add_blob(operation["data"])
                if before.get(operation["path"], {}).get("oid") == entry["oid"]:
                    self.hub.repeated.append(operation["path"])
            operations.append(operation)
        oid = self.store.commit(
            repo, branch, operations, header["summary"], header.get("description", ""), header.get("parentCommit")
        )
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}

    # -- buckets, whose content is in Xet

    def may_use(self, bucket: str, *, write: bool) -> None:
        user, store = self.user(), self.store.buckets
        own = user is not None and bucket.startswith(user[0] + "/")
        if not store.exists(bucket) or (store.bucket(bucket)["private"] and not own):
            raise RefusedError(404 if user else 401, "Bucket not found", "BucketNotFound")
        if write and not (own and user is not None and user[1]):
            raise RefusedError(403, f"You don't have the rights to write to {bucket}")

    def create_bucket(self, body: bytes, bucket: str) -> Any:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        if not user[1] or not bucket.startswith(user[0] + "/"):
            raise RefusedError(403, "You don't have the rights to create a bucket in this namespace")
        answer = {"url": f"{self.hub.url}/buckets/{bucket}"}
        try:
            self.store.buckets.create(bucket, json.loads(body or b"{}").get("visibility") == "private")
        except RefusedError as error:
            return error.status, {"error": error.message, **answer}, {}
        return answer

    def bucket_info(self, body: bytes, bucket: str) -> Any:
        self.may_use(bucket, write=False)
        files = self.store.buckets.files(bucket).values()
        return {
            "id": bucket, "private": self.store.buckets.bucket(bucket)["private"],
            "createdAt": "2026-01-01T00:00:00.000Z", "size": sum(f["size"] for f in files), "totalFiles": len(files),
        }  # fmt: skip

    def bucket_tree(self, body: bytes, bucket: str, prefix: str | None = None) -> Any:
        self.may_use(bucket, write=False)
        self.hub.unanswered = None
        files = self.store.buckets.files(bucket)
        items = [
            {"type": "file", "path": path, "size": entry["size"], "xetHash": entry["xetHash"]}
            for path, entry in sorted(files.items())
            if path.startswith(prefix or "")
        ]
        start, size = int(self.query.get("cursor", ["0"])[0]), self.hub.settings.page_size
        headers = {}
        if start + size < len(items):
            path = urlsplit(self.request.path).path
            headers["Link"] = f'<{self.hub.url}{path}?recursive=true&cursor={start + size}>; rel="next"'
        return 200, items[start : start + size], headers

    def bucket_paths(self, body: bytes, bucket: str) -> Any:
        self.may_use(bucket, write=False)
        files = self.store.buckets.files(bucket)
        return [
            {"type": "file", "path": path, "size": files[path]["size"], "xetHash": files[path]["xetHash"]}
            for path in json.loads(body)["paths"]
            if path in files
        ]

    def bucket_batch(self, body: bytes, bucket: str) -> Any:
        self.may_use(bucket, write=True)
        operations = [json.loads(line) for line in body.decode().splitlines()]
        before = self.store.buckets.files(bucket)
        if self.hub.unanswered != (bucket, body):
            self.hub.repeated += [
                f"{bucket}/{operation['path']}"
                for operation in operations
                if operation["type"] == "addFile"
                and before.get(operation["path"], {}).get("xetHash") == operation["xetHash"]
            ]
        self.hub.unanswered = (bucket, body) if self.fault in ("cut", "lost") else None
        failed = self.store.buckets.batch(bucket, operations)
        return 422 if len(failed) == len(operations) else 200, {"success": not failed, "failed": failed}, {}

    def bucket_resolve(self, body: bytes, bucket: str, path: str) -> Any:
        self.may_use(bucket, write=False)
        entry = self.store.buckets.files(bucket).get(path)
        if entry is None:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        route = f"{self.hub.url}/api/buckets/{bucket}/xet-read-token"
        headers = {"X-Xet-Hash": entry["xetHash"], "X-Xet-Refresh-Route": route, "X-Linked-Size": str(entry["size"])}
        return 200, b"", headers

    def xet_token(self, body: bytes, bucket: str, kind: str) -> Any:
        self.may_use(bucket, write=kind == "write")
        return {"accessToken": XET_TOKEN, "exp": 4102444800, "casUrl": f"{self.hub.url}/__cas__"}

    def may_use_xet(self) -> None:
        """Xet takes its own tokens, and must never be sent the Hub's."""
        if self.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
            raise RefusedError(401, "not a token of this storage")

    def xorb(self, body: bytes, name: str) -> Any:
        self.may_use_xet()
        new = self.fault == "forget" or self.store.buckets.xet.add_xorb(name, body)
        return {"was_inserted": new}

    def shard(self, body: bytes) -> Any:
        self.may_use_xet()
        self.store.buckets.xet.add_shard(body)
        return {"result": 1}

    def reconstruction(self, body: bytes, name: str) -> Any:
        self.may_use_xet()
        size = self.store.buckets.xet.size(name)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, last = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, size)
        return self.store.buckets.xet.reconstruction(name, f"{self.hub.url}/__xorb__", (first, min(last, size)))

    def xorb_range(self, body: bytes, name: str) -> Any:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None:
            raise RefusedError(400, "a range is needed")
        data = self.store.buckets.xet.xorb(name)
        first, last = int(wanted[1]), int(wanted[2])
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Content-Type": "application/octet-stream"}
        return 206, data[first : last + 1], headers

    # -- downloads

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> Any:
        self.may_read(repo)
        oid = self.store.resolve(repo, revision)
        entry = self.store.commit_at(oid)["files"].get(path)
        if entry is None:
            raise RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        data = self.store.content(entry)
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return 200, data, headers
        first = int(wanted[1]) if wanted[1] else max(len(data) - int(wanted[2]), 0)
        last = min(int(wanted[2]), len(data) - 1) if wanted[1] and wanted[2] else len(data) - 1
        if first >= len(data):
            raise RefusedError(416, "range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers


XET_TOKEN = "xet-" + "x" * 20
_REPO = r"([\w.-]+/[\w.-]+)"
_HASH = r"([0-9a-f]{64})"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create_repo"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("GET",), rf"/api/models/{_REPO}", "info"),
    (("GET",), rf"/api/models/{_REPO}/revision/([^/]+)", "info"),
    (("GET",), rf"/api/models/{_REPO}/refs", "refs"),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.*))?", "tree"),
    (("POST",), rf"/api/models/{_REPO}/paths-info/([^/]+)", "paths_info"),
    (("GET",), rf"/api/models/{_REPO}/commits/([^/]+)", "commits"),
    (("POST",), rf"/api/models/{_REPO}/branch/([^/]+)", "branch"),
    (("DELETE",), rf"/api/models/{_REPO}/branch/([^/]+)", "delete_branch"),
    (("POST",), rf"/api/models/{_REPO}/tag/([^/]+)", "tag"),
    (("DELETE",), rf"/api/models/{_REPO}/tag/([^/]+)", "delete_tag"),
    (("POST",), rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    (("POST",), rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/__lfs__/([0-9a-f]{64})", "upload"),
    (("PUT",), r"/__lfs__/([0-9a-f]{64})/part/(\d+)", "upload_part"),
    (("POST",), r"/__lfs__/([0-9a-f]{64})/complete", "complete"),
    (("POST",), rf"/__lfs__/{_REPO}/verify", "verify"),
    (("POST",), rf"/api/buckets/{_REPO}", "create_bucket"),
    (("GET",), rf"/api/buckets/{_REPO}", "bucket_info"),
    (("GET",), rf"/api/buckets/{_REPO}/tree(?:/(.+))?", "bucket_tree"),
    (("POST",), rf"/api/buckets/{_REPO}/paths-info", "bucket_paths"),
    (("POST",), rf"/api/buckets/{_REPO}/batch", "bucket_batch"),
    (("GET",), rf"/api/buckets/{_REPO}/xet-(read|write)-token", "xet_token"),
    (("GET", "HEAD"), rf"/buckets/{_REPO}/resolve/(.+)", "bucket_resolve"),
    (("POST",), rf"/__cas__/v1/xorbs/default/{_HASH}", "xorb"),
    (("POST",), r"/__cas__/v1/shards", "shard"),
    (("GET",), rf"/__cas__/v1/reconstructions/{_HASH}", "reconstruction"),
    (("GET",), rf"/__xorb__/{_HASH}", "xorb_range"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
