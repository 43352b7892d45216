"""Options of the backend, checked one by one, and the plan that one of them names."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from freqopt.chunks import check_chunk
from freqopt.config import DEFAULT_CHUNK
from freqopt.errors import InputError, OptionError

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Options:
    """Options of the backend: ``torch.compile(model, backend="freqopt", options=Options(...))``.

    A dict of the same names does as well; this has completion, and finds a misspelt name at once.
    They are checked when the model is compiled.

    Attributes:
        plan: a `Plan` or the path of one.
        grid: extents (t, h, w) of the video tokens, where the graph does not tell them.
        grids: several of these, for a model that is called at several resolutions; where a graph
            tells none, that of a call's positions is taken, or the one that has as many tokens.
        before: other tokens before `grid` in its axis.
        after: other tokens after it, as of a reference image packed behind the one that is made.
        order: "grid" or "content", how tokens are ordered without a plan, which has orders of its
            own: by default by the grid, and sites without one stay dense.
        chunk: tokens that are ordered by content together: a power of two from 256, or "all".
        reuse_order: calls of a site that one order by content serves, for each model, layer and
            thread by itself; an output then depends on earlier calls. 1: every call makes its own,
            as where gradients are recorded.
        threshold: one budget for all sites instead of a plan; 0 is exact.
        min_tokens: shorter sites stay dense; by default by `freqopt.break_even`, from the site's
            heads.
        strict: raise where a site cannot be rewritten.
        inner: the backend that compiles the rewritten graph.
        mode: its mode, such as "reduce-overhead" (torch.compile does not take options and a mode at
            once).
    """

    plan: Plan | str | os.PathLike[str] | None = None
    grid: tuple[int, int, int] | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    before: int = 0
    after: int = 0
    order: Literal["grid", "content"] | None = None
    chunk: int | Literal["all"] = DEFAULT_CHUNK
    reuse_order: int = 1
    threshold: float | None = None
    min_tokens: int | None = None
    strict: bool = False
    inner: str | Callable[..., Compiled] = "inductor"
    mode: str | None = None


def parse_options(options: Mapping[str, Any] | Options | None) -> Options:
    """Check options one by one.

    Raises:
        OptionError: what is wrong, and what was probably meant.
    """
    if isinstance(options, Options):
        unset = Options()
        every = {field.name: getattr(options, field.name) for field in fields(Options)}
        options = {n: item for n, item in every.items() if item is not getattr(unset, n)}
    given = dict(options or {})
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"unknown option {name!r}{hint} (options: {', '.join(known)})")
    given = {name: item for name, item in given.items() if item is not None}
    if "grid" in given:
        given["grid"] = extents_of(given["grid"])
    if "grids" in given:
        several = given["grids"]
        if "grid" in given or not isinstance(several, (tuple, list)):
            raise OptionError(f"grids {several!r} must be a list of grids, and given without grid")
        given["grids"] = tuple(extents_of(grid) for grid in several)
    _check_others(given)
    threshold = given.get("threshold")
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise OptionError(f"threshold {threshold!r} must be a number; 0 is exact")
        if math.isnan(threshold) or threshold < 0:
            raise OptionError(f"threshold {threshold} must be 0 (exact) or larger")
        if "plan" in given:
            raise OptionError("plan and threshold were both given; a plan has its own budgets")
    _check_order(given)
    calls = given.get("reuse_order", 1)
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise OptionError(
            f"reuse_order {calls!r} must be a number of calls that an order serves, 1 or larger"
        )
    least = given.get("min_tokens")
    if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 0):
        raise OptionError(f"min_tokens {least!r} must be a number of tokens, 0 or larger")
    if not isinstance(given.get("strict", False), bool):
        raise OptionError(f"strict {given['strict']!r} must be True or False")
    inner = given.get("inner", "inductor")
    _check_inner(inner)
    _check_mode(inner, given.get("mode"))
    return Options(**given)


def _check_order(given: Mapping[str, Any]) -> None:
    order = given.get("order")
    if order not in (None, "grid", "content"):
        raise OptionError(f"order {order!r} must be 'grid' or 'content'")
    if order is not None and "plan" in given:
        raise OptionError("plan and order were both given; a plan says how tokens are ordered")
    if "chunk" in given:
        if order != "content":
            raise OptionError("chunk was given without order='content'")
        try:
            check_chunk(given["chunk"])
        except InputError as error:
            raise OptionError(str(error)) from error


def _check_others(given: Mapping[str, Any]) -> None:
    for name in ("before", "after"):
        count = given.get(name, 0)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise OptionError(f"{name} {count!r} must be a number of tokens, 0 or larger")
        if count and "grid" not in given:
            raise OptionError(
                f"{name}={count} was given without grid: it is the number of other tokens {name} "
                "those of grid=(t, h, w), in the same axis"
            )


def _check_inner(inner: object) -> None:
    if not (callable(inner) or isinstance(inner, str)):
        raise OptionError(f"inner {inner!r} must be the name of a backend, such as 'inductor'")
    if inner == "freqopt":
        raise OptionError("inner is 'freqopt' itself; name the backend that compiles the result")
    if inner == "inductor" or not isinstance(inner, str):
        return
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if inner not in known:
        near = difflib.get_close_matches(inner, known, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(
            f"inner {inner!r} is no backend of torch.compile{hint} (torch._dynamo.list_backends() "
            "names them)"
        )


def _check_mode(inner: object, mode: object) -> None:
    if mode is None or inner != "inductor":
        return
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise OptionError(f"unknown mode {mode!r} of inductor (modes: {', '.join(known)})")


def extents_of(given: Any) -> tuple[int, int, int]:
    """A grid (t, h, w) as it was given.

    Raises:
        OptionError: not three positive whole numbers.
    """
    extents = tuple(given) if isinstance(given, (tuple, list)) else ()
    valid = len(extents) == 3 and all(
        isinstance(e, int) and not isinstance(e, bool) and e >= 1 for e in extents
    )
    if not valid:
        raise OptionError(
            f"grid {given!r} must be three positive extents (t, h, w), in tokens and not in "
            "pixels; an image is (1, h, w)"
        )
    return extents[0], extents[1], extents[2]


def load_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan as it was given, or read from its file: what is in it now, parsed once.

    Raises:
        PlanError: see `Plan.load`.
        OptionError: neither a plan nor a path.
    """
    from freqopt.plan.plan import Plan
    from freqopt.plan.plan_file import read_plan

    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise OptionError(f"plan must be a Plan or the path of one, not {type(plan).__name__}")
    return _parsed(read_plan(plan), str(Path(plan)))


@functools.lru_cache(maxsize=8)
def _parsed(text: str, origin: str) -> Plan:
    """By content: one path may name other files by and by, within a second and from elsewhere."""
    from freqopt.plan.plan import Plan

    return Plan.parse(text, origin=origin)
