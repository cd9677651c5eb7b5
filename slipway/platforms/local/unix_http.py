"""HTTP over a unix socket: how slipway talks to the gateway's admin server and to supervisord."""

from __future__ import annotations

import http.client
import socket
import xmlrpc.client
from pathlib import Path
from typing import Any


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.sock.close()
            raise


class UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over a unix socket; every call has its own connection, which is closed after it."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__()
        self._path, self._timeout_s = path, timeout_s

    def request(self, host: object, handler: str, request_body: object, verbose: bool = False) -> Any:
        """Call once; `host` is what XML-RPC read from its URL and means nothing here."""
        connection = UnixConnection(self._path, self._timeout_s)
        try:
            connection.request("POST", handler, request_body, {"Content-Type": "text/xml"})  # type: ignore[arg-type]  # bytes
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"status {response.status}")
        return xmlrpc.client.loads(answer)[0]
