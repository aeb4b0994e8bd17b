"""A small gateway for tests of the analyst's side: the owner's HTTP interface over a ReleaseBook.

It answers by the same paths, signatures and frames as the real one, and can be told to cheat or to break.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.contracts import owner_api
from flep_fl.contracts.errors import FlepError, RequestSignatureError
from flep_fl.contracts.request_signing import read_signature
from flep_fl.private_database.releases import ReleaseBook


class OwnerServer:
    """A context manager.

    Attributes
    ----------
    tamper
        ``tamper(path, answer) -> answer``: changes what leaves; may raise ConnectionError to cut the line.
    page
        Most records in a page.
    requests
        Paths that were asked for.
    """

    def __init__(self, book: ReleaseBook, signing_key: Ed25519PrivateKey) -> None:
        self.book, self.key = book, signing_key.public_key().public_bytes_raw()
        self.tamper: Callable[[str, object], object] = lambda path, answer: answer
        self.page = 6
        self.time_shift = 0
        self.requests: list[str] = []
        self.nonces: set[str] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def __enter__(self) -> OwnerServer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer("GET")

            def do_POST(self) -> None:
                self.answer("POST")

            def answer(self, method: str) -> None:
                cursor = None
                server.requests.append(self.path)
                try:
                    body, cursor = server.respond(method, self.path, self.headers)
                    status = 200
                except ConnectionError:
                    self.close_connection = True
                    self.connection.close()
                    return
                except FlepError as exc:
                    status = owner_api.STATUS.get(exc.code, 500)
                    body = owner_api.error_body(exc.code, exc.problem)
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                if cursor is not None:
                    self.send_header(owner_api.CURSOR_HEADER, str(cursor))
                self.end_headers()
                self.wfile.write(body)

        return Handler

    def respond(self, method: str, target: str, headers) -> tuple[bytes, int | None]:
        parts = urlsplit(target)
        if parts.path == owner_api.OWNER_PATH:
            hello = owner_api.OwnerHello(self.key, int(time.time()) + self.time_shift)
            return self.tamper(parts.path, hello).to_bytes(), None
        lower = {name.lower(): value for name, value in headers.items()}
        signed = read_signature(method, target, lower, b"", audience=self.key)
        try:
            Ed25519PublicKey.from_public_bytes(signed.key).verify(signed.signature, signed.base)
        except InvalidSignature as exc:
            raise RequestSignatureError("altered") from exc
        assert signed.nonce not in self.nonces
        self.nonces.add(signed.nonce)
        query = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
        path = parts.path.split("/")
        if parts.path == owner_api.GRANTS_PATH:
            return owner_api.grants_body(self.tamper("grants", self.book.grants_of(signed.key))), None
        grant = path[3]
        if path[4] == "open":
            return owner_api.opened_body(self.tamper("open", self.book.open_grant(grant, signed.key))), None
        ask = {"release_id": path[5], "cursor": query["cursor"]}
        if path[6] == "index":
            page = self.book.index_page(grant, signed.key, **ask, limit=min(query["limit"], 2 * self.page))
            page = self.tamper("index", page)
            return page.entries, page.cursor
        page = self.book.record_page(grant, signed.key, **ask, limit=min(query["limit"], self.page))
        page = self.tamper("records", page)
        return owner_api.pack_records(page.records), page.cursor
