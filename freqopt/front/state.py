"""Looks at what is on a model, and chooses by it the route on which attention is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from freqopt.capture.modules import blocks_around, modules_of, replaced_forwards
from freqopt.plan.plan import Plan, model_fingerprint

Route = Literal["compile", "regional", "eager"]
ROUTES: tuple[Route, ...] = ("compile", "regional", "eager")


class Choice(NamedTuple):
    """A route, and why that one."""

    route: Route
    why: str


@dataclass(frozen=True)
class State:
    """What is on a model.

    replaced: names of modules whose forward was replaced on the instance, as offloading, casting
    and step caches do. hooked: those with hooks. compiled: those compiled in place. spread: whether
    one sequence is spread over several GPUs. blocks: the modules, by name, that repeat and hold the
    planned attention, each once. other_weights: the parameters are not those of the plan.
    """

    replaced: tuple[str, ...]
    hooked: tuple[str, ...]
    compiled: tuple[str, ...]
    spread: bool
    blocks: tuple[str, ...]
    other_weights: bool


def state_of(model: nn.Module, plan: Plan) -> State:
    """Look at a model that a plan is for."""
    modules = modules_of(model)
    return State(
        replaced=replaced_forwards(model),
        hooked=tuple(n for n, m in modules.items() if m._forward_hooks or m._forward_pre_hooks),
        compiled=tuple(n for n, m in modules.items() if m._compiled_call_impl is not None),
        spread=getattr(model, "_parallel_config", None) is not None,
        blocks=blocks_of(model, plan),
        other_weights=model_fingerprint(model) != plan.model.fingerprint,
    )


def choose_route(state: State) -> Choice:
    """The route for a model in a state."""
    if state.spread:
        return Choice("eager", "a sequence is spread over several GPUs: each rank serves its heads")
    if state.replaced:
        return Choice(
            "eager",
            f"something (offloading, casting, a step cache) has replaced {_of(state.replaced)}, "
            "which breaks a compiler's graph",
        )
    if state.hooked:
        return Choice("eager", f"hooks around {_of(state.hooked)} would break a compiler's graph")
    if "" in state.compiled:
        return Choice("compile", "it was compiled as a whole, which is put back in the end")
    if state.compiled:
        return Choice("regional", "its blocks were compiled, which is put back in the end")
    if state.other_weights:
        return Choice("eager", "its parameters are not the plan's (an adapter, quantised weights)")
    if len(state.blocks) > 1:
        return Choice("regional", f"its {len(state.blocks)} blocks are alike: one is compiled")
    return Choice("compile", "nothing is on it, and no blocks repeat")


def blocks_of(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Names of the blocks that hold the planned attention."""
    return blocks_around(model, plan.modules(model).values())


def _of(names: Sequence[str]) -> str:
    first = names[0] or "the model itself"
    return f"the forward of {first}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
