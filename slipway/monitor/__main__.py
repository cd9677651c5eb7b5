"""Serve the live page of the local stack on the loopback interface: `python -m slipway.monitor --port 18086`.

    GET /               the page; it draws itself from data.json once a second
    GET /data.json      what it shows: Prometheus', the gateway's and the releases' own words
    GET /runbooks/NAME  what an alert means and what to do
    GET /metrics        whether the stack's programs are well, for Prometheus

environment:
  SLIPWAY_HOME     the state folder
  SLIPWAY_PARAMS   JSON of params.yaml as `up` read it (absent: the file is read)
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest

from slipway.errors import PlatformError
from slipway.monitor import view
from slipway.monitor.programs import Programs
from slipway.params import Params
from slipway.platforms.local import gateway, programs
from slipway.platforms.local.layout import Layout, here
from slipway.prometheus import Prometheus
from slipway.release import history, state

HOST = "127.0.0.1"
CHECKOUT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("page.html").read_text()
FRESH_S = 0.9
"""However many look at the page, Prometheus is asked once in this time."""


class Answer(NamedTuple):
    """What a path gives."""

    kind: str
    body: bytes
    policy: str = "default-src 'none'"
    """Content-Security-Policy."""


def _hashes(tag: str) -> str:
    """Allow just what stands in the page between the tags."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)


def policy() -> str:
    """Nothing but the page's own script and style runs, and it talks to this server alone."""
    parts = [f"script-src {_hashes('script')}", f"style-src {_hashes('style')}", "connect-src 'self'", "img-src data:"]
    return "; ".join(["default-src 'none'", *parts, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])


class Site:
    """What the server answers.

    Args:
        params: the parameters that the stack was started with.
        layout: its state folder.
    """

    def __init__(self, params: Params, layout: Layout) -> None:
        self._params, self._layout = params, layout
        self._prometheus = Prometheus(f"http://{HOST}:{params.stack.prometheus_port}")
        self._registry = CollectorRegistry()
        services = programs.all_of(layout, CHECKOUT, sys.executable, params)
        self._registry.register(Programs(layout, services, "page"))
        self._lock, self._drawn, self._at = threading.Lock(), b"", 0.0
        self._page = Answer("text/html; charset=utf-8", PAGE.encode(), policy())

    def answer(self, path: str) -> Answer | None:
        """What a path gives; None: nothing."""
        if path == "/":
            return self._page
        if path == "/data.json":
            return Answer("application/json", self._data())
        if path == "/metrics":
            return Answer("text/plain; version=0.0.4; charset=utf-8", generate_latest(self._registry))
        if found := re.fullmatch(r"/runbooks/([A-Za-z0-9]+)", path):
            return _runbook(found[1])
        return None

    def _data(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._at > FRESH_S:
                shown = view.view(self._facts(), self._params)
                self._drawn = json.dumps(shown, allow_nan=False, separators=(",", ":")).encode()
                self._at = time.monotonic()
            return self._drawn

    def _facts(self) -> view.Facts:
        """Ask everybody; who is silent is told as the problem."""
        end = int(time.time()) // view.STEP_S * view.STEP_S
        times = range(end - view.SPAN_S, end + 1, view.STEP_S)
        problems: list[str] = []

        def asked(whom: str, question: Callable[[], Any], otherwise: Any) -> Any:
            try:
                return question()
            except (PlatformError, OSError, ValueError, KeyError):
                problems.append(f"{whom} is silent")
                return otherwise

        prometheus = self._prometheus
        lines = asked(
            "Prometheus", lambda: prometheus.over(view.LINES, times) + prometheus.over(view.WEIGHT, times), []
        )
        return view.Facts(
            list(times),
            lines,
            asked("Prometheus", lambda: prometheus.now(view.VALUES), []),
            asked("Prometheus", prometheus.alerts, []),
            asked("the gateway", lambda: gateway.state(self._layout), {}),
            history.events(self._params.workload),
            state.at_work(),
            ", ".join(dict.fromkeys(problems)),
        )


def _runbook(name: str) -> Answer | None:
    path = CHECKOUT / "docs" / "runbooks" / f"{name}.md"
    if not path.is_file():
        return None
    from markdown_it import MarkdownIt  # late: rich brings it along, and few ask

    body = MarkdownIt("commonmark", {"html": False}).render(path.read_text())
    style = re.search(r"<style>(.*?)</style>", PAGE, flags=re.DOTALL)
    assert style is not None
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f'<meta name="color-scheme" content="light dark"><style>{style[1]}</style>'
        f'<main><p><a href="/">slipway</a></p>{body}</main></html>'
    )
    return Answer("text/html; charset=utf-8", text.encode(), f"default-src 'none'; style-src {_hashes('style')}")


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    """Make the handler of requests to a site."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30.0  # an idle connection

        def do_GET(self) -> None:
            # A page from elsewhere whose name was pointed at this machine must not read it.
            host = self.headers.get("Host", "").partition(":")[0]
            answer = site.answer(self.path.partition("?")[0]) if host in (HOST, "localhost") else None
            found = answer or Answer("text/plain", b"no such page\n")
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", found.kind)
            self.send_header("Content-Length", str(len(found.body)))
            self.send_header("Content-Security-Policy", found.policy)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(found.body)

        def log_message(self, *_: object) -> None:
            """Nobody wants a line a second."""

    return Handler


def serve(port: int, params: Params) -> None:
    """Serve until a signal."""
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer((HOST, port), handler(Site(params, here()))).serve_forever()


if __name__ == "__main__":
    sys.exit(programs.main("monitor", __doc__, serve))
