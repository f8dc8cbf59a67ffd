"""The local web page of ``srpkd compare``: a server on 127.0.0.1 that answers this machine's browser only.

| request | answer |
| --- | --- |
| GET / | the page |
| POST /translate, an image file as the body | JSON of ``Comparison.translate`` |
| POST /sample?file=NAME | the same for an image in the list of samples |
| GET /relations?image=ID&x=X&y=Y | JSON of ``Comparison.relations`` |

An error is {"error": message} with status 400, or 413 for a body that is too large. Requests whose Host or Origin is
not this server are refused, so that no other web page can reach it (DNS rebinding, cross-site requests).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from ..arguments import first_line
from ..files import write_file
from .comparison import Comparison
from .page import render_template

HOST = "127.0.0.1"
MAX_BYTES = 256 << 20  # of an image file
MAX_DIGITS = 20  # of its size: int() refuses thousands of digits


class ComparisonServer(ThreadingHTTPServer):
    """Serve a comparison; ``serve_forever`` runs it, ``shutdown`` ends it.

    Args:
        comparison: the networks.
        port: of 127.0.0.1; 0 takes a free one.
        samples: name -> image file: offered on the page.

    Raises:
        ValueError: the port is in use, or needs administrator rights.
    """

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # where it would allow two servers at one port

    def __init__(self, comparison: Comparison, port: int = 0, samples: Mapping[str, Path] | None = None) -> None:
        self.comparison, self.samples = comparison, dict(samples or {})
        self.lock = threading.Lock()  # the networks run for one request at a time
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ValueError(f"--port {port}: {error.strerror}: use another port, or 0 for any free one") from error

    def server_close(self) -> None:
        """Close the socket. Waits until no network runs, because Python aborts if it exits during a forward pass."""
        if self.socket.fileno() != -1:  # it may be called twice
            self.lock.acquire()  # and no network runs afterwards
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of a bug, but not of a connection that the browser closed early or left idle."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    @property
    def origins(self) -> list[str]:
        """The addresses under which a browser on this machine reaches the server."""
        return [f"http://{name}:{self.server_port}" for name in (HOST, "localhost")]


class _Handler(BaseHTTPRequestHandler):
    server: ComparisonServer
    timeout = 60  # seconds without data

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if self._is_foreign():
            return
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            page = render_page(list(self.server.comparison.networks), list(self.server.samples), nonce)
            self._send(HTTPStatus.OK, page.encode(errors="replace"), "text/html; charset=utf-8", nonce)
        elif path == "/relations":
            fields = dict(parse_qsl(query))
            relations, image = self.server.comparison.relations, fields.get("image", "")
            self._answer(lambda: relations(image, _fraction(fields, "x"), _fraction(fields, "y")))
        else:
            self._fail(HTTPStatus.NOT_FOUND, f"unknown address {path}")

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        if self._is_foreign():
            return
        if path == "/translate":
            self._translate_body()
        elif path == "/sample":
            name = dict(parse_qsl(query)).get("file", "")
            if name in self.server.samples:
                self._answer(lambda: self.server.comparison.translate(self.server.samples[name]))
            else:
                self._fail(HTTPStatus.NOT_FOUND, f"no sample is named {name!r}")
        else:
            self._fail(HTTPStatus.NOT_FOUND, f"unknown address {path}")

    def _translate_body(self) -> None:
        header = self.headers.get("Content-Length", "")
        length = int(header) if header.isdecimal() and len(header) < MAX_DIGITS else 0
        if not length:
            self._fail(HTTPStatus.BAD_REQUEST, "received no image: expected a file as the body of the request")
            return
        if length > MAX_BYTES:
            self._fail(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the file has {length >> 20} MB: expected at most {MAX_BYTES >> 20} MB",
            )
            return
        content = self.rfile.read(length)
        if len(content) < length:
            raise ConnectionAbortedError("the browser closed the connection before the end of the file")
        self._answer(lambda: self._translated(content))

    def _translated(self, content: bytes) -> dict[str, Any]:
        """Translate the content of an image file; messages do not name the temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                return self.server.comparison.translate(write_file(Path(folder, "the image"), content, "nothing"))
            except (ValueError, OSError) as error:
                raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from error

    def _answer(self, compute: Callable[[], Any]) -> None:
        """Send a result, or the message of an error."""
        try:
            with self.server.lock:
                result = compute()
        except (ValueError, OSError) as error:  # of the image or the request
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except RuntimeError as error:  # such as memory that does not suffice
            traceback.print_exc()
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, first_line(error))
        else:
            self._send(HTTPStatus.OK, json.dumps(result).encode(), "application/json")

    def _is_foreign(self) -> bool:
        """Refuse a request that does not come from a page of this server; return whether it was refused."""
        origin = self.headers.get("Origin")
        hosts = [origin.removeprefix("http://") for origin in self.server.origins]
        if self.headers.get("Host") in hosts and origin in (None, *self.server.origins):
            return False
        self._fail(HTTPStatus.FORBIDDEN, f"expected a request from {self.server.url}")
        return True

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # the body may be unread
        self._send(status, json.dumps({"error": message}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, nonce: str = "") -> None:
        self.send_response(status)
        policy = f"default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for each request."""


def _fraction(query: Mapping[str, str], name: str) -> float:
    text = query.get(name, "")
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: expected a number") from error


def render_page(labels: Sequence[str], samples: Sequence[str], nonce: str) -> str:
    """Return the HTML of the page, which loads nothing but data from this server."""
    addresses = [(name, f"sample?file={quote(name)}") for name in samples]
    return render_template("compare.html.j2", labels=labels, samples=addresses, nonce=nonce)
