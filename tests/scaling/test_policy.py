"""The file of the policy: the one that is shipped, and what is refused with its field named."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipway import config
from slipway.errors import ParamsError
from slipway.scaling import policy
from tests.conftest import ROOT

SHIPPED = ROOT / "infra" / "kubernetes" / "hpa.yaml"


def test_the_policy_that_is_shipped_says_what_was_promised() -> None:
    found = policy.read(SHIPPED)
    cpu, queue, p99 = found.spec.metrics
    assert (found.spec.min_replicas, found.spec.max_replicas) == (2, 10)
    assert cpu.resource is not None
    assert cpu.resource.target.amount == 0.7
    assert queue.pods is not None
    assert queue.pods.target.amount == pytest.approx(0.02)
    assert p99.external is not None
    slo_s = config.load(ROOT / "params.yaml").slo.p99_ms / 1000
    # Where the alert fires, the policy asks for a replica, whatever their number up to the most is.
    assert slo_s / p99.external.target.amount >= 1.25
    assert p99.external.metric.query() == 'track:request_seconds:p99_5s{track="champion"}'
    assert found.spec.behavior.scale_down.stabilization_window_seconds == 300


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("minReplicas: 2", "minReplicas: 20", "spec: minReplicas 20 is over maxReplicas 10"),
        ("maxReplicas: 10", "", "spec.maxReplicas: Field required"),
        ("minReplicas: 2", "minReplicas: 0", "spec.minReplicas: Input should be greater than or equal to 1 (got 0)"),
        ("20m }", "20x }", "spec.metrics.1.pods.target.averageValue: a quantity such as"),
        ("averageUtilization: 70", "value: 70", "spec.metrics.0.resource.target: type Utilization takes"),
        ("type: External", "type: Object", "spec.metrics.2.type: Input should be 'Resource', 'Pods' or 'External'"),
        (
            "type: Pods\n",
            "type: External\n",
            "spec.metrics.1: type External takes the part external alone",
        ),
        ("periodSeconds", "perodSeconds", "policies.0.perodSeconds: unknown key; allowed here: periodSeconds, type"),
        ("  behavior:", "  tolerance: 0.2\n  behavior:", "spec.tolerance: unknown key; allowed here: behavior, maxRep"),
        ("autoscaling/v2", "autoscaling/v1", "apiVersion: Input should be 'autoscaling/v2'"),
        ("name: cpu", "name: memory", "spec.metrics.0.resource.name: Input should be 'cpu'"),
        ("spec:", "spec: [", "not valid YAML"),
    ],
)
def test_what_would_not_be_followed_is_refused_by_file_and_field(
    tmp_path: Path, before: str, after: str, told: str
) -> None:
    path = tmp_path / "own.yaml"
    text = SHIPPED.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(ParamsError) as caught:
        policy.read(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_the_parameter_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"none\.yaml: cannot be read .*deploy\.autoscaling"):
        policy.read(tmp_path / "none.yaml")


def test_what_is_left_out_is_as_kubernetes_has_it(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(SHIPPED.read_text().partition("  behavior:")[0])
    behavior = policy.read(path).spec.behavior
    assert [(each.type, each.value, each.period_seconds) for each in behavior.scale_up.policies] == [
        ("Percent", 100, 15),
        ("Pods", 4, 15),
    ]
    assert behavior.scale_up.stabilization_window_seconds == 0
    assert behavior.scale_down.stabilization_window_seconds == 300
    path.write_text(path.read_text() + "  behavior: {scaleDown: {stabilizationWindowSeconds: 9}}\n")
    down = policy.read(path).spec.behavior.scale_down
    assert (down.stabilization_window_seconds, down.policies[0].value) == (9, 100)


@pytest.mark.parametrize(
    ("written", "number"), [(2, 2), ("2", 2), ("500m", 0.5), (0.5, 0.5), ("1.5k", 1500), ("4Mi", 4 * 2**20)]
)
def test_a_quantity_is_read_as_kubernetes_writes_it(written: object, number: float) -> None:
    assert policy.quantity(written) == pytest.approx(number)
