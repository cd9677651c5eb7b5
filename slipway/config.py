"""`params.yaml`: read, checked, handed on and overridden in this one place; `params` says what it may hold."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from slipway.errors import ParamsError
from slipway.params import Params, Section

PARAMS_FILE = Path("params.yaml")
HANDED = "SLIPWAY_PARAMS"


def handed() -> Params:
    """The parameters that `up` handed to a program of the stack; those of the file where it is run by hand."""
    given = os.environ.get(HANDED)
    return Params.model_validate_json(given) if given else load()


def hand(params: Params) -> dict[str, str]:
    """The environment by which a program of the stack gets its parameters."""
    return {HANDED: params.model_dump_json(by_alias=True)}


def home() -> Path:
    """The one folder of the checkout that holds all state; a DAG run's workspace points to the checkout's own."""
    return Path(os.environ.get("SLIPWAY_HOME", ".slipway")).resolve()


def workload_names() -> list[str]:
    """Names of the workloads: the folders of slipway/workloads that have a `params.py`."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "workloads").glob("*/params.py"))


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and check `params.yaml`.

    Raises:
        ParamsError: names the file, the key, what is wrong, and what is allowed.
    """
    return parse(_read(path), path)


def parse(raw: Mapping[str, Any], path: Path = PARAMS_FILE) -> Params:
    """Check the mapping that was read from `path`."""
    known = set(workload_names())
    workload = raw.get("workload", "ranker")
    if workload not in known:
        raise ParamsError(f"{path}: workload: no workload {workload!r}; there are: {', '.join(sorted(known))}")
    if "model" in raw:
        raise ParamsError(f"{path}: model: unknown key; a workload's section bears its name: {workload}")
    sections = {name: check(_section_of(name), raw.get(name) or {}, path, name) for name in known}
    rest = {key: value for key, value in raw.items() if key not in known}
    params: Params = check(Params, rest, path)
    _offered(params, path)
    return params.model_copy(update={"model": sections[workload]})


def _offered(params: Params, path: Path) -> None:
    """Refuse a recipe that the workload does not offer, before hours of training and not after."""
    offers: tuple[str, ...] = _part_of(params.workload).TECHNIQUES
    for recipe in params.compress.recipes:
        wanted = [step for step in recipe.split("-") if not step.isdigit()]
        if not set(wanted) <= set(offers):
            raise ParamsError(
                f"{path}: compress.recipes: workload {params.workload} offers no {recipe}; it has: {', '.join(offers)}"
            )


def _section_of(workload: str) -> type[Section]:
    section: type[Section] = _part_of(workload).MODEL
    return section


def _part_of(workload: str) -> Any:
    # The one look upward: a workload's section lives with the workload, so that adding one touches no other file.
    return importlib.import_module(f"slipway.workloads.{workload}.params")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: no such file; run from the root of the checkout, or give --params") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: must hold sections of keys and values, got {type(raw).__name__}")
    return raw


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain values.

    Raises:
        OSError: it cannot be read.
        ParamsError: it is not YAML; says where.
    """
    from ruamel.yaml import YAML  # late: a replica reads no file, and has to start fast
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def check(model: type[Any], raw: Any, path: Path, prefix: str = "") -> Any:
    """Make a section of what was read from `path`, under the key `prefix`.

    Raises:
        ParamsError: names the path, the key, what is wrong, and what is allowed.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, problem, path, prefix) for problem in error.errors()]
        raise ParamsError("\n".join(lines)) from error


def _explain(model: type[BaseModel], problem: Any, path: Path, prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([*([prefix] if prefix else []), *location]) or "the file"
    parent, field = _walk(model, location)
    if problem["type"] == "extra_forbidden":
        names = sorted(info.alias or name for name, info in parent.model_fields.items() if not info.exclude)
        return f"{path}: {key}: unknown key; allowed here: {', '.join(names)}"
    if problem["type"] == "value_error":  # our own checks tell what they got, where it is no secret, and what to do
        return f"{path}: {key}: {problem['ctx']['error']}"
    help_text = f"; allowed: {field.description}" if field is not None and field.description else ""
    return f"{path}: {key}: {problem['msg']} (got {repr(problem['input'])[:80]}){help_text}"


def _walk(model: type[BaseModel], location: list[str]) -> tuple[type[BaseModel], Any]:
    """Follow a location into nested sections: the section that holds it, and the field it names, if there is one."""
    field = None
    for part in location:
        if part.isdigit():  # a place in a list, whose field was named before
            continue
        fields = {info.alias or name: info for name, info in model.model_fields.items()}
        if part not in fields:
            break
        field = fields[part]
        for kind in (field.annotation, *get_args(field.annotation)):  # also of a list, or of what may be left out
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return model, field


@dataclass(frozen=True)
class FormField:
    """One field that a user may turn for a single run, as JSON schema."""

    key: str
    """Dotted key in `params.yaml`, such as `train.epochs`."""
    default: Any
    """Value in force in `params.yaml`."""
    schema: Mapping[str, Any]
    """JSON schema of the value, with its help as `description`."""


def form(params: Params) -> list[FormField]:
    """List the fields that a user may turn for one run, with the values of `params` as defaults."""
    fields = _form_of(params, "") + _form_of(params.model, f"{params.workload}.")
    names = {"type": "string", "enum": workload_names()}
    return [FormField(f.key, f.default, {**f.schema, **names} if f.key == "workload" else f.schema) for f in fields]


def _form_of(section: Section, prefix: str) -> list[FormField]:
    schema = type(section).model_json_schema(by_alias=True)
    found = []
    for name, info in type(section).model_fields.items():
        key, value = info.alias or name, getattr(section, name)
        if isinstance(value, Section):
            found += [] if info.exclude else _form_of(value, f"{prefix}{key}.")
        elif schema["properties"][key].get("form"):
            value = list(value) if isinstance(value, tuple) else value
            plain = {k: v for k, v in schema["properties"][key].items() if k not in {"form", "default"}}
            found.append(FormField(prefix + key, value, plain))
    return found


def override(path: Path, values: Mapping[str, Any]) -> Params:
    """Set dotted keys in a `params.yaml`, keeping its comments, after checking the whole of the result.

    Raises:
        ParamsError: a key is unknown or a value is not allowed; the file is then as it was.
    """
    from ruamel.yaml import YAML

    from slipway.artifacts import write_text

    raw = _read(path)
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(path.read_text())
    for key, value in values.items():
        *sections, leaf = key.split(".")
        plain, commented = raw, document
        for section in sections:
            plain, commented = plain.setdefault(section, {}), commented.setdefault(section, {})
        if plain.get(leaf) != value or leaf not in plain:
            plain[leaf] = value
            commented[leaf] = value
    params = parse(raw, path)
    text = io.StringIO()
    yaml.dump(document, text)
    write_text(path, text.getvalue())
    return params
