"""Plans that are as they should be, and odd: the report is written, and soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_plans import full_plan

import freqopt
from freqopt.errors import PlanError
from freqopt.plan.plan import Plan

SITE = "blocks.0.attn"


def changed(change: Any) -> dict[str, Any]:
    """The full plan's content, as a function changes it."""
    content = full_plan().model_dump(mode="json")
    change(content, content["sites"][SITE], content["evidence"]["sites"][SITE])
    return content


def parsed(content: dict[str, Any]) -> Plan:
    return Plan.parse(Plan.model_validate_json(json.dumps(content)).text())


def nothing(plan: Any, site: Any, evidence: Any) -> None:
    site["density"], site["error"] = [], []


def zeros(plan: Any, site: Any, evidence: Any) -> None:
    for part in (evidence, *evidence["buckets"]):
        part["energy"] = [0.0, 0.0]
        part["curve"] = {name: [[0.0, 0.0]] * 2 for name in part["curve"]}


def decades(plan: Any, site: Any, evidence: Any) -> None:
    evidence["curve"]["density"] = [[1e-300, 1.0], [1e-310, 1e-20]]
    evidence["curve"]["error"] = [[1e300, 1e-300], [0.0, 1.0]]


def formula(plan: Any, site: Any, evidence: Any) -> None:
    name = "$\\\\frac{$"
    plan["sites"][name] = plan["sites"].pop(SITE)
    plan["evidence"]["sites"][name] = plan["evidence"]["sites"].pop(SITE)
    plan["timestep_name"] = "$x_{$"


def trials(plan: Any, site: Any, evidence: Any) -> None:
    one = dict.fromkeys(("multiplier", "predicted_error", "measured_error", "worst_error"), 0.1)
    plan["evidence"]["trials"] = [
        {**one, "mean_density": 0.1, "sample_errors": [0.1] * 5} for _ in range(2000)
    ]


def buckets(plan: Any, site: Any, evidence: Any) -> None:
    count = 2000
    plan["timestep_edges"] = [float(i) for i in range(count - 1)]
    plan["evidence"]["bucket_samples"] = [1] * count
    site["budgets"], site["gains"] = site["budgets"][:1] * count, [[0.5, 0.2]] * count
    evidence["buckets"] = [{**evidence["buckets"][0], "bucket": i} for i in range(count)]


def no_times(plan: Any, site: Any, evidence: Any) -> None:
    """Nothing took any time, as a clock too coarse says."""
    evidence["times_ms"] = [0.0, 0.0]
    kind = {"heads": 2, "tokens": 256, "head_dim": 64}
    line = {"base_ms": 0.0, "density_ms": 0.0, "dense_ms": 0.0, "points": [[0.1, 0.0]]}
    plan["evidence"]["timings"] = [{**kind, **line}]
    told = {"sample_errors": [0.0], "spread": 0.0, "dtype": "float32", "model_ms": [0.0, 0.0]}
    plan["verified"] = told


def no_sites(plan: Any, site: Any, evidence: Any) -> None:
    plan["sites"], plan["evidence"]["sites"] = {}, {}


def no_gains(plan: Any, site: Any, evidence: Any) -> None:
    site["gains"] = []


def no_errors(plan: Any, site: Any, evidence: Any) -> None:
    plan["measured_error"] = plan["worst_error"] = plan["mean_density"] = 0.0
    told = {"sample_errors": [], "spread": 0.0, "dtype": "none"}
    plan["verified"] = told


def dense(plan: Any, site: Any, evidence: Any) -> None:
    nothing_left: dict[str, Any] = {"budgets": [], "chunks": [], "density": [], "error": []}
    site.update(decision="dense", reason="saves nothing", **nothing_left)


def other_ladders(plan: Any, site: Any, evidence: Any) -> None:
    other = json.loads(json.dumps(evidence))
    other["thresholds"], other["buckets"] = [0.5], []
    other["curve"] = {name: rows[:1] for name, rows in other["curve"].items()}
    plan["sites"]["blocks.1.attn"] = json.loads(json.dumps(site))
    plan["evidence"]["sites"]["blocks.1.attn"] = other


def content_alone(plan: Any, site: Any, evidence: Any) -> None:
    """Orders were measured, and densities of the plan were not."""
    curve = {"chunk": 1024, "density": [[0.5, 0.0]] * 2, "error": [[0.0, 0.1]] * 2}
    for part in (evidence, *evidence["buckets"]):
        part["content"] = [curve]
    site["density"] = []


def ways(plan: Any, site: Any, evidence: Any) -> None:
    one = dict.fromkeys(("predicted_error", "measured_error", "mean_density", "cost"), 0.0)
    plan["evidence"]["compared"] = [{**one, "name": "$x_{$", "taken": True}] * 500


ODD = [
    *(nothing, zeros, decades, formula, trials, buckets, no_times, no_sites, no_gains, no_errors),
    *(dense, other_ladders, content_alone, ways),
]


@pytest.mark.parametrize("change", ODD, ids=lambda f: f.__name__)
def test_a_report_of_it_is_written(change: Any, tmp_path: Path) -> None:
    """The last asked for a figure of 4,600 inches, in seven GiB."""
    page = freqopt.report(parsed(changed(change)), tmp_path / "page.html")
    html = page.read_text()
    assert "<h2>" in html and "Verification and identity" in html and len(html) < 20_000_000
    assert "Left out" not in html


def short_curve(plan: Any, site: Any, evidence: Any) -> None:
    evidence["curve"]["density"] = evidence["curve"]["density"][:1]


def other_heads(plan: Any, site: Any, evidence: Any) -> None:
    evidence["energy"] = [1.0]


def no_site(plan: Any, site: Any, evidence: Any) -> None:
    plan["evidence"]["sites"]["other"] = evidence


def bucket_past_the_end(plan: Any, site: Any, evidence: Any) -> None:
    evidence["buckets"][0]["bucket"] = 2


def extents(plan: Any, site: Any, evidence: Any) -> None:
    plan["grids"] = [[2**40, 1, 1]]


def negative(plan: Any, site: Any, evidence: Any) -> None:
    site["layouts"][0]["grid"] = [-4, -8, 8]


@pytest.mark.parametrize(
    "change",
    [short_curve, other_heads, no_site, bucket_past_the_end, extents, negative],
    ids=lambda f: f.__name__,
)
def test_evidence_that_does_not_fit_is_refused(change: Any) -> None:
    from freqopt.plan.file_text import content_hash

    content = changed(change)
    content["hash"] = content_hash(content)
    with pytest.raises(PlanError):
        Plan.parse(json.dumps(content))
