"""The command that every stage is: `python -m tasks.STAGE`, its help, its exit code and its report."""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slipway import artifacts, commands, config
from slipway.errors import ParamsError, SlipwayError
from slipway.params import Params, Section

REPORTS = Path("reports")
CONF_VARIABLE = "SLIPWAY_CONF"


class Report:
    """What a stage found out: `report["key"] = value`, saved as `reports/STAGE.json` when the stage ends."""

    def __init__(self, stage: str, folder: Path = REPORTS) -> None:
        self.path = folder / f"{stage}.json"
        self._began = time.monotonic()
        self._wanted = True
        self._values: dict[str, Any] = {"stage": stage, "started": datetime.now(UTC).isoformat(timespec="seconds")}

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def discard(self) -> None:
        """Leave no report: this is a part of a stage that another call reports."""
        self._wanted = False

    def save(self, status: str, error: str | None = None) -> None:
        """Write the report; `status` is done or failed."""
        self._values["seconds"] = round(time.monotonic() - self._began, 3)
        self._values["status"] = status
        if error is not None:
            self._values["error"] = error
        if self._wanted:
            artifacts.write_json(self.path, self._values)


def conf() -> dict[str, Any]:
    """What the caller hands to this one run, beside `params.yaml`: JSON in the environment, never a command line."""
    text = os.environ.get(CONF_VARIABLE) or "{}"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ParamsError(f"environment: {CONF_VARIABLE} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ParamsError(f"environment: {CONF_VARIABLE} must be a JSON object, got {text[:80]}")
    return value


@dataclass(frozen=True)
class Show:
    """Something that a stage's command prints instead of running: `--NAME`, and options of it that take a value."""

    name: str
    text: str
    """Help of the flag."""
    value: str | None
    """What the flag itself takes, such as VERSION; `show` gets it among the options. None: nothing."""
    options: Mapping[str, str]
    """Help of each option."""
    show: Callable[[Params, Mapping[str, str]], None]
    """Prints; called with the options that were given."""


def main(
    run: Callable[[Params, Report], None], takes: Mapping[str, str] | None = None, shows: Show | None = None
) -> None:
    """Run a stage as a command: parse its arguments, read `params.yaml`, call `run`, write the report, exit.

    Args:
        run: the stage.
        takes: keys of `conf()` that the command line takes too, as `--KEY VALUE`, with their help.
        shows: what the command can print instead; no report is written then.

    Exit codes: 0 done; 2 the user must mend it; 75 trying again may help; 1 a bug (with its traceback).
    """
    file = Path(inspect.getfile(run))
    name = file.stem
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{name}",
        description=inspect.getdoc(inspect.getmodule(run)),
        epilog=_section_help(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=Path, default=config.PARAMS_FILE, help="the parameters (default: %(default)s)")
    for key, text in (takes or {}).items():
        parser.add_argument(f"--{key}", help=text)
    if shows is not None:
        taken: dict[str, Any] = {"action": "store_true"} if shows.value is None else {"metavar": shows.value}
        parser.add_argument(f"--{shows.name}", help=shows.text, **taken)
        for key, text in shows.options.items():
            parser.add_argument(f"--{key}", help=f"with --{shows.name}: {text}")
    options = parser.parse_args()
    commands.log_to_stderr(os.environ.get("SLIPWAY_LOG", "INFO"))

    def work(report: Report) -> None:
        given = {key: getattr(options, key) for key in takes or {} if getattr(options, key) is not None}
        os.environ[CONF_VARIABLE] = json.dumps(conf() | given)
        run(config.load(options.params), report)

    if shows is not None:
        given = {key: value for key in shows.options if (value := getattr(options, key)) is not None}
        asked = getattr(options, shows.name)
        if asked:
            named = {} if shows.value is None else {shows.name: asked}
            sys.exit(_show(name, shows, options.params, named | given))
        if given:
            parser.error(f"--{next(iter(given))} is of use with --{shows.name} alone")
    sys.exit(call(name, work))


def _show(name: str, shows: Show, path: Path, given: Mapping[str, str]) -> int:
    try:
        shows.show(config.load(path), given)
    except SlipwayError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def call(name: str, work: Callable[[Report], None]) -> int:
    """Do `work` and save its report, whatever happens; the exit code of the command."""
    report = Report(name)
    try:
        work(report)
        report.save("done")
    except SlipwayError as error:
        return _fail(report, name, str(error), error.exit_code)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            _fail(report, name, f"{type(error).__name__}: {error}", 1)
            raise
        where = error.filename or Path.cwd()
        return _fail(report, name, f"{where}: the disk is full; free some space and run the stage again", 2)
    except KeyboardInterrupt:
        return _fail(report, name, "interrupted; run the stage again to go on", 130)
    except BaseException as error:
        _fail(report, name, f"{type(error).__name__}: {error}", 1)
        raise
    return 0


def _fail(report: Report, name: str, message: str, code: int) -> int:
    try:
        report.save("failed", message)
    except OSError as error:  # the disk may be full: the message still has to get out
        print(f"{name}: no report written: {error}", file=sys.stderr)
    print(f"{name}: {message}", file=sys.stderr)
    return code


def _section_help(name: str) -> str:
    fields = {info.alias or key: info.annotation for key, info in Params.model_fields.items()}
    section = fields.get(name)
    if section is None or not issubclass(section, Section):  # type: ignore[arg-type]  # sections are classes
        return ""
    lines = [f"  {name}.{key}: {info.description}" for key, info in section.model_fields.items()]
    return "parameters (params.yaml):\n" + "\n".join(lines)
