"""What a plan tells other kernels: true to the plan, complete whatever it lacks, and plain JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plans import full_plan

from freqopt.cli import app as cli
from freqopt.config import ALL
from freqopt.plan.curves import point_at, tokens_of_chunk
from freqopt.plan.densities import layer_of
from freqopt.plan.file_text import write_json
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans, read_plans
from freqopt.plan.records import Budget, ContentCurve, SitePlan

SITE = "blocks.0.attn"


def site_of(plan: Plan, name: str = SITE) -> dict[str, Any]:
    (model,) = plan.to_densities()["models"].values()
    return next(site for site in model["sites"] if site["name"] == name)


def with_site(plan: Plan, **changes: Any) -> Plan:
    site = plan.sites[SITE].model_copy(update=changes)
    return plan.model_copy(update={"sites": {SITE: site}})


def one_range(plan: Plan) -> Plan:
    """The same without timestep ranges."""
    site = plan.sites[SITE]
    changed = with_site(plan, budgets=site.budgets[:1], gains=site.gains[:1])
    changed = changed.model_copy(update={"timestep_edges": [], "timestep_name": None})
    evidence = plan.evidence.sites[SITE].model_copy(update={"buckets": []})
    sites = {"sites": {SITE: evidence}, "bucket_samples": [3]}
    return changed.model_copy(update={"evidence": plan.evidence.model_copy(update=sites)})


def with_content(plan: Plan) -> Plan:
    """The same with the second head's order by content measured, in the first range alone too."""
    content = [ContentCurve(chunk=1024, density=[[0.3] * 2, [0.03] * 2], error=[[0.05] * 2] * 2)]
    evidence = plan.evidence.sites[SITE]
    buckets = [each.model_copy(update={"content": content}) for each in evidence.buckets]
    changed = evidence.model_copy(update={"content": content, "buckets": buckets})
    sites = {"sites": {SITE: changed}}
    return plan.model_copy(update={"evidence": plan.evidence.model_copy(update=sites)})


def without_evidence(plan: Plan) -> Plan:
    return plan.model_copy(update={"evidence": plan.evidence.model_copy(update={"sites": {}})})


def plain(value: Any) -> None:
    """Only what JSON has, and as exactly that: a float of numpy's is no float."""
    assert type(value) in (dict, list, str, int, float, bool, type(None))
    for part in value.values() if isinstance(value, dict) else value if type(value) is list else ():
        plain(part)


@pytest.mark.parametrize(
    "change",
    [lambda plan: plan, one_range, with_content, without_evidence],
    ids=["as it is", "one range", "with content", "without evidence"],
)
def test_the_document_is_plain_json_and_all_rows_are_whole(change: Any) -> None:
    plan = change(full_plan())
    document = plan.to_densities()
    plain(document)
    assert json.loads(write_json(document)) == document
    (model,) = document["models"].values()
    for site in model["sites"]:
        for rows in (site["density"], site["error"]):
            assert [len(row) for row in rows] == [site["heads"]] * len(model["ranges"])
        assert len(site["order"]) == len(site["chunk"]) == site["heads"]


def test_the_document_says_whose_it_is_and_in_which_ranges() -> None:
    plan = full_plan().model_copy(update={"timestep_range": (0.1, 0.9)})
    document = plan.to_densities()
    assert (document["format"], document["version"]) == ("freqopt-densities", 1)
    model = document["models"]["model"]
    assert (model["class_name"], model["fingerprint"]) == ("Tiny", "0123")
    assert model["grids"] == [[4, 8, 8]] and model["timesteps_verified"] == [0.1, 0.9]
    assert model["timestep"] == "t"
    assert model["ranges"] == [{"above": None, "up_to": 0.5}, {"above": 0.5, "up_to": None}]
    error = model["output_error"]
    assert (error["measured"], error["worst"], error["predicted"]) == (0.028, 0.029, False)


def test_one_range_has_what_was_measured() -> None:
    site = site_of(one_range(full_plan()))
    assert site["source"] == "measured" and site["layer"] == 0
    assert site["density"] == [[0.1, 0.2]] and site["error"] == [[0.05, 0.04]]
    assert site["order"] == ["grid", "content"]
    assert site["chunk"] == [None, 256]  # a chunk of 1,024 holds all 256 tokens
    moved = one_range(full_plan()).model_copy(update={"predicted": True})
    assert site_of(moved)["source"] == "curves"


def test_ranges_are_read_off_each_heads_own_curve_at_its_budget() -> None:
    site = site_of(with_content(full_plan()))
    assert site["source"] == "curves"
    # On logarithmic axes a threshold of 0.5 lies .699 of the way from 0.1 to 1.
    assert site["density"][1][0] == pytest.approx(0.5 * 0.4**0.69897, rel=1e-4)
    assert site["error"][1][0] == pytest.approx(0.1 * 2**0.69897, rel=1e-4)
    # The head ordered by content has thresholds at and beyond the ladder's end, and its own curve.
    assert [row[1] for row in site["density"]] == [0.03, 0.03]
    assert [row[1] for row in site["error"]] == [0.05, 0.05]


def test_an_order_that_was_not_measured_is_unknown_and_not_the_grids() -> None:
    site = site_of(full_plan())
    assert [row[1] for row in site["density"]] == [None, None] and site["density"][0][0]


