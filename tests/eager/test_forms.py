"""What calls of the same shapes are told apart by, and what they are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.calibration.measure.in_pieces import EagerRecorders
from freqopt.calibration.measure.recorder import Desk
from freqopt.capture.values import kept_by, own_modules, value_of
from freqopt.eager import forms
from freqopt.eager.lay import Kind, Lay, as_others, is_elsewhere, is_told
from freqopt.passes.find import Grids
from freqopt.passes.reasons import Reason
from freqopt.passes.site import Known, Source

WIDE, TALL, OTHER = (3, 6, 10), (3, 10, 6), (3, 5, 12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = models.Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Packed(nn.Module):
    """Tokens whose grid is told beside them, in one of several ways."""

    sizes: tuple[int, ...] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, models.WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.table = nn.Parameter(torch.randn(3, 16, models.WIDTH))
        for block in self.blocks:
            block.attn.q.weight.data *= 4

    def forward(
        self,
        tokens: Tensor,
        grid: Tensor | None = None,
        aspect: float | None = None,
        step: int = 0,
        sigma: float = 0.0,
        store: object = None,
    ) -> Tensor:
        x, count = self.patch(tokens), tokens.shape[1]
        if grid is not None:
            t, h, w = READ_BY[step](grid)
        elif aspect is not None:
            h = round((count // 3 * aspect) ** 0.5)
            t, h, w = 3, h, count // 3 // h
        else:
            assert self.sizes is not None
            t, h, w = self.sizes
        x = x + LATTICE[max(step - 10, 0)](self.table, t, h, w).flatten(0, 2)
        for block in self.blocks:
            x = block(x)
        return x


def by_places(table: Tensor, t: Any, h: Any, w: Any) -> Tensor:
    places = (torch.arange(n) for n in (t, h, w))
    at = [each[place] for each, place in zip(table, places, strict=True)]
    return at[0][:, None, None] + at[1][:, None] + at[2]


def by_slices(table: Tensor, t: Any, h: Any, w: Any) -> Tensor:
    """Entries of the tensor that tells the grid are used as they are, as sizes and bounds."""
    first = table[0][:t].view(t, 1, 1, -1).expand(t, h, w, -1)
    second = table[1].narrow(0, 0, h).reshape((1, h, 1, table.shape[2])).repeat(t, 1, w, 1)
    return first + second + table[2, :w].expand(t, h, w, -1)


def by_steps(table: Tensor, t: Any, h: Any, w: Any) -> Tensor:
    """Numbers of steps in which something is cut."""
    ways = (torch.linspace(0, 1, n, dtype=torch.float32) for n in (t, h, w))
    at = torch.stack(torch.meshgrid(*ways, indexing="ij"), -1)
    return at.sum(-1, keepdim=True) * table[0, 0]


LATTICE = [by_places, by_slices, by_steps]
"""What positions are made with. Numbers of steps from 11 on name them."""

READ_BY: dict[int, Callable[[Tensor], Any]] = defaultdict(lambda: Tensor.tolist)
READ_BY.update({-1: lambda grid: (int(n) for n in grid), 10: tuple, 11: tuple, 12: tuple})


def by_tensor(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"grid": torch.tensor(grid)}


def by_entries(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"grid": torch.tensor(grid), "step": -1}


def by_bytes(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"grid": torch.tensor(grid, dtype=torch.uint8)}


def by_sizes(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"grid": torch.tensor(grid), "step": 10}


def by_bounds(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"grid": torch.tensor(grid), "step": 11}


def by_numbers_of_steps(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"grid": torch.tensor(grid, dtype=torch.int32), "step": 12}


def by_float(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    return {"aspect": grid[1] / grid[2]}


def by_itself(model: Packed, grid: tuple[int, ...]) -> dict[str, Any]:
    model.sizes = grid
    return {}


TOLD = [
    by_tensor,
    by_entries,
    by_bytes,
    by_sizes,
    by_bounds,
    by_numbers_of_steps,
    by_float,
    by_itself,
]


@pytest.fixture
def model() -> Packed:
    torch.manual_seed(0)
    return Packed().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(1, 180, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a call was written down: the length."""
    made: list[int] = []
    begin = forms.Look.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(forms.Look, "__init__", noting)
    return made


@pytest.mark.parametrize("told", TOLD)
@torch.no_grad()
def test_each_grid_is_that_of_the_call(
    told: Any, model: Packed, tokens: Tensor, looks: list[int]
) -> None:
    """One grid used to serve all calls with as many tokens, that of the first."""
    plan = plan_of(model, {"tokens": tokens, **told(model, WIDE)}, 3.0)
    assert len(plan.sites) == 2
    alone = {}
    for grid in (WIDE, TALL, OTHER):
        with freqopt.optimize(model, plan, route="eager", strict=True):
            alone[grid] = model(tokens, **told(model, grid))
    looks.clear()
    with freqopt.optimize(model, plan, route="eager", strict=True):
        for grid in (WIDE, TALL, OTHER, WIDE, TALL, OTHER):
            found = model(tokens, **told(model, grid))
            assert (found - alone[grid]).norm() < 1e-6 * found.norm()
    assert len(looks) == 3


