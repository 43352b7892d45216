"""What is done around a model that is served: checkpoints, threads, attention of its own."""

from __future__ import annotations

import threading
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from pieces_models import inputs_on as call
from plans import plan_of, timed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freqopt
from freqopt.capture import eager
from freqopt.eager.forms import Look, Wanted
from freqopt.errors import InputError, SiteError
from freqopt.passes.reasons import Reason, Why
from freqopt.plan.plan import Plan

WIDE, TALL = models.GRID, (3, 10, 6)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), call(WIDE), 1.0)


class Around(nn.Module):
    """A block that runs once more in the backward pass."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *given: Tensor) -> Any:
        return checkpoint(self.block, *given, use_reentrant=self.reentrant)


def around(reentrant: bool, plan: Plan, *, strict: bool = True) -> models.Video:
    model = models.make()
    model.__class__ = models.Timed
    freqopt.optimize(model, plan, route="eager", strict=strict)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Around(block, reentrant)
    return model


def gradients(model: nn.Module, *several: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    sum(model(**given).square().mean() for given in several).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain(plan: Plan, given: dict[str, Tensor]) -> Tensor:
    model = models.make()
    model.__class__ = models.Timed
    with freqopt.optimize(model, plan, route="eager", strict=True):
        return gradients(model, given)


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpoints(reentrant: bool, plan: Plan) -> None:
    model = around(reentrant, plan)
    for grid in (WIDE, TALL):
        wanted, dense = plain(plan, call(grid)), gradients(models.make(), call(grid))
        assert far(dense, wanted) > 1e-3
        assert far(gradients(model, call(grid)), wanted) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_backward_pass_has_the_budgets_of_its_own_call(reentrant: bool, plan: Plan) -> None:
    early, late = ({**call(WIDE), "time": torch.tensor([time])} for time in (100.0, 900.0))
    model, wanted = around(reentrant, timed(plan)), plain(timed(plan), early)
    assert far(plain(timed(plan), late), wanted) > 1e-3
    loss = model(**early).square().mean()
    with torch.no_grad():
        model(**late)  # a look in between
    loss.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert far(got, wanted) < 1e-5
    with pytest.raises(InputError, match="it was called at several timesteps since"):
        gradients(model, early, late)


def test_several_grids_before_one_backward_pass_are_not_guessed(plan: Plan) -> None:
    model = around(True, plan)
    with pytest.raises(InputError, match="it was called on several grids since"):
        gradients(model, call(WIDE), call(TALL))
    assert gradients(model, call(TALL)).isfinite().all()


class Otherwise(models.Attention):
    """The same attention, whose queries lie otherwise in memory, or which is written by hand."""

    by_hand = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys = x if context is None else context
        given = ((self.q, x), (self.k, keys), (self.v, keys))
        parts = [f(each).unflatten(-1, (2, -1)).transpose(1, 2).contiguous() for f, each in given]
        if self.by_hand:
            scores = parts[0] @ parts[1].transpose(-2, -1) * parts[0].shape[-1] ** -0.5
            attended = scores.softmax(-1) @ parts[2]
        else:
            attended = F.scaled_dot_product_attention(*parts)
        return self.out(attended.transpose(1, 2).flatten(2))


def called_otherwise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, models.Attention):
            module.__class__ = Otherwise


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_form_did_not_show_runs_again_as_it_ran(reentrant: bool, plan: Plan) -> None:
    """The forward pass went by the plan, and the backward pass knew of nothing and was dense."""
    model, wanted = around(reentrant, plan), plain(plan, call(WIDE))
    assert far(gradients(model, call(WIDE)), wanted) < 1e-5
    called_otherwise(model)
    assert far(gradients(models.make(), call(WIDE)), wanted) > 1e-3
    for _ in range(3):
        assert far(gradients(model, call(WIDE)), wanted) < 1e-5


def told_late(self: Look, wanted: Wanted) -> Why:
    """As where only what is made of the outputs tells how tokens lie."""
    self.missing.append(wanted)
    return Reason.NO_AXES()


class Whole(Around):
    def forward(self, video: Tensor, text: Tensor) -> Any:
        return super().forward(video, text)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_only_the_end_of_a_call_tells_is_dense_in_its_backward_pass_too(
    whole: bool, reentrant: bool, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of a form is, and what was put down when it was over is of the next."""
    wanted, dense = plain(plan, call(WIDE)), gradients(models.make(), call(WIDE))
    monkeypatch.setattr(Look, "find", told_late)
    if whole:
        given = call(WIDE)
        given["video"].requires_grad_()
        model = models.make()
        freqopt.optimize(model, plan, route="eager")
        run: nn.Module = Whole(model, reentrant)
    else:
        run, given = around(reentrant, plan, strict=False), call(WIDE)
    assert far(gradients(run, given), dense) < 1e-5
    assert far(gradients(run, given), wanted) < 1e-5


def test_attention_by_hand_that_a_checkpoint_runs_without_gradients_is_dense(plan: Plan) -> None:
    """It runs once more with gradients, where it cannot be put off."""
    dense = gradients(models.make(), call(WIDE))
    for strict in (False, True):
        model = around(True, plan, strict=strict)
        called_otherwise(model)
        for block in model.blocks:
            block.block.attn.by_hand = True
        with torch.no_grad():
            assert far(model(**call(WIDE)), models.make()(**call(WIDE))) > 1e-3
        if strict:
            with pytest.raises(SiteError, match="no attention was met there"):
                gradients(model, call(WIDE))
        else:
            assert far(gradients(model, call(WIDE)), dense) < 1e-5


