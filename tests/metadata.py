"""A stand-in for the clouds' metadata services, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Metadata:
    """What it says, and what it was asked."""

    address: str = ""
    action: str | None = None  # of AWS
    preempted: str = "FALSE"  # of Google Cloud
    failing: int | None = None  # a status that it answers everything with
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        self.asked.append(f"{method} {path}")
        if self.failing is not None:
            return self.failing, ""
        if path == "/latest/api/token":
            return (200, "secret") if method == "PUT" and headers["X-aws-ec2-metadata-token-ttl-seconds"] else (400, "")
        if path.startswith("/latest/"):
            if headers["X-aws-ec2-metadata-token"] != "secret":
                return 401, ""
            if path.endswith("/recommendations/rebalance"):  # the node is only more likely to go
                return 200, '{"noticeTime": "2026-11-05T08:22:00Z"}'
            there = path == "/latest/meta-data/spot/instance-action" and self.action is not None
            return (200, self.action or "") if there else (404, "")
        if path == "/computeMetadata/v1/instance/preempted":
            return (200, self.preempted) if headers["Metadata-Flavor"] == "Google" else (403, "")
        return 404, ""


@contextmanager
def metadata() -> Iterator[Metadata]:
    service = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = service.answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        service.address = f"127.0.0.1:{server.server_port}"
        yield service
        server.shutdown()
