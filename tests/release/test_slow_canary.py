"""A canary too slow for its users: they get the champion's answers, and the verdict counts what it refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipway.platforms.base import Routing
from slipway.platforms.local.platform import LocalPlatform
from slipway.release.analysis import Limits, Verdict, judge
from slipway.release.measure import Meter, Prometheus
from slipway.release.replay import Replay
from tests.conftest import needs, until
from tests.platforms import stand
from tests.release import candidates

REQUESTS, ATTEMPTS = "slipway_gateway_requests_total", "slipway_gateway_attempts_total"


@needs("nginx", "redis-server", "prometheus")
@pytest.mark.slow
def test_users_of_a_canary_that_refuses_get_the_champions_answers_and_the_verdict_sees_it(tmp_path: Path) -> None:
    chosen = stand.params()
    soon_full = chosen.model_copy(update={"serve": chosen.serve.model_copy(update={"max_queue": 1})})
    with stand.running(tmp_path / "home", chosen) as up:
        stand.publish("1", package=candidates.good(tmp_path / "good"))
        stand.publish("2", package=candidates.slow(tmp_path / "slow"))
        up.platform.deploy("ranker", "1", 1, timeout_s=60)
        LocalPlatform(soon_full).deploy("ranker", "2", 1, timeout_s=60)
        routing = Routing("1", "2", 0.5)
        up.platform.route(routing)
        meter = Meter(Prometheus(up.platform.prometheus_url))
        limits = Limits(chosen.canary, chosen.slo)
        with Replay(up.platform.gateway_url, "/v1/recommend", stand.samples(), 100):
            until(lambda: stand.counters(chosen, ATTEMPTS)['{version="2",outcome="refused"}'] >= 100)
            until(
                lambda: any(
                    f.limit == "failed attempts" and f.violated for f in judge(meter.window(routing), limits).findings
                )
            )
        assert judge(meter.window(routing), limits).verdict is Verdict.ROLLBACK
        answers = stand.counters(chosen, REQUESTS)
        assert {series: count for series, count in answers.items() if 'code="429"' in series} == {}
        healed = sum(count for series, count in answers.items() if 'version="1",track="canary"' in series)
        assert healed >= 100, answers
