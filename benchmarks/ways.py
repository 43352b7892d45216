"""Public classes in the ways that models are run: `python -m benchmarks.ways` writes ways.json.

Runs tests/support/ways.py on the CPU: each class of the model table compiled whole, by blocks and
without a compiler, as it is, with layerwise casting, group offload, an unmerged adapter and a step
cache. Classes and ways that are named are run anew, and what the file has of others is kept: each
row says of which commit it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, write
from benchmarks.pages import RESULTS, origin, table

SUPPORT = Path(__file__).parents[1] / "tests" / "support"

CONDITIONS = {
    "": "as it is",
    "cast": "casting",
    "offload": "offload",
    "lora": "LoRA",
    "cache": "cache",
}
"""What is done to a model, and the heads of the columns."""

ROUTES = {"whole": "whole", "blocks": "by blocks", "eager": "eager"}
"""How it is served after that: compiled whole or by blocks, or without a compiler."""


def way_of(condition: str, route: str) -> str:
    """Name of a way in the result file."""
    return f"{condition}_{route}".strip("_").removesuffix("_whole")


TITLES = {
    way_of(condition, route): f"{title}, {how}"
    for condition, title in CONDITIONS.items()
    for route, how in ROUTES.items()
}
"""All ways by name."""


def page(result: Mapping[str, Any]) -> list[str]:
    """The table of classes and conditions, and notes on the routes that do not split."""
    notes: dict[str, int] = {}
    rows, classes = [], [row["class"] for row in result["rows"].values()]
    for name, row in result["rows"].items():
        cells = [_cell(row["ways"], condition, notes) for condition in CONDITIONS]
        case = f" ({name})" if classes.count(row["class"]) > 1 else ""
        rows.append([f"`{row['class']}`{case}", *cells])
    lines = [*_origins(result), "", *table(["class", *CONDITIONS.values()], rows), ""]
    return [*lines, *(f"{number}. {_shortened(text)}" for text, number in notes.items())]


def commits(result: Mapping[str, Any]) -> dict[str, int]:
    """The commits that rows were made at, and how many at each."""
    otherwise = result["environment"].get("commit", "unknown")
    return dict(Counter(row.get("commit", otherwise) for row in result["rows"].values()))


def _origins(result: Mapping[str, Any]) -> list[str]:
    """Where the rows were made, a line for each commit where there are several."""
    made, where = commits(result), result["environment"]
    if len(made) == 1:
        return [origin({"environment": {**where, "commit": next(iter(made))}})]
    lines = [f"{where['device']}, torch {where['torch']}, classes by commit:", ""]
    return [*lines, *(f"- {commit}: {count}" for commit, count in made.items())]


def _cell(ways: Mapping[str, str], condition: str, notes: dict[str, int]) -> str:
    """The routes that split everything, and the numbers of the notes on those that do not."""
    outcomes = {
        how: ways.get(way_of(condition, route), "none: not run") for route, how in ROUTES.items()
    }
    split = [how for how, outcome in outcomes.items() if outcome == "split"]
    if len(split) == len(ROUTES):
        return "split"
    if len(set(outcomes.values())) == 1:
        reasons = [next(iter(outcomes.values())).removeprefix("none: ")]
    else:
        reasons = [
            f"{how}: {outcome.removeprefix('none: ').removeprefix('dense: ')}"
            for how, outcome in outcomes.items()
            if outcome != "split"
        ]
    numbers = [notes.setdefault(reason, len(notes) + 1) for reason in reasons]
    return f"{', '.join(split) or '-'} ({', '.join(map(str, numbers))})"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[: text.rindex(" ", 0, 98)] + " ..."


def renewed(old: Mapping[str, Any], new: Mapping[str, str], commit: str) -> dict[str, Any]:
    """A row some ways of which were run anew, with the commits that what it says is of."""
    ways = {**old.get("ways", {}), **new}
    earlier = old.get("commit", commit).split(" and ") if ways.keys() - new.keys() else ()
    return {"commit": " and ".join(dict.fromkeys((*earlier, commit))), "ways": ways}


def plain(outcome: str) -> str:
    """An outcome without paths and line numbers, which are of one machine and version."""
    import re

    return re.sub(r"\(?/?[\w./-]*\.py:\d+:? ?", "(", outcome).replace("((", "(")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the result file; returns how many cells are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases, such as wan or flux (default: all)")
    parser.add_argument("--ways", nargs="*", choices=TITLES, help="default: all")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(SUPPORT))
    from model_cases import load_all
    from ways import WAYS, look, outcome

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("freqopt").propagate = False
    cases, path = load_all(), (given.out or RESULTS) / "ways.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    libraries = {library: version(library) for library in ("diffusers", "transformers")}
    where = {**environment(), "command": "python -m benchmarks.ways"}
    commit, ways = where.pop("commit"), given.ways or list(TITLES)
    for name in given.names or [name for name, case in cases.items() if case.dense]:
        known, old = look(cases[name]), rows.get(name, {})
        new: dict[str, str] = {}
        for way in ways:
            new[way] = plain(outcome(known, WAYS[way]))
            print(f"{name}, {TITLES[way]}: {new[way]}", file=sys.stderr, flush=True)
            rows[name] = {"class": cases[name].name, **renewed(old, new, commit)}
            ordered = {name: rows[name] for name in cases if name in rows}
            result = {"environment": where, "libraries": libraries, "rows": ordered}
            write("ways", result, given.out)
    return sum("WRONG" in what for row in rows.values() for what in row["ways"].values())


if __name__ == "__main__":
    raise SystemExit(main())
