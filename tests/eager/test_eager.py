"""Attention without a compiler: the numbers of the compiled route, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.eager import forms
from freqopt.eager import serve as serving
from freqopt.eager.calling import share_of_heads
from freqopt.eager.latest import Latest
from freqopt.eager.serve import Server
from freqopt.errors import SiteError
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget

COMPILED = {"min_tokens": 0, "inner": "eager"}


def spread(plan: Plan, **changes: Any) -> Plan:
    """A plan in which every head of every site has another threshold."""
    sites = {}
    for number, (name, site) in enumerate(plan.sites.items()):
        rows = [
            Budget(threshold=[0.5 + 0.3 * number + 0.2 * head + b for head in range(site.heads)])
            for b in range(len(changes.get("timestep_edges", ())) + 1)
        ]
        sites[name] = site.model_copy(update={"budgets": rows})
    return plan.model_copy(update={"sites": sites, **changes})


@contextmanager
def served(model: nn.Module, plan: Plan, *, strict: bool = False) -> Iterator[Server]:
    attached = freqopt.attach(model, plan)
    server = Server(attached, plan, strict=strict)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        attached.remove()


def compiled(model: nn.Module, plan: Plan, inputs: dict[str, Any]) -> Tensor:
    torch._dynamo.reset()
    options = {**COMPILED, "plan": plan}
    with torch.no_grad():
        out: Tensor = torch.compile(model, backend=freqopt_backend, options=options)(**inputs)
    torch._dynamo.reset()
    return out


class Around(models.Video):
    """Attention to the video with one text cut in two around it, put together again in the op."""

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        before, after = text.tensor_split([7], 1)
        for block in self.blocks:
            joint = torch.cat([before, x, after], 1)
            x = x + block.attn(joint)[:, 7:-5]
        return self.head(x)


def test_text_that_lies_on_both_sides_is_not_taken_for_video(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "Video", Around)
    model, inputs = models.make(), models.inputs()
    plan = plan_of(model, inputs, 1.0)
    assert len(plan.sites) == 3
    expected = compiled(model, plan, inputs)
    with torch.no_grad(), served(model, plan):
        out = model(**inputs)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, models.make()(**inputs), rtol=1e-3, atol=1e-4)


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.fixture(scope="module")
def plan() -> Plan:
    return spread(plan_of(models.make(), models.inputs(), 1.0))


@pytest.mark.smoke
def test_the_numbers_are_those_of_the_compiled_route(plan: Plan) -> None:
    model, inputs = models.make(), models.inputs(batch=2)
    before = dict(vars(model)), [dict(vars(m)) for m in model.modules()]
    with torch.no_grad():
        dense = model(**inputs)
        expected = compiled(models.make(), plan, inputs)
        freqopt.reset_counters()
        with served(model, plan) as server:
            first, second = model(**inputs), model(**inputs)
        assert far(expected, dense) > 1e-3
        assert far(first, expected) < 1e-5
        assert torch.equal(first, second)
        assert torch.equal(model(**inputs), dense)
    counted = {s.site: s.calls for s in freqopt.counters().sites if s.split}
    assert counted == dict.fromkeys(plan.sites, 2)
    assert all(0 < each < 1 for each in server.told.densities().values())
    assert (dict(vars(model)), [dict(vars(m)) for m in model.modules()]) == before


@pytest.mark.parametrize(
    "change", [models.breaking_linears, models.breaking_blocks, models.brought_in, models.adapted]
)
def test_what_breaks_a_compilers_graph_does_not_matter(change: Any, plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    change(model)
    with torch.no_grad(), served(model, plan):
        out = model(**inputs)
    with torch.no_grad(), served(models.make(), plan) as server:
        expected = server.root(**inputs)
    assert far(out, expected) < (1e-5 if change is not models.adapted else 1.0)
    assert freqopt.counters().split >= 3


def test_a_second_resolution_is_served_on_its_own_grid(plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    other = {**inputs, "video": torch.randn(1, 4, 5, 14, 10)}
    turned = {**inputs, "video": torch.randn(1, 4, 3, 20, 12)}  # as many tokens, another grid
    expected = [compiled(models.make(), plan, each) for each in (other, turned)]
    with torch.no_grad(), served(model, plan):
        model(**inputs)
        for _ in range(2):
            assert far(model(**other), expected[0]) < 1e-5
            assert far(model(**turned), expected[1]) < 1e-5


class Timed(models.Video):
    def forward(self, video: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(video + timestep.mean() / 10, text)


def test_each_timestep_has_its_budgets_and_is_no_other_form(plan: Plan) -> None:
    torch.manual_seed(0)
    model = Timed().eval()
    inputs = models.inputs()
    base = plan_of(model, {**inputs, "timestep": torch.tensor([0.5])}, 1.0)
    timed = spread(base, timestep_name="timestep", timestep_edges=[0.4])
    times = [torch.tensor([time]) for time in (0.1, 0.9, 0.3)]
    with torch.no_grad():
        expected = [compiled(copy.deepcopy(model), timed, {**inputs, "timestep": t}) for t in times]
        with served(model, timed) as server:
            for time, each in zip(times, expected, strict=True):
                assert far(model(**inputs, timestep=time), each) < 1e-5
            assert far(model(**inputs, timestep=0.1 * torch.ones(1)), expected[0]) < 1e-5
            assert len(server.forms._forms) == 1
    assert far(expected[0], expected[2]) > 0 and timed.budget("blocks.0.attn", 1)[0, 0] == 1.5


class Kinds(nn.Module):
    """Attention by nn.MultiheadAttention, and joint attention with a text and a mask over it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.packed = nn.MultiheadAttention(32, 2, batch_first=True)
        self.joint = Joint()

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        x = x + self.packed(x * 3, x * 3, x, need_weights=False)[0]
        return self.joint(x, text)


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        shown = torch.arange(text.shape[1]) < 9
        both = torch.cat([text, x], 1)
        mask = torch.cat([shown, torch.ones(x.shape[1], dtype=torch.bool)])[None, None, None]
        q, k, v = (f(both).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(3 * q, k, v, attn_mask=mask).transpose(1, 2)


def test_packed_and_joint_attention_are_served() -> None:
    torch.manual_seed(0)
    model, inputs = Kinds().eval(), models.inputs()
    found = freqopt.calibrate(
        model,
        [models.inputs(), {**inputs, "video": inputs["video"].flip(2)}],
        target_density=0.6,
        progress=False,
        rounds=0,
    )
    assert [site.decision for site in found.sites.values()] == ["split", "split"]
    expected = compiled(copy.deepcopy(model), found, inputs)
    freqopt.reset_counters()
    with torch.no_grad():
        dense = model(**inputs)
    with torch.no_grad(), served(model, found, strict=True):
        out = model(**inputs)
        assert far(out, expected) < 1e-5
    assert far(expected, dense) > 1e-3
    assert freqopt.counters().split >= 2


def test_an_attention_that_cannot_be_served_is_told(plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    model.blocks[1].attn.forward = lambda x, context=None: x  # nothing there any more
    words = "2 of 3 planned sites split.*no attention was met"
    told = pytest.raises(SiteError, match=words)
    with torch.no_grad(), served(model, plan, strict=True), told:
        model(**inputs)


def test_copies_are_dense_and_say_so(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = models.make(), models.inputs()
    with torch.no_grad():
        dense = model(**inputs)
        with served(model, plan):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(**inputs), dense)
            assert not torch.equal(model(**inputs), dense)
            assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs), dense)
    assert "is a copy of a model" in caplog.text


