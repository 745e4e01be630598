"""docs/metrics.md lists exactly the metrics that exist, and the dashboard shows all of the gateway's."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from helexa.gateway.fleet import Fleet
from helexa.gateway.metrics import Metrics as GatewayMetrics
from helexa.neuron.metrics import Metrics as NeuronMetrics

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "packaging/grafana/helexa.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
ROW = re.compile(r"^\| `(helexa_\w+)` \| (\w+) \| ([^|]*) \| [^|]+ \|$", re.MULTILINE)
GATEWAY, NEURON = GatewayMetrics(Fleet({})).registry, NeuronMetrics()._registry


def existing(registry: CollectorRegistry) -> Iterator[tuple[str, str]]:
    """Name and type, as they are scraped, of everything that the registry could tell."""
    for family in registry.collect():
        yield family.name + ("_total" if family.type == "counter" else ""), family.type


def labels(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    """The labels of those metrics that keep their own."""
    return {
        name: collector._labelnames
        for name, collector in registry._names_to_collectors.items()
        if hasattr(collector, "_labelnames")
    }


@pytest.mark.parametrize(("heading", "registry"), [("Gateway", GATEWAY), ("Neuron", NEURON)])
def test_the_document_lists_what_exists_with_its_labels(heading, registry):
    text = (ROOT / "docs/metrics.md").read_text("utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    documented = ROW.findall(section)
    assert len(documented) == section.count("\n| `"), "a row does not look like the others"
    assert sorted((name, kind) for name, kind, _ in documented) == sorted(existing(registry))
    known = labels(registry)
    for name, _, shown in documented:
        if name in known:
            assert re.findall(r"`(\w+)`", shown) == list(known[name]), name


def test_the_dashboard_shows_every_metric_of_the_gateway_and_no_other():
    shown = {
        re.sub("_bucket$", "", name) for text in EXPRESSIONS for name in re.findall(r"\bhelexa_\w+", text)
    }
    assert shown == {name for name, _ in existing(GATEWAY)}


def test_histograms_are_shown_by_their_buckets_and_nothing_else_is():
    histograms = {name for name, kind in existing(GATEWAY) if kind == "histogram"}
    used = {name for text in EXPRESSIONS for name in re.findall(r"\bhelexa_\w+_bucket\b", text)}
    assert used == {f"{name}_bucket" for name in histograms}


def test_the_dashboard_can_be_drawn():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for text in EXPRESSIONS:
        assert text.count("(") == text.count(")")
        assert text.count("{") == text.count("}")
        assert set(re.findall(r"\$(\w+)", text)) - {"__rate_interval", "__range"} <= variables
