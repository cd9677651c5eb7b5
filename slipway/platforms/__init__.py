"""Platforms: where a service runs."""

from __future__ import annotations

from slipway.params import Params
from slipway.platforms.base import Platform


def connect(params: Params) -> Platform:
    """Give the platform that `params.platform` names."""
    from slipway.platforms.local.platform import LocalPlatform

    return LocalPlatform(params)
