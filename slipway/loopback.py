"""HTTP to this machine: it never goes through a proxy that the environment may name."""

from __future__ import annotations

import urllib.request

urlopen = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
