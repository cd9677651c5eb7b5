"""The replica's log: a JSON object a line, or plain text for people (`SLIPWAY_LOG_FORMAT`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

FORMATS = ("text", "json")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Writes a record as one line; what was given as `extra={"about": {...}}` stands beside the rest.

    Args:
        about: what every line bears, such as the version.
    """

    def __init__(self, about: Mapping[str, str]) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= {**self._about, **getattr(record, "about", {})}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(level: str, kind: str, about: Mapping[str, str]) -> None:
    """Write all that is logged to standard error.

    Args:
        level: lowest level, such as INFO.
        kind: one of `FORMATS`.
        about: what every JSON line bears.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(about) if kind == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level, handlers=[handler])
