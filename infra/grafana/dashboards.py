"""The dashboards, as code: `python infra/grafana/dashboards.py` writes dashboards/*.json, which Grafana provisions.

A dashboard is a list of rows, a row a list of panels, a panel a title, a unit, and expressions with their legends. They
draw on what infra/prometheus/rules records and on what docs/metrics.md lists; a test holds them, and the files, to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="slipway-prometheus")
WIDTH, HEIGHT = 24, 8  # of Grafana's grid, and of a panel in it


class Panel(NamedTuple):
    """One chart over time."""

    title: str
    unit: str
    """Grafana's name: reqps, s, percentunit, bytes, short."""
    queries: Sequence[tuple[str, str]]
    """Expression and legend of each."""
    promise: str = ""
    """Expression of a limit to draw beside them."""


class Board(NamedTuple):
    """One dashboard."""

    name: str
    title: str
    rows: Sequence[tuple[str, Sequence[Panel]]]


def quantiles(metric: str, by: str = "version") -> list[tuple[str, str]]:
    """P50, P99 of a histogram."""
    return [
        (
            f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket[1m])))",
            f"P{share * 100:.0f} {{{{{by}}}}}",
        )
        for share in (0.5, 0.99)
    ]


SERVICE = Board(
    "service",
    "slipway: the service",
    [
        (
            "What users get",
            [
                Panel("Requests", "reqps", [("track:requests:rate15s", "{{track}}")]),
                Panel("P99", "s", [("track:request_seconds:p99", "{{track}}")], "slipway_gateway_slo_p99_seconds"),
                Panel(
                    "Failed share",
                    "percentunit",
                    [("track:failed_requests:ratio15s", "{{track}}")],
                    "slipway_gateway_slo_error_ratio",
                ),
            ],
        ),
        (
            "Release",
            [
                Panel("Users on the canary", "percentunit", [("slipway_gateway_canary_weight", "canary")]),
                Panel("Failed tries by version", "percentunit", [("version:failed_attempts:ratio15s", "{{version}}")]),
                Panel("Online hit ratio", "percentunit", [("version:hit:ratio10m", "{{shown_version}}")]),
            ],
        ),
        (
            "Pools",
            [
                Panel("Rate that pools are switched by", "reqps", [("slipway_gateway_rate_rps", "realtime")]),
                Panel("Share of a class", "percentunit", [("slipway_gateway_pool_weight", "{{pool}}")]),
                Panel("Replicas ready", "short", [('slipway_gateway_pool_replicas{state="ready"}', "{{pool}}")]),
                Panel(
                    "Price of an hour",
                    "short",
                    [
                        (
                            "sum by (pool) (slipway_gateway_pool_replicas) * slipway_gateway_pool_price_per_hour",
                            "{{pool}}",
                        )
                    ],
                ),
            ],
        ),
        (
            "Gateway",
            [
                Panel("Requests by class", "reqps", [("class:requests:rate15s", "{{class}}")]),
                Panel(
                    "Answers that took a second try",
                    "reqps",
                    [("sum by (version) (rate(slipway_gateway_healed_total[1m]))", "{{version}}")],
                ),
                Panel("Requests in flight", "short", [("sum by (version) (slipway_gateway_in_flight)", "{{version}}")]),
                Panel("Connections", "short", [("slipway_gateway_connections", "{{state}}")]),
                Panel("Bytes", "Bps", [("rate(slipway_gateway_bytes_total[1m])", "{{direction}}")]),
                Panel(
                    "Replicas",
                    "short",
                    [("sum by (version, state) (slipway_gateway_replicas)", "{{version}} {{state}}")],
                ),
            ],
        ),
    ],
)

