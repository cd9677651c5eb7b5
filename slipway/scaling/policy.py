"""The policy by which replicas follow the load: a HorizontalPodAutoscaler (autoscaling/v2), checked when it is read.

One file for both platforms, so it is refused here what the autoscaler of the local platform would not follow: a field
that is read over in silence is worse than an error. Defaults are those of Kubernetes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from slipway import config
from slipway.errors import ParamsError
from slipway.params import Section

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(n|u|m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_POWERS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_POWERS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def quantity(value: Any) -> float:
    """Read a number as Kubernetes writes it: 2, 0.5, "500m", "1k", "4Mi".

    Raises:
        ValueError: it is none.
    """
    found = _QUANTITY.fullmatch(str(value))
    if found is None or isinstance(value, bool):
        raise ValueError(f'a quantity such as 2, "80m" or "1k" is needed, got {value!r}')
    return float(found[1]) * _POWERS.get(found[2], 1.0)


Quantity = Annotated[float, BeforeValidator(quantity), Field(gt=0)]
Seconds = Annotated[int, Field(ge=1, le=1800)]


class Part(Section):
    """A part of the file, with Kubernetes' names."""

    model_config = ConfigDict(alias_generator=to_camel)


class Metadata(Part):
    """Who it is."""

    name: str
    labels: Mapping[str, str] = Field({})
    annotations: Mapping[str, str] = Field({})
    namespace: str = "default"


class Target(Part):
    """What a metric should be."""

    type: Literal["Utilization", "Value", "AverageValue"]
    average_utilization: Annotated[int, Field(ge=1)] | None = None
    """Percent of what a replica requests (1 or more)."""
    value: Quantity | None = None
    """Of the metric itself (a quantity over 0)."""
    average_value: Quantity | None = None
    """Of the metric for each replica (a quantity over 0)."""

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = {name for name in ("average_utilization", "value", "average_value") if getattr(self, name) is not None}
        needed = {"Utilization": "average_utilization", "Value": "value", "AverageValue": "average_value"}[self.type]
        if given != {needed}:
            raise ValueError(f"type {self.type} takes {to_camel(needed)} alone")
        return self

    @property
    def amount(self) -> float:
        """The number, in the metric's unit; utilisation as a ratio (1: all that is requested)."""
        if self.average_utilization is not None:
            return self.average_utilization / 100
        return self.value or self.average_value or 0.0


class Resource(Part):
    """What a replica uses of its machine."""

    name: Literal["cpu"]
    """cpu is the one resource that the local platform measures."""
    target: Target

    @model_validator(mode="after")
    def _utilization(self) -> Resource:
        if self.target.type != "Utilization":
            raise ValueError("the target of a resource must be of type Utilization here")
        return self


class Selector(Part):
    """Which series of a metric."""

    match_labels: Mapping[str, str] = Field({})


class Identifier(Part):
    """A series of Prometheus, by the name that an adapter leaves as it is."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")]
    selector: Selector = Selector()

    def query(self, **labels: str) -> str:
        """PromQL for its series, those with `labels` alone."""
        wanted = {**self.selector.match_labels, **labels}
        matchers = ",".join(f"{key}={json.dumps(value)}" for key, value in wanted.items())
        return f"{self.name}{{{matchers}}}"


class Pods(Part):
    """A metric of each replica."""

    metric: Identifier
    target: Target

    @model_validator(mode="after")
    def _average(self) -> Pods:
        if self.target.type != "AverageValue":
            raise ValueError("the target of a metric of pods must be of type AverageValue")
        return self


class External(Part):
    """One number for all replicas."""

    metric: Identifier
    target: Target

    @model_validator(mode="after")
    def _value(self) -> External:
        if self.target.type == "Utilization":
            raise ValueError("the target of an external metric must be of type Value or AverageValue")
        return self


class Metric(Part):
    """What the number of replicas follows."""

    type: Literal["Resource", "Pods", "External"]
    """Kinds that the local platform follows."""
    resource: Resource | None = None
    pods: Pods | None = None
    external: External | None = None

    @model_validator(mode="after")
    def _one(self) -> Metric:
        given = [name for name in ("resource", "pods", "external") if getattr(self, name) is not None]
        if given != [self.type.lower()]:
            raise ValueError(f"type {self.type} takes the part {self.type.lower()} alone")
        return self


class Speed(Part):
    """A limit on the change within a time."""

    type: Literal["Pods", "Percent"]
    value: Annotated[int, Field(ge=1)]
    """Replicas, or percent of those at the beginning of the time (1 or more)."""
    period_seconds: Seconds
    """The time (s, 1..1800)."""


class Rules(Part):
    """How fast it may go in one direction."""

    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] = 0
    """Time of which all proposals are heeded (s, 0..3600)."""
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    """Which policy counts: the one that allows most, the one that allows least, or none: it does not move."""
    policies: Annotated[tuple[Speed, ...], Field(min_length=1, strict=False)]


OUT = Rules(
    policies=(Speed(type="Percent", value=100, periodSeconds=15), Speed(type="Pods", value=4, periodSeconds=15))
)
IN = Rules(stabilizationWindowSeconds=300, policies=(Speed(type="Percent", value=100, periodSeconds=15),))


class Behavior(Part):
    """How fast it may go; what is left out is as Kubernetes has it."""

    scale_up: Rules = OUT
    scale_down: Rules = IN

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        """What a direction leaves out, too."""
        if not isinstance(raw, dict):
            return raw
        known = {"scaleUp": OUT.model_dump(by_alias=True), "scaleDown": IN.model_dump(by_alias=True)}
        return {
            key: {**known.get(key, {}), **value} if isinstance(value, dict) else value for key, value in raw.items()
        }


class Reference(Part):
    """What is scaled: in a cluster a Deployment; on the local platform the champion, whatever it is called here."""

    api_version: str
    kind: str
    name: str


class Spec(Part):
    """The policy itself."""

    scale_target_ref: Reference
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Fewest replicas (1 or more)."""
    max_replicas: Annotated[int, Field(ge=1)]
    """Most replicas (1 or more)."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1, strict=False)]
    behavior: Behavior = Behavior()

    @model_validator(mode="after")
    def _in_order(self) -> Spec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"minReplicas {self.min_replicas} is over maxReplicas {self.max_replicas}")
        return self


class Policy(Part):
    """A HorizontalPodAutoscaler."""

    api_version: Literal["autoscaling/v2"]
    kind: Literal["HorizontalPodAutoscaler"]
    metadata: Metadata
    spec: Spec

    def at_most(self, replicas: int) -> Policy:
        """The same with fewer replicas at most, where a machine has no room for more."""
        most = max(self.spec.min_replicas, min(self.spec.max_replicas, replicas))
        return self.model_copy(update={"spec": self.spec.model_copy(update={"max_replicas": most})})


def read(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        ParamsError: names the file, the field, what is wrong, and what is allowed.
    """
    try:
        raw = config.read_yaml(path)
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); deploy.autoscaling names it") from error
    policy: Policy = config.check(Policy, raw, path)
    return policy
