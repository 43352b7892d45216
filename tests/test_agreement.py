"""Compiling, inspecting, calibrating and exporting agree: what is split, on which grid, why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import passes_toys as toys
import pytest
import test_passes_keys as keys
import test_passes_masks as masks
import test_passes_packed as packed
import test_passes_spellings as spellings
import torch
from accounts import Case, Said, check_agreement, compiled, exported, inspected, recorded
from passes_toys import TEXT, WIDTH, Attention, Toy, text, video
from torch import Tensor, nn

import freqopt
import freqopt.decisions
from freqopt.errors import PlanError
from freqopt.exporters.program import make_program
from freqopt.plan import Plan, model_fingerprint
from freqopt.plan_records import Budget, Evidence, ModelIdentity, SitePlan, Versions

GRID = (3, 6, 10)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias that the product of queries and keys is added to."""
    bias = -torch.arange(k.shape[1], dtype=q.dtype).expand(q.shape[0], q.shape[1], -1)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(-1, -2)).softmax(-1), v)


class Packed(nn.Module):
    """Two attentions over tokens that were packed before the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def toy(tokens: Callable[[Tensor, Tensor], Tensor], split: int = 2) -> Callable[[], Case]:
    return lambda: Case(Toy(tokens).eval(), {"video": video(GRID, 2)}, split)


def with_text(where: str) -> Callable[[], Case]:
    return lambda: Case(Toy(text=where).eval(), {"video": video(GRID), "text": text()}, 2)


def spelled(mix: spellings.Mixer, split: int = 1, folded: bool = False) -> Callable[[], Case]:
    return lambda: Case(spellings.toy(mix, folded=folded).eval(), {"video": video(GRID)}, split)


def multihead(attend: packed.Attend) -> Callable[[], Case]:
    return lambda: Case(packed.Model(attend).eval(), {"x": video(GRID)}, 2)


def text_in_keys(where: str) -> Callable[[], Case]:
    inputs = {"video": video(GRID), "text": text()}
    return lambda: Case(keys.TextInKeys(where).eval(), inputs, 1)


def masked(make: Any, split: int = 1) -> Callable[[], Case]:
    inputs = {"video": video(GRID, 2), "context": text(batch=2), "kept": torch.ones(2, TEXT).long()}
    return lambda: Case(masks.Masked(make).eval(), inputs, split)


TOKENS = [
    toys.conv3d_tokens, toys.conv2d_tokens, toys.linear_tokens, toys.einsum_tokens,
    toys.padded_tokens, toys.time_fastest_tokens,
]  # fmt: skip
CASES: dict[str, Callable[[], Case]] = {
    **{tokens.__name__: toy(tokens) for tokens in TOKENS},
    "tiled_tokens": toy(toys.tiled_tokens, split=0),
    "text before": with_text("before"),
    "text after": with_text("after"),
    "by hand": spelled(spellings.plain),
    "einsum": spelled(spellings.einsum_of_tokens_first),
    "baddbmm": spelled(spellings.legacy_baddbmm, folded=True),
    "altered scores": spelled(spellings.capped, split=0),
    "causal": spelled(spellings.causal_fused, split=0),
    "bias": spelled(biased, split=0, folded=True),
    "nn.MultiheadAttention": multihead(packed.plain),
    "and its weights": multihead(packed.unused_weights),
    "text in keys": text_in_keys("both"),
    "mask by length": masked(masks.length_mask),
    "joined mask": masked(masks.joined_mask),
    "mask over video": masked(masks.written_mask, split=0),
}


@pytest.mark.parametrize("name", CASES)
def test_all_four_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check_agreement(CASES[name](), monkeypatch)


@pytest.mark.parametrize(
    "name", ["einsum", "baddbmm", "and its weights", "text in keys", "mask by length"]
)
def test_what_is_exported_is_dense_attention_at_full_density(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    monkeypatch.setattr(freqopt.decisions, "DEFAULT_DENSITY", 1.0)
    program = make_program(case.model, (), case.inputs)
    assert len(program.split) == case.split
    with torch.no_grad():
        got, want = program.exported.module()(**case.inputs), case.model(**case.inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def packed_case() -> Case:
    return Case(Packed().eval(), {"tokens": torch.randn(2, 180, WIDTH)}, 2)


def plan_of(case: Case, *grids: tuple[int, int, int], dense: str = "") -> Plan:
    """A plan for both attentions of a packed case, or for all but one."""
    site = {"heads": toys.HEADS, "head_dim": toys.DIM, "tokens": 180}
    budget = Budget(threshold=[0.5] * toys.HEADS, mid=[False] * toys.HEADS)
    split = SitePlan(**site, decision="split", reason="", budgets=[budget])
    sites = {f"blocks.{i}": split for i in range(2)}
    if dense:
        sites[dense] = SitePlan(**site, decision="dense", reason="too sensitive")
    return Plan(
        model=ModelIdentity(class_name="Packed", fingerprint=model_fingerprint(case.model)),
        grids=list(grids), device="cpu", versions=Versions(freqopt="0", torch="0"),
        target_error=0.03, measured_error=0.02, worst_error=0.02, mean_density=0.5, sites=sites,
        evidence=Evidence(samples=1, held_out=1),
    )  # fmt: skip


def test_they_agree_on_a_grid_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    case = packed_case()
    for grid, split in ((GRID, 2), ((3, 6, 11), 0)):
        found = compiled(case, grid=grid)
        assert [said.grid for said in found.values()] == [grid if split else None] * 2
        assert inspected(case, grid=grid) == found
        assert recorded(case, monkeypatch, grid) == found
        assert exported(case, grid=grid) == found


def test_they_agree_on_grids_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    case, grids = packed_case(), ((5, 7, 9), GRID)
    found = compiled(case, grids=grids)
    assert [said.grid for said in found.values()] == [GRID] * 2
    assert inspected(case, grids=grids) == found
    assert recorded(case, monkeypatch, None, grids) == found


def test_they_agree_on_the_grids_and_the_budgets_of_a_plan() -> None:
    """What a plan keeps dense stays so for its reason; a grid that is given goes before."""
    case = packed_case()
    for grids, grid, want in (
        (((5, 7, 9), GRID), None, GRID),
        ((GRID,), (6, 3, 10), (6, 3, 10)),
    ):
        plan = plan_of(case, *grids, dense="blocks.1")
        options = {"plan": plan} if grid is None else {"plan": plan, "grid": grid}
        found = compiled(case, **options)
        assert found == {
            "blocks.0": Said(want), "blocks.1": Said(None, "by the plan: too sensitive"),
        }  # fmt: skip
        assert inspected(case, **options) == found
        assert exported(case, **options) == found


def test_they_agree_on_a_model_with_budgets_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules bring their budgets along, and the grids of the plan that these are of."""
    case = packed_case()
    with freqopt.attach(case.model, plan_of(case, (5, 7, 9), GRID, dense="blocks.1")):
        found = compiled(case)
        assert found == {"blocks.0": Said(GRID), "blocks.1": Said(GRID)}
        assert inspected(case) == found
        assert recorded(case, monkeypatch) == found


def test_a_plan_calibrated_with_a_grid_is_enough_for_all() -> None:
    """The grid is in the plan: neither the exporter nor anybody else has to be told again."""
    torch.manual_seed(0)
    case = packed_case()
    plan = freqopt.calibrate(
        case.model, [case.inputs], target_density=0.5, grid=GRID, rounds=0, progress=False
    )
    found = compiled(case, plan=plan)
    assert found == {"blocks.0": Said(GRID), "blocks.1": Said(GRID)}
    assert inspected(case, plan=plan) == found
    assert exported(case, plan=plan) == found
    other = plan.model_copy(update={"sites": {"layers.0": plan.sites["blocks.0"]}})
    with pytest.raises(PlanError, match="none of the 2 sites of this graph .* another model"):
        inspected(case, plan=other)
    unknown = plan.model_copy(update={"grids": []})
    with pytest.raises(PlanError, match="none of the 2 sites"):
        exported(case, plan=unknown)