class Otherwise(models.Attention):
    """Attention in another way: with tensors that lie otherwise in memory, or written by hand."""

    by_hand = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parts = (each(x).unflatten(-1, (2, -1)) for each in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2).contiguous() for part in parts)
        if self.by_hand:
            mixed = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


Way = Callable[[Packed, Tensor, dict[str, Any]], Tensor]


def cast(model: Packed, tokens: Tensor, told: dict[str, Any]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(tokens, **told)


def by_another_class(model: Packed, tokens: Tensor, told: dict[str, Any]) -> Tensor:
    """Nothing that the model is given says so."""
    for block in model.blocks:
        block.attn.__class__ = Otherwise
    return model(tokens, **told)


def by_another_class_in_part(model: Packed, tokens: Tensor, told: dict[str, Any]) -> Tensor:
    model.blocks[1].attn.__class__ = Otherwise
    return model(tokens, **told)


def by_hand(model: Packed, tokens: Tensor, told: dict[str, Any]) -> Tensor:
    for block in model.blocks:
        block.attn.__class__ = Otherwise
        block.attn.by_hand = True
    return model(tokens, **told)


@pytest.mark.parametrize("way", [cast, by_another_class, by_another_class_in_part, by_hand])
@torch.no_grad()
def test_attention_called_in_another_way_lies_on_the_grid_of_the_call(
    way: Way, model: Packed, tokens: Tensor
) -> None:
    """It was served on the calibrated grid, in a call of a known form that is on another."""
    plan, twin = plan_of(model, {"tokens": tokens, **by_tensor(model, WIDE)}, 3.0), Packed().eval()
    twin.load_state_dict(model.state_dict())
    with freqopt.optimize(twin, plan, route="eager", strict=True):
        alone = way(twin, tokens, by_tensor(twin, TALL))
    with freqopt.optimize(model, plan, route="eager", strict=True):
        plain = [model(tokens, **by_tensor(model, grid)) for grid in (WIDE, TALL)]
        found = way(model, tokens, by_tensor(model, TALL))
    assert (plain[0] - plain[1]).norm() > 1e-3 * plain[0].norm()
    assert (found - alone).norm() < 1e-6 * found.norm()


@torch.no_grad()
def test_a_call_with_gradients_tells_nothing_of_attention_by_hand(
    model: Packed, tokens: Tensor
) -> None:
    plan, told = plan_of(model, {"tokens": tokens, **by_tensor(model, WIDE)}, 3.0), by_tensor
    with freqopt.optimize(model, plan, route="eager", strict=True):
        alone = by_hand(model, tokens, told(model, TALL))
    with freqopt.optimize(model, plan, route="eager"):
        with torch.enable_grad():
            dense = model(tokens, **told(model, TALL))
        found = model(tokens, **told(model, TALL))
    assert (found - dense).norm() > 1e-3 * dense.norm()
    assert (found - alone).norm() < 1e-6 * found.norm()


@torch.no_grad()
def test_what_was_skipped_in_the_first_call_of_a_form_is_looked_at_in_the_next(
    model: Packed, tokens: Tensor
) -> None:
    plan = plan_of(model, {"tokens": tokens, **by_tensor(model, WIDE)}, 3.0)
    with freqopt.optimize(model, plan, route="eager", strict=True):
        alone = model(tokens, **by_tensor(model, TALL))
    with freqopt.optimize(model, plan, route="eager", strict=True):
        model(tokens, **by_tensor(model, WIDE))
        for block in model.blocks:
            block.attn.forward = lambda x: x
        model(tokens, **by_tensor(model, TALL))
        for block in model.blocks:
            del block.attn.forward
        found = model(tokens, **by_tensor(model, TALL))
    assert (found - alone).norm() < 1e-6 * found.norm()


def test_a_layout_of_a_plan_is_not_believed_against_what_a_call_tells() -> None:
    wide, tall = (Lay("self", grid, 0, 0, proven=True) for grid in (WIDE, TALL))
    small = Lay("self", (3, 3, 5), 0, 0, proven=True)
    kind, other, further = (
        Kind(tuple(Known(each) for each in seen), False, (), form)
        for seen, form in (((WIDE,), "a"), ((WIDE, TALL), "b"), ((small.grid,), "c"))
    )
    assert not is_elsewhere(wide, {})
    assert not is_elsewhere(wide, {other: wide, further: small})
    assert not is_elsewhere(wide, {other: Reason.CAUSAL()})
    assert is_elsewhere(wide, {kind: tall}) and is_elsewhere(wide, {other: tall})
    assert is_elsewhere(wide, {further: small._replace(grid=(3, 5, 3))})
    known = Known(WIDE, sources=tuple(Source("video", dim, 1) for dim in (2, 3, 4)))
    for grid in (WIDE, TALL):
        called = {"video": torch.zeros(1, 4, *grid)}
        assert is_told(wide, (known,), called) == (grid == WIDE)
        assert not is_told(wide, (Known(WIDE),), called)


def test_the_same_attention_lies_as_it_does_when_it_is_called_otherwise() -> None:
    lay, masked = Lay("self", TALL, 0, 0, proven=True), Lay("self", TALL, 0, 0, mask=1)
    kind = Kind((Known(WIDE),), False, (1, 2, 180, 16, 180), "new")
    first, second = kind._replace(form="first"), kind._replace(form="second")
    longer = first._replace(sizes=(1, 2, 192, 16, 192))
    unknown, hidden = Reason.NO_AXES(), Reason.MASK_UNPROVEN()
    assert as_others(kind, {}) is None and as_others(kind, {longer: lay}) is None
    assert as_others(kind, {first: lay, longer: masked}) == lay._replace(proven=False)
    assert as_others(kind, {first: lay, second: masked}) == masked
    assert as_others(kind, {first: lay, second: hidden}) == lay._replace(proven=False)
    assert as_others(kind, {first: lay, second: lay._replace(grid=WIDE)}) == unknown
    assert as_others(kind, {first: unknown, second: hidden}) == unknown
    assert as_others(kind, {first: hidden}) is None


@pytest.mark.parametrize("told", [by_tensor, by_float])
@torch.no_grad()
def test_calibration_measures_each_sample_on_its_grid(
    told: Any, model: Packed, tokens: Tensor
) -> None:
    desk = Desk()
    recorders = EagerRecorders(model, desk, Grids(), "sigma")
    for sigma, grid in enumerate((WIDE, TALL, TALL, WIDE)):
        recorders((tokens,), {**told(model, grid), "sigma": float(sigma)})
    assert {known.grid for known in desk.layouts["blocks.0.attn"]} == {WIDE, TALL}
    assert len(recorders.forms) == 2


@torch.no_grad()
def test_what_changes_with_every_step_is_looked_at_a_few_times_only(
    model: Packed, tokens: Tensor, looks: list[int]
) -> None:
    """And the grid is still heard, whatever came before."""
    plan = plan_of(model, {"tokens": tokens, **by_float(model, WIDE)}, 3.0)
    with freqopt.optimize(model, plan, route="eager", strict=True):
        tall = model(tokens, **by_float(model, TALL))
    looks.clear()
    with freqopt.optimize(model, plan, route="eager", strict=True):
        for step in range(8):
            for _ in range(2):  # as with and without a text
                told = {"step": step, "sigma": step / 7, "store": object()}
                model(tokens, **by_float(model, WIDE), **told)
        assert len(looks) == 3
        found = model(tokens, **by_float(model, TALL), **told)
        assert (found - tall).norm() < 1e-6 * found.norm()
    assert len(looks) == 4


@torch.no_grad()
def test_what_made_a_difference_is_never_passed_over(
    model: Packed, tokens: Tensor, looks: list[int]
) -> None:
    """Three values go with one grid, and others do not."""
    plan = plan_of(model, {"tokens": tokens, **by_float(model, WIDE)}, 3.0)
    aspects = (0.6, 10 / 6, 0.6001, 0.5999, 0.6002, 5 / 12)
    alone = []
    for aspect in aspects:
        with freqopt.optimize(model, plan, route="eager", strict=True):
            alone.append(model(tokens, aspect=aspect))
    looks.clear()
    with freqopt.optimize(model, plan, route="eager", strict=True):
        for aspect, expected in zip(aspects, alone, strict=True):
            assert (model(tokens, aspect=aspect) - expected).norm() < 1e-6 * expected.norm()
    assert len(looks) == len(aspects)


def test_values_that_tell() -> None:
    ids, many = torch.tensor([[3, 6, 10]]), torch.zeros(99, dtype=torch.long)
    assert value_of(ids.byte(), read=True) == (3, 6, 10)
    assert value_of(ids, read=True) == (3, 6, 10) and value_of(ids, read=False) is None
    for silent in (many, ids.float(), ids > 4, ids.to("meta"), torch.zeros(0, dtype=torch.long)):
        assert value_of(silent, read=True) is None
    assert value_of(0.5, read=False) != value_of(0.25, read=False)
    assert value_of(object(), read=True) == value_of(object(), read=True)
    model = Packed()
    assert kept_by(own_modules(model)) == ()
    model.blocks[0].sizes = [1, 2, 3]
    assert kept_by(own_modules(model)) == ((1, 2, 3),)