def test_a_failing_call_leaves_nothing_open(plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    with torch.no_grad(), served(model, plan):
        with pytest.raises(RuntimeError):
            model(video=inputs["video"], text=inputs["text"][..., :3])
        out = model(**inputs)
        assert not torch.overrides._get_current_function_mode_stack()
    with torch.no_grad(), served(models.make(), plan) as server:
        assert torch.equal(server.root(**inputs), out)


def test_a_rank_serves_its_heads_of_the_plan(plan: Plan) -> None:
    """As where a sequence is spread over several GPUs, and each has all tokens of some heads."""
    inputs, caught = models.inputs(), []

    def of_rank(attn: models.Attention, rank: int | None) -> Any:
        def forward(x: Tensor, context: Tensor | None = None) -> Tensor:
            parts = [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (attn.q, attn.k, attn.v)]
            if rank is None:
                caught.append(F.scaled_dot_product_attention(*parts))
            else:
                with share_of_heads(rank, 2):
                    mine = (part[:, rank : rank + 1] for part in parts)
                    caught.append(F.scaled_dot_product_attention(*mine))
            return x

        return forward

    for rank in (None, 0, 1):
        model = models.make()
        for block in model.blocks:
            block.attn.forward = of_rank(block.attn, rank)
        with torch.no_grad(), served(model, plan, strict=True):
            model(**inputs)
    whole, first, second = caught[:3], caught[3:6], caught[6:]
    for every, *halves in zip(whole, first, second, strict=True):
        assert far(torch.cat(halves, 1), every) < 1e-5
    budgets = [plan.budget(name)[0] for name in plan.sites]
    assert all(budget[0] != budget[1] for budget in budgets)


def test_forms_without_end_are_served_and_not_all_kept(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "MOST_FORMS", 3)
    monkeypatch.setattr(forms, "MOST_FORMS", 3)
    caplog.set_level("INFO", "freqopt")
    model = models.make()
    sizes = [(3, 6, h) for h in range(8, 14)] * 2
    with torch.no_grad(), served(model, plan) as server:
        for t, h, w in sizes:
            given = {**models.inputs(), "video": torch.randn(1, 4, t, 2 * h, 2 * w)}
            model(**given)
            held = (server._served, server._attention, server.forms._forms, server.forms._families)
            assert all(0 < len(each) <= 3 for each in held)
        assert far(model(**given), compiled(models.make(), plan, given)) < 1e-5
    assert "more than 3 forms of attention: the one used longest ago is dropped" in caplog.text


def test_what_was_used_last_is_kept() -> None:
    held: Latest[int] = Latest(2, "numbers")
    held.put("one", 1)
    held.put("two", 2)
    assert held.get("one") == 1
    held.put("three", 3)
    assert (held.get("one"), held.get("two"), held.get("three")) == (1, None, 3)
