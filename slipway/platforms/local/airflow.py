"""Airflow's part of the stack: its environment, its database, its one user, its health.

Its parts are started one by one: `airflow standalone` opens its log servers to every interface and leaves orphans.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from slipway import artifacts, loopback
from slipway.errors import StackError
from slipway.params import Params

USER = "admin"
PARALLELISM = 4
# Name of the program, its command, and the part of the health report that tells of it.
PARTS = (
    ("airflow", ["api-server"], "metadatabase"),
    ("airflow-scheduler", ["scheduler", "--skip-serve-logs"], "scheduler"),
    ("airflow-dags", ["dag-processor"], "dag_processor"),
    ("airflow-triggerer", ["triggerer", "--skip-serve-logs"], "triggerer"),
)
NAMES = tuple(name for name, *_ in PARTS)
_TIMEOUT_S = 2.0
_MIGRATION_TIMEOUT_S = 300.0


def environment(folder: Path, checkout: Path, params: Params) -> dict[str, str]:
    """Settings of every part of Airflow, and of the tasks that it runs."""
    url = f"http://127.0.0.1:{params.stack.airflow_port}"
    settings = {
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__DAGS_FOLDER": str(checkout / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__PARALLELISM": str(PARALLELISM),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(password_file(folder)),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(params.stack.airflow_port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "PYTHONPATH": str(checkout),
    }
    plugins = checkout / "dags" / "plugins"
    return settings | ({"AIRFLOW__CORE__PLUGINS_FOLDER": str(plugins)} if plugins.is_dir() else {})


def password_file(folder: Path) -> Path:
    """Where the generated password of the one user lies: JSON, name to password."""
    return folder / "simple_auth_manager_passwords.json.generated"


def make_password(folder: Path) -> None:
    """Generate the password, once; Airflow would do so too, but print it into its log."""
    path = password_file(folder)
    if not path.exists():
        descriptor = os.open(path.with_suffix(".new"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:  # noqa: PTH123  # a descriptor, so that the mode holds from the first byte
            json.dump({USER: secrets.token_urlsafe(12)}, file)
        path.with_suffix(".new").rename(path)


def migrate(folder: Path, python: str, settings: Mapping[str, str], log: Path) -> None:
    """Bring Airflow's database to the installed version; does nothing when it is there already.

    Raises:
        StackError: the migration failed; names the log.
    """
    stamp, installed = folder / "migrated", version("apache-airflow")
    if stamp.exists() and stamp.read_text() == installed:
        return
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [python, "-m", "airflow", "db", "migrate"],
                cwd=folder,
                env={**os.environ, **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_MIGRATION_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StackError(
                f"Airflow's database was not migrated in {_MIGRATION_TIMEOUT_S:.0f} s: see {log}"
            ) from error
    if done.returncode:
        raise StackError(f"Airflow's database could not be migrated: see {log}")
    artifacts.write_text(stamp, installed)


def healthy(url: str, part: str) -> bool:
    """Whether one part is well, as the API server reports it from the parts' heartbeats."""
    try:
        with loopback.urlopen(f"{url}/api/v2/monitor/health", timeout=_TIMEOUT_S) as response:
            return bool(json.load(response)[part]["status"] == "healthy")
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or without a heartbeat yet
        return False
