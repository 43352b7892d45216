"""The plan file: what is written comes back, and nothing else is accepted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from freqopt.config import SPLIT_VERSION
from freqopt.errors import PlanError
from freqopt.plan.content import PLAN_VERSION
from freqopt.plan.file_text import content_hash
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.plans import Plans
from freqopt.plan.records import (
    Budget,
    Evidence,
    ModelIdentity,
    SitePlan,
    Trial,
    Verified,
    Versions,
)
from freqopt.plan.text import MOST_ERRORS


class Tiny(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)


def make_plan(**changes: Any) -> Plan:
    sites = {
        "blocks.0.attn": SitePlan(
            heads=2,
            head_dim=64,
            tokens=256,
            decision="split",
            reason="",
            budgets=[Budget(threshold=[0.25, 2.0])],
            density=[0.1, 0.2],
            error=[0.05, 0.04],
            gains=[[0.5, 0.25]],
        ),
        "blocks.1.attn": SitePlan(
            heads=2,
            head_dim=64,
            tokens=256,
            decision="dense",
            reason="splitting saves nothing",
        ),
    }
    fields: dict[str, Any] = dict(
        model=ModelIdentity(class_name="Tiny", fingerprint=model_fingerprint(Tiny())),
        grids=[(4, 8, 8)],
        device="cpu",
        versions=Versions(freqopt="0.1.0", torch="2.13.0"),
        target_error=0.03,
        measured_error=0.028,
        worst_error=0.029,
        mean_density=0.15,
        sites=sites,
        evidence=Evidence(
            samples=3,
            held_out=1,
            notes=["a note"],
            trials=[
                Trial(
                    multiplier=0.5,
                    predicted_error=0.03,
                    measured_error=0.028,
                    worst_error=0.028,
                    mean_density=0.15,
                    sample_errors=[0.028],
                )
            ],
        ),
    )
    return Plan(**{**fields, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def rewrite(path: Path, *, rehash: bool, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    if rehash:
        content.pop("hash")
        content["hash"] = content_hash(content)
    path.write_text(json.dumps(content))


@pytest.mark.smoke
def test_round_trip(path: Path) -> None:
    assert Plan.load(path) == make_plan()
    assert Plan.load(str(path)).sites["blocks.0.attn"].budgets[0].threshold == [
        0.25,
        2.0,
    ]


def test_saving_twice_writes_the_same_bytes_and_leaves_nothing_behind(
    path: Path,
) -> None:
    before = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_reformatting_keeps_a_plan_valid(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert Plan.load(path) == make_plan()


def test_budget_rows_are_thresholds_and_chunks() -> None:
    plan = make_plan()
    budget = plan.budget("blocks.0.attn")
    assert budget.dtype == torch.float32
    assert budget.tolist() == [[0.25, 2.0], [0.0, 0.0]] and plan.largest_chunk("blocks.0.attn") == 0
    assert plan.budget("blocks.1.attn").tolist() == [[0.0, 0.0], [0.0, 0.0]]
    site = plan.sites["blocks.0.attn"].model_copy(update={"chunks": [512]})
    ordered = plan.model_copy(update={"sites": {"blocks.0.attn": site}})
    assert ordered.budget("blocks.0.attn").tolist() == [[0.25, 2.0], [512.0, 512.0]]
    assert ordered.largest_chunk("blocks.0.attn") == 512


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([300, 0], "power of two"),
        ([128, 0], "power of two"),
        ([256, 0, 0], "do not go with 2 heads"),
    ],
)
def test_chunks_that_no_order_has_are_refused(chunks: list[int], said: str) -> None:
    content = make_plan().model_dump()
    content["sites"]["blocks.0.attn"]["chunks"] = chunks
    with pytest.raises(ValueError, match=said):
        Plan.model_validate(content)


def test_unknown_site_names_near_misses() -> None:
    with pytest.raises(PlanError, match=r"did you mean blocks\.0\.attn"):
        make_plan().budget("block.0.attn")
    with pytest.raises(PlanError, match="timestep bucket 1"):
        make_plan().budget("blocks.0.attn", 1)


def test_prints_as_a_table() -> None:
    text = str(make_plan())
    assert "output error 0.0280 (target 0.03) at 15.0% mean density" in text
    assert "15.0% (10.0-20.0)" in text and "splitting saves nothing" in text and "a note" in text


@pytest.mark.parametrize("cut", [0, 1, 0.3, 0.9, -2, -5])
def test_truncated(path: Path, cut: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(PlanError, match=r"truncated|not a plan"):
        Plan.load(path)


def test_hand_edited(path: Path) -> None:
    text = path.read_text()
    assert "0.25" in text
    path.write_text(text.replace("0.25", "0.26", 1))
    with pytest.raises(PlanError, match="own hash"):
        Plan.load(path)


@pytest.mark.parametrize("field", ["version", "split_version"])
def test_other_version_is_named_before_the_hash(path: Path, field: str) -> None:
    rewrite(path, rehash=False, **{field: 99})
    read = {"version": PLAN_VERSION, "split_version": SPLIT_VERSION}[field]
    with pytest.raises(PlanError, match=f"has {field} 99 and this freqopt reads {read}"):
        Plan.load(path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"target_error": "0.03"}, "target_error"),
        ({"target_error": -1.0}, "target_error"),
        ({"mean_density": 1.5}, "mean_density"),
        ({"surprise": 1}, "surprise"),
        ({"grids": [[1, 2]]}, "grids"),
        ({"timestep_edges": [500.0]}, "without a timestep_name"),
        ({"timestep_edges": [500.0], "timestep_name": "t"}, "one budget per timestep bucket"),
        ({"timestep_edges": [2.0, 1.0], "timestep_name": "t"}, "not ascending"),
        ({"sites": {"a": {"heads": 2}}}, r"sites\.a"),
        ({"sites": []}, "sites"),
    ],
)
def test_wrong_content_with_a_right_hash(path: Path, changes: dict[str, Any], said: str) -> None:
    rewrite(path, rehash=True, **changes)
    with pytest.raises(PlanError, match=said):
        Plan.load(path)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"\x80\x04\x95pickle", "UTF-8"),
        (b"[]", "not a plan"),
        (b"null", "not a plan"),
        (b'{"format": "freqopt-plan"}', "version None"),
        (b'{"format": NaN}', "NaN"),
        (b"[" * 200_000, "JSON"),
    ],
)
def test_not_a_plan(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlanError, match=said):
        Plan.load(tmp_path / "x")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_is_a_plan_error_or_harmless(path: Path, data: st.DataObject) -> None:
    original = path.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    length = data.draw(st.integers(0, 30))
    damage = data.draw(st.binary(max_size=8))
    damaged = original[:at] + damage + original[at + length :]
    other = path.with_suffix(".damaged")
    other.write_bytes(damaged)
    with contextlib.suppress(PlanError):
        assert Plan.load(other) == make_plan()  # whitespace, or the damage equals the original


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document, containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, item in items if isinstance(value, (dict, list)) else ():
        found += leaves(item, (*path, key)) if isinstance(item, (dict, list)) else [(*path, key)]
    return found


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_wrong_value_with_a_right_hash_is_a_plan_error_or_a_plan(
    path: Path, data: st.DataObject
) -> None:
    content = json.loads(path.read_text())
    content.pop("hash")
    *parents, last = data.draw(st.sampled_from(leaves(content)))
    holder = content
    for key in parents:
        holder = holder[key]
    holder[last] = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=4)
        | st.just([])
        | st.just({})
        | st.lists(st.floats(-1, 2), max_size=3)
    )
    text = json.dumps({"hash": content_hash(content), **content})
    try:
        plan = Plan.parse(text)
    except PlanError:
        return
    for name, site in plan.sites.items():  # what was accepted can be used
        assert plan.budgets(name).shape == (len(plan.timestep_edges) + 1, 2, site.heads)
        assert plan.budgets(name).isfinite().all() and (plan.budgets(name) >= 0).all()
    str(plan)


def test_heads_that_would_fill_the_memory_are_refused(path: Path) -> None:
    """A dense site has no lists that its heads could be compared with."""
    content = json.loads(path.read_text())
    content.pop("hash")
    content["sites"]["blocks.1.attn"]["heads"] = 2**32
    text = json.dumps({"hash": content_hash(content), **content})
    with pytest.raises(PlanError, match="heads"):
        Plan.parse(text)


def test_expected_error_at_other_lengths() -> None:
    plan = make_plan()
    assert plan.expected_error("blocks.0.attn", 256) == plan.measured_error
    assert plan.expected_error("blocks.0.attn", 1024) == pytest.approx(plan.measured_error / 2)
    assert plan.expected_error("blocks.0.attn", 64) == pytest.approx(plan.measured_error * 2)
    for tokens in (31, 2049):
        with pytest.raises(PlanError, match=f"over {tokens} tokens .* calibrated at 256"):
            plan.expected_error("blocks.0.attn", tokens)


def test_fingerprint_follows_architecture_not_values() -> None:
    torch.manual_seed(0)
    assert model_fingerprint(Tiny()) == model_fingerprint(Tiny().to(torch.bfloat16))
    assert model_fingerprint(Tiny()) != model_fingerprint(Tiny(16))
    assert model_fingerprint(Tiny()) == model_fingerprint(torch.compile(Tiny(), backend="eager"))
    assert model_fingerprint(Tiny()) != model_fingerprint(nn.Linear(8, 8))


def test_check_model() -> None:
    plan = make_plan()
    plan.check_model(Tiny())
    plan.check_model(model_fingerprint(Tiny()))
    plan.check_model({"blocks.0.attn": (2, 64), "other": (3, 32)})
    plan.check_model({})
    with pytest.raises(PlanError, match="calibrated for Tiny"):
        plan.check_model(Tiny(16))
    with pytest.raises(PlanError, match="none of the 1 sites"):
        plan.check_model({"layers.0": (2, 64)})
    with pytest.raises(PlanError, match=r"\(4, 64\)"):
        plan.check_model({"blocks.0.attn": (4, 64)})


VERIFIED: dict[str, Any] = {
    "sample_errors": [0.02, 0.035, 0.027],
    "sample_timesteps": [900.0, 20.0, 500.0],
    "spread": 0.0061,
    "quantile_error": 0.035,
    "dtype": "bfloat16",
    "adapters": ["style"],
    "model_ms": (300.0, 150.0),
}


def test_the_text_says_exactly_what_was_verified() -> None:
    times: dict[str, Any] = {"timestep_name": "timestep", "timestep_range": (15.0, 980.0)}
    text = str(make_plan(verified=Verified(**VERIFIED), target_quantile=0.9, **times))
    assert "output error 0.0280 (target 0.03 for 90% of inputs)" in text
    assert (
        "verified on 3 samples: error 0.0280 root mean square, 0.0290 worst, 0.0200 best, "
        "standard deviation 0.0061; 90% of them within 0.0350\n"
        "verified for: grids 4x8x8; timestep 15 to 980; bfloat16; adapters style\n"
        "errors by sample (at timestep): 0.0200 (900), 0.0350 (20), 0.0270 (500)\n"
        "beyond the target: 1 of 3 samples, 1 by more than a tenth\n"
        "whole model 300 ms dense, 150 ms split\n"
    ) in text
    near = Verified(**{**VERIFIED, "sample_errors": [0.02, 0.03, 0.032], "model_clock": "graphs"})
    text = str(make_plan(verified=near))
    assert "beyond the target: 1 of 3 samples, 0 by more than a tenth\n" in text
    assert "whole model, compiled, in CUDA graphs, 300 ms dense, 150 ms split\n" in text
    asked = str(make_plan(verified=near, target_density=0.3))
    assert "verified on 3 samples" in asked and "beyond the target" not in asked


def test_of_many_samples_the_worst_are_listed() -> None:
    many = {**VERIFIED, "sample_errors": [i / 1000 for i in range(60)], "sample_timesteps": []}
    text = str(make_plan(verified=Verified(**many)))
    (line,) = (line for line in text.splitlines() if line.startswith("errors of"))
    assert line.startswith(f"errors of the {MOST_ERRORS} worst samples: 0.0360, 0.0370")
    assert line.endswith("0.0590") and line.count(",") == MOST_ERRORS - 1


def test_a_verification_has_a_timestep_for_each_sample_or_none() -> None:
    with pytest.raises(ValueError, match="one timestep for each sample"):
        Verified(**{**VERIFIED, "sample_timesteps": [1.0]})


def test_the_text_says_which_heads_are_ordered_by_content() -> None:
    sites = dict(make_plan().sites)
    for chunks, words in (([0, 0], "grid"), ([1024, 0], "content 1 of 2"), ([1024], "content")):
        sites["blocks.0.attn"] = sites["blocks.0.attn"].model_copy(update={"chunks": chunks})
        row = next(x for x in str(make_plan(sites=sites)).splitlines() if x.startswith("blocks.0"))
        assert f"split     {words} " in row


def test_plans_of_several_experts_are_told_side_by_side() -> None:
    noisy: dict[str, Any] = {"timestep_name": "timestep", "timestep_range": (875.0, 1000.0)}
    plans = Plans(
        {
            "transformer": make_plan(component="transformer", **noisy),
            "transformer_2": make_plan(component="transformer_2", predicted=True),
        }
    )
    text = str(plans)
    lines = text.splitlines()
    assert lines[0].split() == "model class timesteps samples error worst density split".split()
    assert lines[1].startswith("transformer    Tiny   875 to 1000  3 + 1 held out")
    assert "0.0280 predicted" in lines[2] and "1 of 2 sites" in lines[2]
    for name, plan in plans.items():
        assert f"\n\n{name}\n{'-' * len(name)}\n{plan}" in text
    assert plans._repr_html_().startswith("<pre>model")
