"""Public classes in the ways that models are run: `python -m benchmarks.ways` writes ways.json.

Runs tests/support/ways.py on the CPU: each class of the model table whole and by blocks, as it is,
with layerwise casting, group offload, an unmerged adapter and a step cache. Classes and ways that
are named are run anew, and what the file has of others is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, write
from benchmarks.pages import RESULTS, origin, table

SUPPORT = Path(__file__).parents[1] / "tests" / "support"

TITLES = {
    "whole": "whole",
    "blocks": "by blocks",
    "cast": "casting",
    "cast_blocks": "casting, by blocks",
    "offload": "offload",
    "offload_blocks": "offload, by blocks",
    "lora": "LoRA",
    "lora_blocks": "LoRA, by blocks",
    "cache": "cache",
    "cache_blocks": "cache, by blocks",
}
"""Ways by name, and the heads of their columns."""


def page(result: Mapping[str, Any]) -> list[str]:
    """The table of classes and ways, and notes on the cells that are not split."""
    notes: dict[str, int] = {}
    rows = []
    for row in result["rows"].values():
        cells = [_cell(row["ways"].get(way, "none: not run"), notes) for way in TITLES]
        rows.append([f"`{row['class']}`", *cells])
    lines = [origin(dict(result)), "", *table(["class", *TITLES.values()], rows), ""]
    return [*lines, *(f"{number}. {_shortened(text)}" for text, number in notes.items())]


def _cell(outcome: str, notes: dict[str, int]) -> str:
    if outcome == "split":
        return outcome
    word, _, why = outcome.partition(": ")
    number = notes.setdefault(why, len(notes) + 1)
    return f"{'-' if word == 'none' else word} ({number})"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[: text.rindex(" ", 0, 98)] + " ..."


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
    cases, before = load_all(), (given.out or RESULTS) / "ways.json"
    rows: dict[str, Any] = json.loads(before.read_text())["rows"] if before.exists() else {}
    libraries = {library: version(library) for library in ("diffusers", "transformers")}
    for name in given.names or [name for name, case in cases.items() if case.dense]:
        known = look(cases[name])
        found = rows.setdefault(name, {"class": cases[name].name, "ways": {}})["ways"]
        for way in given.ways or TITLES:
            found[way] = plain(outcome(known, WAYS[way]))
            print(f"{name}, {TITLES[way]}: {found[way]}", file=sys.stderr, flush=True)
            ordered = {name: rows[name] for name in cases if name in rows}
            result = {"environment": environment(), "libraries": libraries, "rows": ordered}
            write("ways", result, given.out)
    return sum("WRONG" in what for row in rows.values() for what in row["ways"].values())


if __name__ == "__main__":
    raise SystemExit(main())
