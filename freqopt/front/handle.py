"""What `freqopt.optimize` gives back: it tells what runs, saves the plans, and undoes all of it."""

from __future__ import annotations

import html
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from freqopt import regional
from freqopt.capture.modules import OwnOnly, base_name, unwrapped_module
from freqopt.errors import OptionError
from freqopt.front.copies import forget_copied
from freqopt.front.range import Ranges
from freqopt.front.state import Choice
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans
from freqopt.plan.text import scope_of
from freqopt.telling.attached import attached_to
from freqopt.telling.copies import OPTIMIZED, STRICT, is_copy
from freqopt.telling.outside import differences

if TYPE_CHECKING:
    from freqopt.front.routes import Way


def make_free(models: Mapping[str, nn.Module]) -> None:
    """Refuse models that are optimized already; take off copies what they have of an original.

    Raises:
        OptionError: one is.
    """
    for name, model in models.items():
        if is_copy(model):
            forget_copied(model)
        elif OPTIMIZED in model.__dict__:
            raise OptionError(
                f"{name} is optimized already: call disable() of the handle that was returned "
                f"(the model's {OPTIMIZED}.held is the same), then optimize again"
            )


def check_unattached(models: Mapping[str, nn.Module]) -> None:
    """Refuse models that have budgets already, before new ones are calibrated for hours.

    Raises:
        OptionError: one has.
    """
    for name, model in models.items():
        if attached_to(model) is not None:
            raise OptionError(
                f"{name} has budgets already: call remove() of what freqopt.attach returned "
                f"(model.{regional.HANDLE} is the same), then optimize"
            )


@dataclass(frozen=True)
class Component:
    """One model of a pipeline on its route.

    Attributes:
        name: what the pipeline calls it.
        model: the module.
        plan: its plan.
        choice: the route, and why that one.
        strict: whether a planned attention that is not split is an error.
    """

    name: str
    model: nn.Module
    plan: Plan
    choice: Choice
    way: Way
    strict: bool = False

    @property
    def planned(self) -> list[str]:
        """Sites that the plan splits."""
        return [name for name, site in self.plan.sites.items() if site.decision == "split"]

    def row(self) -> tuple[str, ...]:
        """Cells of the table that a handle prints: split, density, error so far, route."""
        measured, densities = self.way.measured(), self.way.densities()
        # Where budgets are by the module, further calls of one are counted with its first.
        of_module = set(measured) if self.choice.route != "compile" else set()
        met = [name for name in self.planned if name in measured or base_name(name) in of_module]
        split = f"{len(met)} of {len(self.planned)}"
        known = [densities[name] for name in self.planned if name in densities]
        density = f"{sum(known) / len(known):.1%}" if known else f"{self.plan.mean_density:.1%} *"
        errors = [m.mean for m in measured.values() if m.mean is not None]
        worst = [m.worst for m in measured.values() if m.worst is not None]
        error = "not called yet"
        if errors:
            error = (
                f"{(sum(e * e for e in errors) / len(errors)) ** 0.5:.3g} (worst {max(worst):.3g})"
            )
        return self.name, split, density, error, self.choice.route

    def notes(self) -> list[str]:
        """What else is to be said of it."""
        plan = self.plan
        asked = "predicted, not verified" if plan.predicted else "verified"
        notes = [
            f"{self.name}: {self.choice.route}, as {self.choice.why}",
            f"{self.name}: output error {plan.measured_error:.3g} {asked}, {scope_of(plan)}",
        ]
        dense = len(plan.sites) - len(self.planned) + len(plan.evidence.dense_sites)
        if dense:
            notes.append(f"{self.name}: {dense} other sites stay dense; print(plan) says why")
        notes += [
            f"{self.name}: {each.words}, which was not verified; plan.verify(model, samples) "
            "measures it"
            for each in differences(self.model, plan, ())
        ]
        return notes


