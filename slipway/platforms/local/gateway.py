"""The gateway's admin client, and its configuration from the template in infra/nginx."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from slipway import artifacts
from slipway.errors import PlatformError, StackError
from slipway.params import GatewayParams, Params
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.unix_http import UnixConnection

MODULES = Path("/usr/lib/nginx/modules")
_TIMEOUT_S = 5.0


def put(layout: Layout, document: Mapping[str, Any]) -> None:
    """Put routing and replicas in force, at once and together.

    A gateway that was silent for longer than anybody waits finds what it was sent meanwhile; by the moment it was sent
    (s since the machine started) it knows what came later, so that a promotion that was given up moves nobody.

    Raises:
        PlatformError: the gateway does not answer, or refuses the document.
    """
    sent = {**document, "sent_s": time.monotonic()}
    _call(layout.gateway_socket, "PUT", "/state", json.dumps(sent).encode())


def put_tokens(layout: Layout, tokens: Mapping[str, Mapping[str, str]]) -> None:
    """Put bearer tokens in force, by their hashes; see `slipway.tokens`.

    Raises:
        PlatformError: the gateway does not answer, or refuses them.
    """
    _call(layout.gateway_socket, "PUT", "/tokens", json.dumps(tokens).encode())


def state(layout: Layout) -> Any:
    """Read what is in force: champion, canary, canary_weight, and `replicas` by address with ready and in_flight.

    Raises:
        PlatformError: the gateway does not answer.
    """
    return _call(layout.gateway_socket, "GET", "/state", None)


def _call(socket: Path, method: str, path: str, body: bytes | None) -> Any:
    connection = UnixConnection(socket, _TIMEOUT_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PlatformError(f"the gateway is silent on {socket} ({error}); start it with `make up`") from error
    finally:
        connection.close()
    if response.status != 200:
        raise PlatformError(f"the gateway refuses the {path[1:]}: {answer.get('error')}")
    return answer


def render(layout: Layout, checkout: Path, params: Params) -> str:
    """Render nginx.conf for this state folder."""
    folder, granted = checkout / "infra" / "nginx", params.gateway
    certificate = _certificate(granted)
    template = jinja2.Template(
        (folder / "nginx.conf.j2").read_text(), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text: str = template.render(
        root=os.geteuid() == 0,
        modules=MODULES,
        lua=folder / "lua",
        state=layout.platform_file,
        tokens=layout.tokens_file,
        socket=layout.gateway_socket,
        inner_socket=layout.inner_socket,
        rate_rps=granted.rate_rps,
        burst=granted.burst,
        concurrency=granted.concurrency,
        read_ms=round(granted.read_s * 1000),
        tls_certificate=certificate and certificate[0],
        tls_key=certificate and certificate[1],
        gateway_port=params.stack.gateway_port,
        metrics_port=params.stack.metrics_port,
        max_body_bytes=params.serve.max_body_bytes,
        batch_in_flight=params.pools.batch_in_flight,
        slo_p99_seconds=params.slo.p99_ms / 1000,
        slo_error_ratio=params.slo.max_error_ratio,
    )
    return text


def url(params: Params) -> str:
    """Base URL of the service."""
    scheme = "http" if params.gateway.tls_certificate is None else "https"
    return f"{scheme}://127.0.0.1:{params.stack.gateway_port}"


def revision(params: Params) -> str:
    """What changes with the certificate, so that the next `up` starts the gateway with the new one."""
    return "".join(artifacts.sha256(path) for path in _certificate(params.gateway) or ())


def _certificate(granted: GatewayParams) -> tuple[Path, Path] | None:
    """Paths of the certificate and its key, if there are any.

    Raises:
        StackError: they cannot be read, or do not belong together.
    """
    if granted.tls_certificate is None or granted.tls_key is None:
        return None
    paths = Path(granted.tls_certificate).resolve(), Path(granted.tls_key).resolve()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*paths, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise StackError(
            f"gateway.tls_certificate and tls_key: {paths[0]}, {paths[1]}: not usable ({error})"
        ) from error
    return paths


def _no_password() -> bytes:
    raise ValueError("the key is encrypted; give one that is not")
