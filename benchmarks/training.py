"""Training at depth in one table: every technique against its absence, from one run of each benchmark.

    python -m benchmarks.training [--only zero,loader] [--video-games PATH] [--images PATH] [--rectools PYTHON]

Runs the benchmarks of ZeRO, checkpoints, communication, sparse training, the loader and time to quality, each in a
process of its own, and prints their claims together. What a machine lacks (two network namespaces need root), or a path
that was not given, is said in place of its rows. All of it takes about an hour on 2 cores; `--only` takes a part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.claims import Claim, tell

TOPICS = ("zero", "checkpoints", "communication", "sparse", "loader", "time_to_quality")
NEEDS = {"loader": "--images", "time_to_quality": "--video-games and --rectools"}
RESULT = Path(__file__).parent / "results" / "training.json"


def measure(topic: str, arguments: list[str]) -> list[Claim]:
    """Run one benchmark; its claims, or none where it could not run, which it says itself."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "claims.json"
        print(f"== {topic}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{topic}", "--json", str(file), *arguments], check=False
        )
        if done.returncode != 0 or not file.exists():
            print(f"== {topic}: no figures (exit code {done.returncode})", file=sys.stderr)
            return []
        return [Claim(**row) for row in json.loads(file.read_text())["claims"]]


def main() -> int:
    """Run what was asked for; 1 if a benchmark gave no figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TOPICS), help="benchmarks, parted by commas (default: all)")
    parser.add_argument("--video-games", type=Path, help="video_games.txt, for communication and time to quality")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs, for the loader")
    parser.add_argument("--rectools", type=Path, help="a Python that has rectools[torch], for time to quality")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the table goes as JSON (default: %(default)s)")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(TOPICS)):
        parser.error(f"--only: no benchmark {', '.join(unknown)}; there are: {', '.join(TOPICS)}")
    given: dict[str, list[str] | None] = {topic: [] for topic in TOPICS}
    given["communication"] = ["--source", str(options.video_games)] if options.video_games else []
    given["loader"] = [str(options.images)] if options.images else None
    peers = options.video_games and options.rectools
    given["time_to_quality"] = [str(options.video_games), "--rectools", str(options.rectools)] if peers else None
    runs = {topic: arguments for topic in chosen if (arguments := given[topic]) is not None}
    for topic in set(chosen) - set(runs):
        print(f"{topic}: left out; it needs {NEEDS[topic]}", file=sys.stderr)
    found = {topic: measure(topic, arguments) for topic, arguments in runs.items()}
    command = f"python -m benchmarks.training --only {','.join(runs)}"
    tell("Training at depth", command, [claim for claims in found.values() for claim in claims], options.json)
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
