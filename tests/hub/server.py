"""A Hub on loopback: the HTTP interface as huggingface_hub's client uses it, on disk, that can be told to fail.

In a test: `with LoopbackHub(folder) as hub: …`. As a process of its own: `python tests/hub/server.py FOLDER`, which
prints its address and takes orders under `/__control__`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hub.faults import FaultPlan
from tests.hub.refusals import RefusedError
from tests.hub.routes import Routes
from tests.hub.store import Store

TOKEN, OTHER_TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "o" * 34, "hf_" + "r" * 34


@dataclass
class Request:
    """One request as the server saw it."""

    number: int
    method: str
    path: str
    headers: str
    body: bytes
    fault: str | None
    status: int | None = None


@dataclass
class Settings:
    tokens: dict[str, tuple[str, bool]] = field(
        default_factory=lambda: {TOKEN: ("user", True), OTHER_TOKEN: ("other", True), READ_TOKEN: ("user", False)}
    )
    regular_limit: int = 10_000_000
    part_size: int = 50_000_000
    page_size: int = 1000
    keep_bodies: bool = True


class LoopbackHub:
    """The server with what it saw: `requests`, and what was sent again (`repeated`).

    That is content whose upload was acknowledged, and a file that the branch or the bucket had. Not counted is a batch
    of a bucket whose answer did not arrive (`unanswered`), if it comes again unchanged before the bucket is listed:
    huggingface_hub's client retries it by itself, and the content is not uploaded again.
    """

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.settings = Settings()
        self.plan = FaultPlan()
        self.requests: list[Request] = []
        self.acknowledged: set[str] = set()
        self.repeated: list[str] = []
        self.unanswered: tuple[str, bytes] | None = None  # bucket, body
        self.parts: dict[str, dict[int, bytes]] = {}
        self.kill_pid: int | None = None
        self._lock = threading.Lock()
        self._count = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, plan: FaultPlan) -> None:
        """Counts requests from 0 again and answers by `plan`."""
        with self._lock:
            self.plan, self._count = plan, 0

    def seen(self, method: str, path: str, headers: str) -> Request:
        with self._lock:
            request = Request(self._count, method, path, headers, b"", self.plan.of(self._count))
            self._count += 1
            self.requests.append(request)
            return request


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # Headers and body in one packet at once: waiting for acknowledgements costs 40 ms a request.
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError, TimeoutError, ValueError):
            self.close_connection = True

    def _any(self) -> None:
        if self.path.startswith("/__control__"):
            self._control()
            return
        hub = self.hub
        request = hub.seen(self.command, self.path, str(self.headers))
        fault = request.fault
        if fault == "kill-before":
            self._kill()
        if fault in ("refuse", "kill-before"):
            self._hang_up()
            return
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut-request":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if hub.settings.keep_bodies:
            request.body = body
        if fault == "delay":
            time.sleep(hub.plan.delay)
        if fault in ("429", "500", "503"):
            self._answer(request, int(fault), {"error": "told to fail"}, {})
            return
        if fault == "reject":
            message = "Invalid credentials in Authorization header"
            self._answer(request, 401, {"error": message}, {"X-Error-Message": message})
            return
        try:
            status, answer, headers = Routes(hub, self.headers, request, fault).route(self.command, self.path, body)
        except RefusedError as error:
            status, answer = error.status, {"error": error.message}
            headers = {"X-Error-Message": error.message.replace("\n", " ")}
            if error.code:
                headers["X-Error-Code"] = error.code
        if fault == "kill-after":
            self._kill()
            self._hang_up()
            return
        if fault == "lost":
            status, answer, headers = 500, {"error": "told to fail"}, {}
        self._answer(request, status, answer, headers, cut=fault == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _answer(self, request: Request, status: int, answer: Any, headers: dict[str, str], cut: bool = False) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in sent.items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        if cut:
            # One byte more than will ever come: also an empty answer is cut off.
            self._headers_buffer = [
                line if not line.startswith(b"Content-Length") else b"Content-Length: %d\r\n" % (len(data) + 1)
                for line in self._headers_buffer
            ]
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()
            return
        request.status = status
        match = re.match(r"/__lfs__/([0-9a-f]{64})$", self.path)
        if status == 200 and self.command == "PUT" and match and self.hub.store.has_lfs(match[1]):
            self.hub.acknowledged.add(match[1])

    def _hang_up(self) -> None:
        """Closes the connection with a reset, so that the client sees a fault and not an end."""
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        except OSError:
            pass

    def _kill(self) -> None:
        if self.hub.kill_pid is not None:
            pid, self.hub.kill_pid = self.hub.kill_pid, None
            os.kill(pid, signal.SIGKILL)

    def _control(self) -> None:
        """`POST /__control__` {"plan": …, "kill_pid": …}; answers what was seen since the last order."""
        order = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        hub = self.hub
        seen = {
            "requests": len(hub.requests),
            "repeated": list(hub.repeated),
            "log": [(r.method, r.path, r.fault, r.status) for r in hub.requests] if order.get("log") else [],
        }
        if order.get("new_root"):
            hub.store = Store(Path(order["new_root"]))
            hub.acknowledged, hub.repeated = set(), []
        hub.requests, hub.unanswered, hub.kill_pid = [], None, order.get("kill_pid")
        plan = order.get("plan") or {}
        hub.fail(FaultPlan({int(k): v for k, v in plan.get("at", {}).items()}, plan.get("always")))
        self._answer(Request(0, "POST", "", "", b"", None), 200, seen, {})


if __name__ == "__main__":
    with LoopbackHub(Path(sys.argv[1])) as running:
        running.settings.keep_bodies = False
        print(running.url, flush=True)
        threading.Event().wait()