REPLICAS = Board(
    "replicas",
    "slipway: inside the replicas",
    [
        (
            "Stages of a request",
            [
                Panel("Queue", "s", quantiles("slipway_queue_seconds")),
                Panel("Batch, while it gathers", "s", quantiles("slipway_batch_seconds")),
                Panel("Engine", "s", quantiles("slipway_engine_seconds")),
                Panel("Whole, by endpoint", "s", quantiles("slipway_request_seconds", "endpoint")),
            ],
        ),
        (
            "Batches",
            [
                Panel("Samples in a batch", "short", [("version:batch_size:mean15s", "{{version}}")]),
                Panel("Engine busy", "percentunit", [("version:engine_busy:ratio15s", "{{version}}")]),
                Panel("Requests that wait", "short", [("sum by (replica) (slipway_queue_length)", "{{replica}}")]),
            ],
        ),
        (
            "Cache",
            [
                Panel("Answers by level", "percentunit", [("cache:lookups:ratio15s", "{{level}}")]),
                Panel("Look-ups, P99 by level", "s", [("cache:lookup_seconds:p99", "{{level}}")]),
                Panel("Nodes left alone", "short", [("max by (level) (slipway_cache_nodes_away)", "{{level}}")]),
            ],
        ),
        (
            "Model",
            [
                Panel("Drift of scores (PSI)", "short", [("version:score_drift:psi5m", "{{version}}")]),
                Panel(
                    "Scores by tenth", "percentunit", [("version:score_share:ratio5m", "{{version}} tenth {{tenth}}")]
                ),
                Panel("Size", "bytes", [("max by (version) (slipway_model_bytes)", "{{version}}")]),
            ],
        ),
        (
            "Resources",
            [
                Panel("Processors", "short", [('rate(process_cpu_seconds_total{job="replicas"}[1m])', "{{replica}}")]),
                Panel("Memory", "bytes", [('process_resident_memory_bytes{job="replicas"}', "{{replica}}")]),
                Panel("Open files", "short", [('process_open_fds{job="replicas"}', "{{replica}}")]),
            ],
        ),
    ],
)

STACK = Board(
    "stack",
    "slipway: the programs of the stack",
    [
        (
            "Programs",
            [
                Panel("Well", "short", [("slipway_program_up", "{{program}}")]),
                Panel("Processors", "short", [("rate(slipway_program_processor_seconds_total[1m])", "{{program}}")]),
                Panel("Memory", "bytes", [("slipway_program_memory_bytes", "{{program}}")]),
            ],
        ),
        (
            "Machine",
            [
                Panel("Memory that is left", "bytes", [("slipway_host_memory_available_bytes", "available")]),
                Panel("Load of a processor", "short", [("slipway_host_load_ratio", "load")]),
                Panel(
                    "Alerts that fire",
                    "short",
                    [('count by (alertname) (ALERTS{alertstate="firing"})', "{{alertname}}")],
                ),
            ],
        ),
    ],
)

BOARDS = (SERVICE, REPLICAS, STACK)


def render(board: Board) -> str:
    """A dashboard as Grafana's JSON."""
    made = dashboard.Dashboard(board.title).uid(f"slipway-{board.name}").tags(["slipway"]).refresh("5s")
    made = made.time("now-15m", "now").timezone("browser").readonly()
    for title, panels in board.rows:
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_chart(panel))
    return str(json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True)) + "\n"


def _chart(panel: Panel) -> timeseries.Panel:
    chart = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(SOURCE).min(0)
    chart = chart.fill_opacity(10).span(WIDTH // 3).height(HEIGHT)
    legend = common.VizLegendOptions().show_legend(True).calcs(["lastNotNull"])
    chart = chart.legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
    chart = chart.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    lines = [*panel.queries, *([(panel.promise, "promised")] if panel.promise else [])]
    for letter, (expression, name) in zip("ABCDEFGH", lines, strict=False):
        chart = chart.with_target(prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(name))
    return chart


if __name__ == "__main__":
    for each in BOARDS:
        (FOLDER / f"{each.name}.json").write_text(render(each))
