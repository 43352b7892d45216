"""Plans for the components of a pipeline, from whatever they were given as."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from freqopt.errors import OptionError, PlanError
from freqopt.front.components import ALONE
from freqopt.plan.folder import check_component
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans, read_plans

Given = Plan | Plans | Mapping[str, Any] | str | os.PathLike[str]


def plans_for(names: Iterable[str], given: Given) -> dict[str, Plan]:
    """A plan for each component, each checked to be its own.

    given: a plan for a single component; plans by component, as `Plans` or a dict; the path of a
    file of either; a folder that `save_pretrained` wrote, or a repository of the Hugging Face Hub.

    Raises:
        PlanError: none for a component, one of another component, or one that cannot be read.
        OptionError: something else was given.
    """
    wanted = list(names)
    held = _held(given)
    if isinstance(held, Plan):
        if len(wanted) > 1:
            raise PlanError(
                f"one plan was given for {', '.join(wanted)}: each needs a plan of its own; pass "
                "freqopt.Plans, a dict by these names, or components=[one of them]"
            )
        held = {wanted[0]: held}
    if len(wanted) == 1 and len(held) == 1 and ALONE in (wanted[0], *held):
        held = {wanted[0]: next(iter(held.values()))}
    missing = [name for name in wanted if name not in held]
    if missing:
        raise PlanError(
            f"there is no plan for {', '.join(missing)} (there are plans for {', '.join(held)}): "
            "calibrate it, or leave it out with components=[...]"
        )
    for name in wanted:
        check_component(held[name], name, f"the plan given for {name}")
    return {name: held[name] for name in wanted}


def _held(given: Given) -> Plan | dict[str, Plan]:
    if isinstance(given, Plan):
        return given
    if isinstance(given, Mapping):
        plans = {str(name): _held(plan) for name, plan in given.items()}
        wrong = [name for name, plan in plans.items() if not isinstance(plan, Plan)]
        if wrong:
            raise OptionError(f"plan[{wrong[0]!r}] must be one plan, or the path of one")
        return {name: plan for name, plan in plans.items() if isinstance(plan, Plan)}
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(
            f"plan must be a Plan, Plans, a dict of plans or a path, not {type(given).__name__}"
        )
    found = read_plans(given)
    return found if isinstance(found, Plan) else dict(found)
