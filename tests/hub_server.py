"""A stand-in of the hub on loopback: one repository out of a folder, and a script of what goes wrong.

It answers what the hub does: a list of files with sizes, git ids and LFS hashes; files by ranges, those of LFS from a
second host, to which the first redirects. Faults are told by file name ("list" for the list of files) and happen in the
order in which they were told, one for each request.
"""
import hashlib
import json
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from jaxllm.checkpoint import remote, transfer

FOREVER = 10**9
REPO = "org/model"


@dataclass(frozen=True)
class Fault:
    """What happens to `times` requests: an error `status` with `headers`; or a body that is `drop`ped after so many
    bytes, `short` by so many without a word, `flip`ped at a byte of the file, or whole although a range was asked for.
    """
    times: int = 1
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    drop: int | None = None
    short: int = 0
    flip: int | None = None
    whole: bool = False


class Hub:
    """`files` of REPO at `commits`; counts what it sends. `pace`: seconds that each piece of 64 KiB takes."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.endpoint, self.cdn = folder, f"http://127.0.0.1:{port}", f"http://localhost:{port}/cdn"
        self.commits = {"main": "c" * 40, "c" * 40: "c" * 40}
        self.token: str | None = None       # who does not send it gets 401
        self.plain: set[str] = set()        # shards that are kept in git itself
        self.pace = 0.0
        self.answering: set[int] = set()     # threads that are sending
        self.served: Counter[str] = Counter()       # file -> bytes of it that were sent
        self.requests: list[tuple[str, str]] = []   # (file, its Range)
        self.leaked: list[str] = []                 # tokens that were sent to the second host
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)

    def break_down(self, name: str, *faults: Fault) -> None:
        for fault in faults:
            self.faults[name].extend([fault] * min(fault.times, 1000))

    def next_fault(self, name: str) -> Fault:
        return self.faults[name].popleft() if self.faults[name] else Fault()

    def listing(self, commit: str) -> bytes:
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        return json.dumps({"id": REPO, "sha": commit, "siblings": [self._entry(file) for file in files]}).encode()

    def _entry(self, file: Path) -> dict[str, object]:
        data = file.read_bytes()
        entry: dict[str, object] = {"rfilename": str(file.relative_to(self.folder)), "size": len(data),
                                    "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if file.suffix == ".safetensors" and file.name not in self.plain:
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
        return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            if "Authorization" in self.headers:
                self.hub.leaked.append(self.headers["Authorization"])
            return self._file(path.removeprefix("/cdn/"))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, (("X-Error-Code", "RepoNotFound"), ("X-Error-Message", "Repository not found")))
        if path.startswith(f"/api/models/{REPO}/revision/"):
            return self._list(path.rsplit("/", 1)[1])
        if path.startswith(f"/{REPO}/resolve/"):
            commit, name = path.removeprefix(f"/{REPO}/resolve/").split("/", 1)
            if commit != self.hub.commits["c" * 40] or not (self.hub.folder / name).is_file():
                return self._answer(404, (("X-Error-Code", "EntryNotFound"),))
            if name.endswith(".safetensors"):
                return self._answer(302, (("Location", f"{self.hub.cdn}/{name}"),))
            return self._file(name)
        return self._answer(404, (("X-Error-Code", "RepoNotFound"),))

    def _list(self, revision: str) -> None:
        fault = self.hub.next_fault("list")
        if fault.status != 200:
            return self._answer(fault.status, fault.headers)
        if revision not in self.hub.commits:
            return self._answer(404, (("X-Error-Code", "RevisionNotFound"),))
        body = self.hub.listing(self.hub.commits[revision])
        self._answer(200, (), body, len(body) if fault.drop is None else fault.drop)

    def _file(self, name: str) -> None:
        fault, asked = self.hub.next_fault(name), self.headers.get("Range", "")
        self.hub.requests.append((name, asked))
        if fault.status != 200:
            return self._answer(fault.status, fault.headers)
        data = bytearray((self.hub.folder / name).read_bytes())
        if fault.flip is not None:
            data[fault.flip] ^= 1
        first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        part = bytes(data if fault.whole else data[first:last + 1])
        part = part[:len(part) - fault.short]
        sent = len(part) if fault.drop is None else min(fault.drop, len(part))
        self._answer(200 if fault.whole else 206, (), part, sent, name)

    def _answer(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes = b"", sent: int | None = None,
                name: str = "") -> None:
        """Headers, and `sent` bytes of `body`; the line drops where that is not all."""
        self.send_response(status)
        for header in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(*header)
        self.end_headers()
        sent = len(body) if sent is None else sent
        self.hub.answering.add(threading.get_ident())
        try:
            for start in range(0, sent, 2**16):
                piece = body[start:min(start + 2**16, sent)]
                self.hub.served[name] += len(piece)      # before it arrives, so that who has it all finds it counted
                self.wfile.write(piece)
                time.sleep(self.hub.pace)
        finally:
            self.hub.answering.discard(threading.get_ident())
        self.close_connection = sent < len(body)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:      # whoever asked has gone, as a killed process does
            pass

    def log_message(self, *args: object) -> None:
        """Silence."""


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """The hub with `folder` as its repository, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("", (Handler,), {}))
    server.daemon_threads = True
    hub = server.RequestHandlerClass.hub = Hub(folder, server.server_address[1])      # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """In this process the hub is `hub`, nobody is logged in, and tries follow at once."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/no token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "GUESS", 512)      # bytes: less than a header, far less than a shard


def wait_until(claim: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
