"""The local stack from a terminal: `python -m slipway.platforms.local setup|up|down|status`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slipway import config
from slipway.errors import SlipwayError
from slipway.params import Params
from slipway.platforms.local import airflow, stack, system
from slipway.platforms.local.layout import here


def main() -> int:
    """Do what the command line says; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slipway.platforms.local", description=__doc__)
    parser.add_argument("--params", type=Path, default=config.PARAMS_FILE, help="the parameters (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="install the system programs that are missing")
    start = commands.add_parser("up", help="start the stack; what runs already stays")
    start.add_argument("--only", default="", help="names of programs, parted by commas (default: all)")
    commands.add_parser("down", help="end every process that `up` began, and nothing else")
    commands.add_parser("status", help="show what runs, where, since when; exit 1 if something is down")
    options = parser.parse_args()
    try:
        return _do(options)
    except SlipwayError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _do(options: argparse.Namespace) -> int:
    if options.command == "setup":
        system.install()
    elif options.command == "up":
        _up(config.load(options.params), [name for name in options.only.split(",") if name])
    elif options.command == "down":
        stack.down()
    else:
        return _show(stack.status(config.load(options.params)))
    return 0


def _up(params: Params, only: list[str]) -> None:
    stack.up(params, only)
    if not only or "page" in only:
        print(f"Live page: http://127.0.0.1:{params.stack.page_port}")
    if not only or "airflow" in only:
        secret = airflow.password_file(here().folder("airflow"))
        print(f"Airflow: http://127.0.0.1:{params.stack.airflow_port}, user {airflow.USER}, password in {secret}")


def _show(rows: list[stack.Row]) -> int:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print("nothing was started here; start the stack with `make up`")
        return 1
    table = Table("program", "state", "pid", "uptime", "address", box=None)
    for row in rows:
        colour = "green" if row.well else "red"
        minutes, seconds = divmod(int(row.uptime_s), 60)
        uptime = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if row.pid else ""
        table.add_row(row.name, f"[{colour}]{row.state.lower()}[/]", str(row.pid or ""), uptime, row.address)
    Console().print(table)
    return 0 if all(row.well for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
