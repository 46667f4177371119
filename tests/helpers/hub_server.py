"""A stand-in for the Hugging Face hub on the loopback interface: what huggingface_hub asks it for weights."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files by name, the license of the model card, and what the server does wrong.

    error: sent instead of any answer, as (status, X-Error-Code). headers: sent with each file, instead of the
    true ones; None: not sent.
    """

    files: dict[str, bytes]
    license: str | None = None
    error: tuple[int, str] | None = None
    headers: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Hub:
    """A running server: its address, the (method, path) of all requests, and their Authorization headers."""

    url: str
    requests: list[tuple[str, str]]
    tokens: set[str | None]


@contextlib.contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve repositories, by OWNER/REPO, until the context ends."""
    requests: list[tuple[str, str]] = []
    tokens: set[str | None] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            requests.append((self.command, self.path))
            if any(part in self.path for part in ("/resolve/", "/api/models/")):
                tokens.add(self.headers.get("Authorization"))
            path = self.path.partition("?")[0].removeprefix("/api/models").lstrip("/")
            name, _, file = re.sub(r"/(resolve|revision)/[^/]+", "\0", path, count=1).partition("\0")
            repository = repositories.get(name, Repository({}, error=(404, "RepoNotFound")))
            if repository.error is not None:
                self.answer(repository.error[0], {"X-Error-Code": repository.error[1]})
            elif self.path.startswith("/api/models"):
                card = {"license": repository.license} if repository.license else {}
                content = json.dumps({"id": name, "sha": COMMIT, "cardData": card}).encode()
                self.answer(200, {"Content-Type": "application/json"}, content)
            elif file.lstrip("/") not in repository.files:
                self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                content = repository.files[file.lstrip("/")]
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": tag} | repository.headers, content)

        do_HEAD = do_GET

        def answer(self, status, headers, content=b""):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(content))} | headers).items():
                if value is not None:
                    self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", requests, tokens)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
