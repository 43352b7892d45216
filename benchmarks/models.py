"""What is found in real models' graphs: `python -m benchmarks.models` writes results/models.json.

Runs the cases of tests/support/model_cases_*.py on the CPU: small configurations with random
weights, each compiled once with every site split at threshold 0 and compared with dense attention.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import environment, write
from freqopt.passes.reasons import Reason, Why

if TYPE_CHECKING:
    from model_cases import Case
    from model_checks import Seen

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
COLUMNS = ("class", "split", "kind", "text", "grid", "grid from", "rest", "notes")


def row(case: Case, grid: tuple[int, int, int], seen: Seen, wrong: list[str]) -> list[str]:
    """One row of the table, in the order of COLUMNS."""
    dense = [site for site in seen.used if site.eligible]
    kinds = " / ".join(dict.fromkeys(site.kind for site in dense)) or "-"
    sides = []
    for side in ("before", "after"):
        counts = [getattr(site, f"text_{side}") for site in dense]
        if any(not isinstance(count, int) or count > 0 for count in counts):
            sides.append(side)
    extents = " x ".join(str(extent) for extent in dense[0].grid or ()) if dense else "-"
    source = {"graph": "graph", "given": "`grid=`", "": "-"}[case.source]
    rest = Counter(brief(site.why) for site in seen.used if not site.eligible)
    why = "; ".join(f"{count} {reason}" for reason, count in rest.items()) or "-"
    notes = "; ".join([*([case.note] if case.note else []), *(f"WRONG: {item}" for item in wrong)])
    found = f"{len(dense)} of {len(seen.used)}"
    place = " and ".join(sides) or ("-" if not dense else "none")
    return [f"`{case.name}`", found, kinds, place, extents, source, why, notes]


BRIEF = {
    Reason.CROSS: "cross",
    Reason.OTHER_KEYS: "partly cross",
    Reason.SLICES: "within slices of the video",
    Reason.CAUSAL: "causal",
    Reason.MASK_PAIRS: "mask differs between queries",
    Reason.MASK_ADDED: "mask is added to the scores",
    Reason.SEVERAL_GRIDS: "several grids in one sequence",
    Reason.NO_GRID: "no grid (text or audio)",
    Reason.GRID_MISFIT: "other length than the grid given (text or audio)",
    Reason.NO_AXES: "tokens cannot be followed",
    Reason.LOST: "tokens cannot be followed",
    Reason.SCORES_CHANGED: "scores altered before the softmax",
    Reason.READY_MADE: "tokens cannot be followed after a break",
    Reason.MASK_UNPROVEN: "mask may hide video tokens",
    Reason.FLEX_BLOCKS: "FlexAttention with a block mask",
}


def brief(why: Why) -> str:
    """A reason in a few words."""
    return BRIEF.get(why.reason, str(why))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)]


def main(arguments: list[str] | None = None) -> int:
    """Write the result file; returns how many models do not behave as expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="cases, such as wan or flux (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(SUPPORT))
    from model_cases import load_all
    from model_checks import look, problems

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases, failed = load_all(), 0
    rows: list[list[str]] = []
    for index, (name, case) in enumerate(cases.items()):
        if given.names and name not in given.names:
            continue
        grid, batch = case.variant(index)
        seen = look(case, grid, batch)
        wrong = problems(case, grid, seen)
        failed += bool(wrong)
        rows.append(row(case, grid, seen, wrong))
        print(f"{name}: {'; '.join(wrong) or 'ok'}", file=sys.stderr)
    if given.names:
        print("\n".join(table(rows)))
        return failed
    libraries = {name: version(name) for name in ("diffusers", "transformers")}
    write("models", {"environment": environment(), "libraries": libraries, "rows": rows}, given.out)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