class Handle:
    """An optimized pipeline or model; made by `freqopt.optimize`.

    Use it as a context manager to undo everything at the end of a ``with`` block, the outermost one
    of those that are in each other.

    Attributes:
        components: the models, by what the pipeline calls them.

    holder: the pipeline, of which no reference is kept.
    """

    def __init__(self, components: Sequence[Component], holder: Any = None) -> None:
        self.components: Mapping[str, Component] = {each.name: each for each in components}
        self._enabled = False
        self._blocks = 0
        self._holder = _weakly(holder)
        by_hand = [each for each in components if each.choice.route != "compile"]
        self._ranges = Ranges(
            {each.name: each.model for each in by_hand}, {each.name: each.plan for each in by_hand}
        )

    @property
    def plans(self) -> Plans:
        """The plan of each component."""
        return Plans({name: each.plan for name, each in self.components.items()})

    @property
    def enabled(self) -> bool:
        """Whether the attention is replaced right now."""
        return self._enabled

    def enable(self) -> Handle:
        """Replace the attention, again after `disable`; nothing if it is replaced.

        Raises:
            OptionError: a model was optimized anew in the meantime.
            PlanError: `freqopt.attach` was called for one. In both cases nothing is changed.
        """
        if not self._enabled:
            make_free({name: each.model for name, each in self.components.items()})
            with ExitStack() as undo:
                for each in self.components.values():
                    each.way.start()
                    undo.callback(each.way.stop)
                undo.pop_all()
            self._ranges.start()
            for each in self.components.values():
                each.model.__dict__[OPTIMIZED] = OwnOnly(self)
                each.model.__dict__[STRICT] = each.strict
            self._enabled = True
        return self

    def disable(self) -> None:
        """Leave every model exactly as it was; once is enough."""
        if self._enabled:
            self._ranges.stop()
            for each in self.components.values():
                each.model.__dict__.pop(OPTIMIZED, None)
                each.model.__dict__.pop(STRICT, None)
                each.way.stop()
        self._enabled = False

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plans into a folder, see `Plans.save_pretrained`; returns the folder."""
        self.plans.save_pretrained(folder)
        return Path(folder)

    def report(self, path: str | os.PathLike[str] = "report.html") -> list[Path]:
        """Write a page about each plan, as `freqopt.report`; returns the files.

        Of several components, each page has the component's name behind that of the file.
        """
        from freqopt.reporting.report import report_each

        return report_each(self.plans, path)

    def __enter__(self) -> Handle:
        self.enable()
        self._blocks += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._blocks = max(self._blocks - 1, 0)
        if not self._blocks:
            self.disable()

    def __repr__(self) -> str:
        parts = ", ".join(f"{n}: {each.choice.route}" for n, each in self.components.items())
        return f"Handle({parts}{'' if self._enabled else '; disabled'})"

    def __str__(self) -> str:
        head = ("component", "split", "density", "probe error", "route")
        rows = [head, *(each.row() for each in self.components.values())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if any("*" in row[2] for row in rows[1:]):
            lines.append("* as calibrated; it is measured at run time on the route eager only")
        lines += [note for each in self.components.values() for note in each.notes()]
        lines += self._replaced()
        return "\n".join(lines if self._enabled else ["disabled: attention is dense", *lines])

    def _replaced(self) -> list[str]:
        """What is to be said of components that the pipeline has no more."""
        holder = self._holder()
        return [
            f"{name}: the pipeline has another module by this name now, which is dense: call "
            "freqopt.optimize again, with this handle's plans"
            for name, each in self.components.items()
            if isinstance(found := getattr(holder, name, None), nn.Module)
            and unwrapped_module(found) is not each.model
        ]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _weakly(holder: Any) -> Callable[[], Any]:
    """A pipeline as long as there is one; a module is none, and has its own."""
    if holder is None or isinstance(holder, (nn.Module, Mapping)):
        return lambda: None
    try:
        return weakref.ref(holder)
    except TypeError:
        return lambda: None
