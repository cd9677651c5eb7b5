"""The gateway's admin client, and its configuration from the template in infra/nginx."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from slipway.config import Params
from slipway.errors import PlatformError
from slipway.platforms.local.layout import Layout
from slipway.platforms.local.unix_http import UnixConnection

MODULES = Path("/usr/lib/nginx/modules")
_TIMEOUT_S = 5.0


def put(layout: Layout, document: Mapping[str, Any]) -> None:
    """Put routing and replicas in force, at once and together.

    Raises:
        PlatformError: the gateway does not answer, or refuses the document.
    """
    _call(layout.gateway_socket, "PUT", json.dumps(document).encode())


def state(layout: Layout) -> Any:
    """Read what is in force: champion, canary, canary_weight, and `replicas` by address with ready and in_flight.

    Raises:
        PlatformError: the gateway does not answer.
    """
    return _call(layout.gateway_socket, "GET", None)


def _call(socket: Path, method: str, body: bytes | None) -> Any:
    connection = UnixConnection(socket, _TIMEOUT_S)
    try:
        connection.request(method, "/state", body)
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PlatformError(f"the gateway is silent on {socket} ({error}); start it with `make up`") from error
    finally:
        connection.close()
    if response.status != 200:
        raise PlatformError(f"the gateway refuses the state: {answer.get('error')}")
    return answer


def render(layout: Layout, checkout: Path, params: Params) -> str:
    """Render nginx.conf for this state folder."""
    folder = checkout / "infra" / "nginx"
    template = jinja2.Template(
        (folder / "nginx.conf.j2").read_text(), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text: str = template.render(
        root=os.geteuid() == 0,
        modules=MODULES,
        lua=folder / "lua",
        state=layout.platform_file,
        socket=layout.gateway_socket,
        gateway_port=params.stack.gateway_port,
        metrics_port=params.stack.metrics_port,
        max_body_bytes=params.serve.max_body_bytes,
        slo_p99_seconds=params.slo.p99_ms / 1000,
        slo_error_ratio=params.slo.max_error_ratio,
    )
    return text
