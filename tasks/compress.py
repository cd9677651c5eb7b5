"""Search among recipes for the fastest model that loses little, and seal it as a package.

Reads data/ingest and models/trained; writes models/export (fp32.onnx and one file a recipe), models/package,
reports/compress.json (of each variant: quality overall and by slice, latency, size, peak memory; the Pareto front; what
was chosen and why the others were not), reports/compress.html, and the variants' plots in reports/compress/.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slipway import artifacts, config, package, stage
from slipway.compression import build, finetune, page, pareto, recipes, search
from slipway.compression.finetune import Tuner
from slipway.compression.pareto import Choice, Variant
from slipway.compression.recipes import Recipe
from slipway.compression.search import Form
from slipway.params import Params
from slipway.progress import Progress
from slipway.serving import engines, scores
from slipway.stage import Report
from slipway.workloads.base import part

DATA, TRAINED, EXPORT, PACKAGE = (
    Path("data/ingest"),
    Path("models/trained"),
    Path("models/export"),
    Path("models/package"),
)
PAGE, PLOTS = Path("reports/compress.html"), Path("reports/compress")
SEED = 0  # of all samples that are drawn here
SCORED = 1000  # held-out requests whose scores a replica knows


def run(params: Params, report: Report) -> None:
    """Build, time, score, choose, seal."""
    export, scoring = part(params.workload, "export").EXPORT(DATA, TRAINED), part(params.workload, "scoring")
    names = search.usable(params.compress.engine, hasattr(export, "module"))
    tried, left_out = _tried(params, names)
    work = config.home() / "compress" / finetune.key(params, TRAINED)
    with Progress("compress", 2 * len(tried) + 4, "steps") as progress:
        models: dict[Recipe, bytes] = {recipes.FULL: export.fp32()}
        tuner = Tuner(params, DATA, work)
        for recipe in tried:
            models[recipe] = build.build(recipe, export, tuner, params.compress.calibration_samples, SEED)
            progress.advance(step=recipe.name)
        with artifacts.writing(EXPORT) as beside:
            beside.mkdir()
            for recipe, model in models.items():
                (beside / f"{recipe.name}.onnx").write_bytes(model)
        found = search.forms(models, names, export, SEED)
        progress.advance(step="timed")
        with artifacts.writing(PACKAGE) as beside:
            beside.mkdir()
            export.files(beside)
            judge = search.Judge(scoring, DATA, beside, params.compress, SEED)
            judge.refer(search.reference(found))
            progress.advance(step="reference")
            inputs, variants = export.requests(max(search.BATCHES), 1, SEED)[0], []
            quickest = search.fastest(found)
            for form in quickest:
                variants.append(judge.variant(form, found, inputs))
                progress.advance(step=form.recipe.name)
            choice = pareto.choose(variants, params.compress.min_speedup)
            chosen = next(form for form in quickest if form.recipe.name == choice.recipe)
            (beside / package.MODEL).write_bytes(models[chosen.recipe])
            _seal(params, export, chosen, beside)
        progress.advance(step="sealed")
    told = {
        "workload": params.workload,
        "metric": scoring.METRIC,
        "samples": len(judge.samples),
        "max_drop": params.compress.max_drop,
        **_told(variants, choice, found),
        "left_out": left_out,
    }
    for key, value in told.items():
        report[key] = value
    page.write(PAGE, told)
    with artifacts.writing(PLOTS) as beside:
        page.plots(beside, told)
    shutil.rmtree(work)  # networks that were trained; a search that is killed before finds them again
    for recipe_name, reason in {**left_out, **choice.refused}.items():
        print(f"compress: {recipe_name} is not served: {reason}", file=sys.stderr)
    print(f"compress: {choice.recipe} is served: {choice.reason}", file=sys.stderr)


def _tried(params: Params, names: Sequence[str]) -> tuple[list[Recipe], dict[str, str]]:
    """The recipes that can be tried with these engines, and why the others cannot."""
    asked = [recipes.parse(name) for name in dict.fromkeys(params.compress.recipes)]
    left = {
        recipe.name: f"none of the engines here ({', '.join(names)}) takes {recipe.name} in {recipe.precision}"
        for recipe in asked
        if not any(search.computes(name, recipe) for name in names)
    }
    return [recipe for recipe in asked if recipe.name not in left], left


def _seal(params: Params, export: Any, chosen: Form, folder: Path) -> None:
    golden = dict(export.golden())
    names = [spec.name for spec in export.outputs]
    answer = dict(zip(names, chosen.run(names, golden), strict=True))
    (folder / engines.KINDS[chosen.engine].file).write_bytes(chosen.model)
    recipe = chosen.recipe
    package.seal(
        folder,
        params.workload,
        recipe.precision,
        export.inputs,
        export.outputs,
        (golden, answer),
        recipe=recipe.name,
        engine=chosen.engine,
        score_deciles=_deciles(params, chosen, folder),
    )


def _deciles(params: Params, chosen: Form, folder: Path) -> tuple[float, ...]:
    """How the scores of held-out requests spread, which a replica holds live ones against."""
    endpoint = part(params.workload, "schema").ENDPOINT(folder)
    samples = part(params.workload, "export").replay(DATA, SCORED, SEED)
    queries = [endpoint.decode(json.dumps(sample["request"]).encode()) for sample in samples]
    return scores.deciles(endpoint, chosen.run, queries)


def _told(variants: Sequence[Variant], choice: Choice, found: Sequence[Form]) -> Mapping[str, Any]:
    """What the search found, as plain values."""
    return {
        "variants": {variant.recipe: _plain(asdict(variant)) for variant in variants},
        "front": pareto.front(variants),
        "choice": asdict(choice),
        "forms": [
            {"recipe": form.recipe.name, "engine": form.engine, "latency_ms": _plain(form.latency_ms)} for form in found
        ],
    }


def _plain(value: Any) -> Any:
    """Keys become texts and figures short, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    stage.main(run)
