"""Make a bad candidate of the champion, to see a release refuse it: same model, but it says other than it means.

    python -m benchmarks.bad_candidate

Registers the copy as `candidate` in this checkout's registry, with the champion's held-out samples. Its golden outputs
are right, so it comes up ready; only its online metric gives it away. Release it with the DAG `release`, or with
`python -m tasks.deploy` and the steps after it.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path

from slipway import config, package, store, tracking
from slipway.errors import SlipwayError
from slipway.workloads.base import part

RUN = "bad-candidate"


def make(workload: str) -> str:
    """Register the bad copy of a workload's champion as candidate; its version."""
    champion = tracking.resolve(workload, "champion")
    place = tracking.fetch(workload, champion)
    with tempfile.TemporaryDirectory(prefix="slipway-") as folder:
        copy = Path(folder) / "package"
        shutil.copytree(place / "package", copy)
        permute(copy)
        run = store.start(f"{RUN}-of-{champion}", {"slipway.bad": "names permuted"})
        version = tracking.register(workload, copy, place / "replay.jsonl", run, {"made": f"{RUN} of {champion}"})
    tracking.set_alias(workload, "candidate", version)
    return version


def permute(folder: Path, seed: int = 0) -> None:
    """Shuffle the names of what a package answers, and seal it: the model is the same, what it answers is nonsense."""
    sealed = package.load(folder)
    golden = sealed.golden()
    part(sealed.workload, "export").muddle(folder, random.Random(seed))
    form = (sealed.workload, sealed.precision, sealed.inputs, sealed.outputs)
    package.seal(folder, *form, golden, recipe=sealed.recipe, engine=sealed.engine)


def main() -> int:
    """Make it and say what to do next."""
    try:
        params = config.load()
        version = make(params.workload)
    except SlipwayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{params.workload}/{version} is the candidate; release it and watch it being refused: python -m tasks.deploy"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