def test_a_checkpoint_inside_a_module_is_dense_and_told(plan: Plan) -> None:
    model = models.make()
    for block in model.blocks:
        block.attn.__class__ = Inside
    dense = gradients(model, call(WIDE))
    with freqopt.optimize(model, plan, route="eager"):
        assert far(gradients(model, call(WIDE)), dense) < 1e-6
        with torch.no_grad():
            assert far(model(**call(WIDE)), models.make()(**call(WIDE))) > 1e-3
    told = pytest.raises(SiteError, match="an activation checkpoint inside its module")
    with freqopt.optimize(model, plan, route="eager", strict=True), told:
        gradients(model, call(WIDE))


class Inside(models.Attention):
    """Attention alone runs once more."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parts = [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        attended = checkpoint(F.scaled_dot_product_attention, *parts, use_reentrant=False)
        return self.out(attended.transpose(1, 2).flatten(2))


class Alone(nn.Module):
    """A model whose own forward attends, with no module around that."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(32, 96)
        self.qkv.weight.data *= 4

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_of_the_model_itself_leaves_nothing_open() -> None:
    torch.manual_seed(0)
    model, given = Alone().eval(), call(WIDE)
    plan = plan_of(model, given, 5.0)
    with torch.no_grad():
        dense = model(**given)
        with freqopt.optimize(model, plan, route="eager", strict=True):
            for _ in range(2):
                assert far(model(**given), dense) > 1e-3
                assert not torch.overrides._get_current_function_mode_stack()
        assert torch.equal(model(**given), dense)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_of_functions_are_dense_and_told(transform: Any, plan: Plan) -> None:
    model, given = models.make(), call(WIDE)
    text, videos = given["text"], torch.stack([given["video"]] * 2)

    def run(video: Tensor) -> Tensor:
        return model(video=video, text=text).square().mean()

    argument = videos if transform is torch.func.vmap else videos[0]
    dense = transform(run)(argument)
    plain = run(videos[0])
    with freqopt.optimize(model, plan, route="eager"):
        assert far(transform(run)(argument), dense) < 1e-6
        assert far(run(videos[0]), plain) > 1e-5  # and split where there is no transform
    told = pytest.raises(SiteError, match=r"inside torch\.jit\.trace or a transform of torch\.func")
    with freqopt.optimize(model, plan, route="eager", strict=True), told:
        transform(run)(argument)


def test_threads_that_are_looked_at_together_leave_the_compiler_on() -> None:
    """The stance of the compiler is one for all threads: the second is done after the first."""
    began, first_is_done = threading.Event(), threading.Event()
    model = models.make()

    def look() -> None:
        with eager.Modules(model).watched():
            began.set()
            assert first_is_done.wait(60)

    thread = threading.Thread(target=look)
    with eager.Modules(model).watched():
        thread.start()
        assert began.wait(60)
    first_is_done.set()
    thread.join()
    made: list[Any] = []
    compiled = torch.compile(model, backend=lambda gm, _: made.append(gm) or gm.forward)
    with torch.no_grad():
        compiled(**call(WIDE))
    assert made


def test_modules_that_run_in_another_thread_are_not_taken_for_this_ones() -> None:
    model, names = models.make(), set()
    modules = eager.Modules(model)

    def look(*_: Any) -> None:
        names.update(name for name, _ in modules.stack().values())

    model.patch.register_forward_pre_hook(look)
    thread = threading.Thread(target=model.patch, args=(call(WIDE)["video"],))
    with torch.no_grad(), modules.watched():
        thread.start()
        thread.join()
        assert not names
        model(**call(WIDE))
    assert names == {"patch"}


class Watched(models.Attention):
    """Calls of other libraries' operators around its attention."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with torch.profiler.record_function("attention"):
            out: Tensor = super().forward(x, context)
            return torch.ops.freqopt_tests.mean_of_three(out, out, out)


def test_operators_that_are_no_attention_are_left_alone(plan: Plan) -> None:
    """One takes no tensor, and one of three cannot be run without values."""
    with torch.library._scoped_library("freqopt_tests", "DEF") as library:
        library.define("mean_of_three(Tensor a, Tensor b, Tensor c) -> Tensor")
        library.impl("mean_of_three", lambda a, b, c: (a + b + c) / 3, "CPU")
        model = models.make()
        for block in model.blocks:
            block.attn.__class__ = Watched
        with torch.no_grad(), freqopt.optimize(model, plan, route="eager", strict=True):
            got = model(**call(WIDE))
    expected = models.make()
    with torch.no_grad(), freqopt.optimize(expected, plan, route="eager", strict=True):
        assert far(got, expected(**call(WIDE))) < 1e-5


class Powers(models.Attention):
    """Keys scaled by an operator that PyTorch wraps, `**`, and, if it is so, a mask made by it."""

    masked = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys = x if context is None else context
        q, k, v = (
            linear(each).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
            for linear, each in ((self.q, x), (self.k, keys), (self.v, keys))
        )
        k = k * (k**2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        there = (torch.ones(len(keys), keys.shape[1]) ** 2).bool()[:, None, None]
        mask = there if self.masked else None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
def test_powers_are_read_like_products(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Powers, "masked", masked)
    model = models.make()
    for block in model.blocks:
        block.attn.__class__ = Powers
    plan = plan_of(model, call(WIDE), 1.0)
    if masked:  # nobody knows what a power of it is, and it must not end in an error
        assert not plan.sites and len(plan.evidence.dense_sites) == 2 * len(model.blocks)
        return
    assert len(plan.sites) == len(model.blocks)
    with torch.no_grad():
        dense = model(**call(WIDE))
        with freqopt.optimize(model, plan, route="eager", strict=True):
            assert far(model(**call(WIDE)), dense) > 1e-3