def test_a_dense_site_is_exact() -> None:
    nothing: dict[str, Any] = {"budgets": [], "density": [], "error": [], "chunks": [0, 1024]}
    site = site_of(with_site(full_plan(), decision="dense", reason="short", **nothing))
    assert (site["decision"], site["reason"], site["source"]) == ("dense", "short", "dense")
    assert site["density"] == [[1.0, 1.0]] * 2 and site["error"] == [[0.0, 0.0]] * 2
    assert site["order"] == ["grid", "grid"]


def test_a_threshold_of_zero_is_exact() -> None:
    budgets = [Budget(threshold=[0.0, 1.0]), Budget(threshold=[0.5, 1.0])]
    site = site_of(with_content(with_site(full_plan(), budgets=budgets)))
    assert site["density"][0][0] == 1.0 and site["error"][0][0] == 0.0


def test_where_ranges_have_no_curves_the_mean_stands_and_says_so() -> None:
    plan = without_evidence(full_plan())
    site = site_of(plan)
    assert site["source"] == "mean" and site["density"] == [[0.1, 0.2]] * 2
    site = site_of(with_site(plan, density=[], error=[]))
    assert site["source"] == "none" and site["density"] == [[None, None]] * 2


def test_where_one_range_was_not_measured_its_curve_stands() -> None:
    plan = one_range(full_plan())
    site = site_of(with_site(plan, density=[], error=[], chunks=[]))
    assert site["source"] == "curves"
    assert site["density"][0][0] == pytest.approx(0.5 * 0.4**0.39794, rel=1e-4)
    only = site_of(with_site(without_evidence(plan), error=[]))
    assert only["density"] == [[0.1, 0.2]] and only["error"] == [[None, None]]


def test_several_experts_are_in_one_document(tmp_path: Path) -> None:
    low = full_plan().model_copy(update={"component": "transformer_2"})
    plans = Plans({"transformer": full_plan(), "transformer_2": low})
    document = plans.to_densities()
    assert list(document["models"]) == ["transformer", "transformer_2"]
    assert document["models"]["transformer_2"] == low.to_densities()["models"]["transformer_2"]
    plans.save(tmp_path / "plans.json")
    plans.save_pretrained(tmp_path / "folder")
    for source in ("plans.json", "folder"):
        assert read_plans(tmp_path / source).to_densities()["models"].keys() == set(plans)


def test_attention_that_is_never_split_is_told() -> None:
    evidence = full_plan().evidence.model_copy(update={"dense_sites": {"blocks.2.cross": "text"}})
    (model,) = (
        full_plan().model_copy(update={"evidence": evidence}).to_densities()["models"].values()
    )
    assert model["never_split"] == [{"name": "blocks.2.cross", "layer": 2, "reason": "text"}]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attn1", 3),
        ("transformer_blocks.11.attn#1@2", 11),
        ("attn1", None),
        ("down_blocks.0.attentions.1.attn", None),
    ],
)
def test_the_layer_is_the_number_in_the_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_chunks_are_told_in_tokens() -> None:
    assert [tokens_of_chunk(chunk, 4096) for chunk in (1024, 8192, ALL)] == [1024, 4096, 4096]


def test_curves_that_fall_to_nothing_are_read_too() -> None:
    curve = ContentCurve(chunk=0, density=[[1e-300], [0.0]], error=[[0.0], [1e300]])
    point = point_at(curve, [0.1, 1.0], 0.3, 0)
    assert np.isfinite(point).all()


def test_the_command_writes_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full_plan().save(tmp_path / "plan.json")
    for more in ([], ["-o", str(tmp_path / "out" / "densities.json")]):
        with pytest.raises(SystemExit) as left:
            cli.main(["export", "densities", str(tmp_path / "plan.json"), *more])
        assert not left.value.code
        told = capsys.readouterr().out
        text = (tmp_path / "out" / "densities.json").read_text() if more else told
        assert json.loads(text) == full_plan().to_densities()
    assert "densities.json" in told


def test_a_missing_plan_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["export", "densities", str(tmp_path / "none.json")])
    assert left.value.code == cli.BAD_INPUT
    assert "none.json" in capsys.readouterr().err


def test_a_site_of_shared_key_heads_has_an_order_for_every_head() -> None:
    plan = one_range(full_plan())
    fields = plan.sites[SITE].model_dump()
    fields.update(heads=4, density=[0.1] * 4, error=[0.1] * 4, gains=[[0.5] * 4], tokens=4096)
    fields["budgets"] = [Budget(threshold=[1.0] * 4)]
    site = SitePlan(**fields)
    changed = without_evidence(plan).model_copy(update={"sites": {SITE: site}})
    found = site_of(changed)
    assert found["order"] == ["grid"] * 2 + ["content"] * 2
    assert found["chunk"] == [None, None, 1024, 1024]


def test_the_pages_example_counts_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "densities.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    plan = with_site(one_range(full_plan()), tokens=640)
    (tmp_path / "densities.json").write_text(write_json(plan.to_densities()))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    assert found["kept"] == {(SITE, None): [1, 2]}  # of 10 blocks, a tenth and a fifth


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "densities.md").read_text()
    (model,) = full_plan().to_densities()["models"].values()
    for field in (*full_plan().to_densities(), *model, *model["output_error"], *model["sites"][0]):
        assert f"`{field}`" in page, field
