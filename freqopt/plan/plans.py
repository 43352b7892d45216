"""Plans of several models that work together, in one file: the experts of a pipeline by name."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from freqopt.errors import PlanError
from freqopt.files import write_atomically
from freqopt.plan.densities import densities_of
from freqopt.plan.folder import fetched, pushed, read_folder, write_folder
from freqopt.plan.plan import Plan
from freqopt.plan.plan_file import SEVERAL, read_plan
from freqopt.plan.text import describe_all


class Plans(Mapping[str, Plan]):
    """A plan for each of several models, by name: ``plans["transformer"]`` is a `Plan`."""

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._plans = dict(plans)

    def __getitem__(self, name: str) -> Plan:
        """The plan of one model.

        Raises:
            KeyError: there is none of that name.
        """
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def __repr__(self) -> str:
        return f"Plans({', '.join(f'{name}: {plan!r}' for name, plan in self._plans.items())})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        return describe_all(self._plans)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all plans into one JSON file, which replaces one only when it is complete."""
        plans = ",\n".join(f"{json.dumps(n)}: {plan.text()}" for n, plan in self._plans.items())
        head = f'"format": {json.dumps(SEVERAL)}, "version": 1'
        write_atomically(path, f'{{{head}, "plans": {{\n{plans}\n}}}}\n')

    def to_densities(self) -> dict[str, Any]:
        """As `Plan.to_densities`, of all models in one document."""
        return densities_of(self)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write each plan into a folder, beside a README.md with the figures.

        Raises:
            PlanError: a plan is another component's.
        """
        write_folder(self, folder)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None
    ) -> Plans:
        """Read all plans of a folder, or of a repository "owner/name" of the Hugging Face Hub.

        Raises:
            PlanError: there are none, or one is damaged or another component's.
        """
        return cls(read_folder(fetched(source, revision), Plan.load))

    def push_to_hub(
        self, repository: str, *, private: bool = False, message: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes as a repository "owner/name" of the Hub.

        Returns:
            The address of the commit.

        Raises:
            PlanError: huggingface_hub is not installed.
        """
        return pushed(self, repository, private=private, message=message)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plans:
        """Read plans written by `save`; each is checked as `Plan.load` does.

        Raises:
            PlanError: no such file, one that is damaged, or one that holds no plans by name.
        """
        source = Path(path)
        try:
            content = json.loads(read_plan(source))
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not complete JSON ({error}); copy it anew") from error
        if not isinstance(content, dict) or content.get("format") != SEVERAL:
            raise PlanError(
                f"{source} does not hold plans of several models (format {SEVERAL!r}); a file of "
                "one plan is read by Plan.load"
            )
        plans = content.get("plans")
        if content.get("version") != 1 or not isinstance(plans, dict):
            raise PlanError(f"{source} is of another version, or damaged; calibrate again")
        return cls(
            {n: Plan.parse(json.dumps(p), origin=f"{source}: {n}") for n, p in plans.items()}
        )


def read_plans(source: str | os.PathLike[str]) -> Plan | Plans:
    """What there is: a file of one plan or of several, a folder of plans, or one of the Hub.

    Raises:
        PlanError: none can be read there.
    """
    path = Path(source)
    if os.path.isfile(path):  # Path.is_file raises for some names
        several = f'"{SEVERAL}"' in read_plan(path)[:200]
        return Plans.load(path) if several else Plan.load(path)
    return Plan.load(path) if path.suffix == ".json" else Plans.from_pretrained(source)
