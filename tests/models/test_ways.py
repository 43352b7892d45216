"""Classes of the model table in every way they are run: split as without, exact at threshold 0.

What becomes of each class in each way is in benchmarks/results/ways.json, which docs/works-with.md
shows: it must be what happens here. The default run takes a few of each way, `slow` all.
"""

from __future__ import annotations

import functools

import pytest
from model_cases import load_all
from ways import WAYS, Class, look, outcome

from benchmarks.pages import RESULTS, load
from benchmarks.ways import TITLES, commits, page, plain, renewed

pytest.importorskip("diffusers")

ROWS = load("ways")["rows"] if (RESULTS / "ways.json").exists() else {}
OFTEN = [
    ("wan", "cast_blocks"),
    ("wan", "offload"),
    ("wan", "cache_blocks"),
    ("cogvideox", "lora_blocks"),
    ("hunyuan", "offload_blocks"),
    ("flux", "blocks"),
    ("ernie", "blocks"),
    ("mochi", "cast_eager"),
    ("ltx", "offload_eager"),
    ("ltx", "blocks"),
    ("mochi", "lora"),
    ("ltx", "cast"),
    ("videomae_eager", "cast_eager"),
]
"""Class and way, in the default run."""


@functools.cache
def known(name: str) -> Class:
    return look(load_all()[name])


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name, way in OFTEN if way in ROWS.get(name, {"ways": ()})["ways"]],
)
def test_some_classes_are_as_the_table_says(name: str, way: str) -> None:
    assert plain(outcome(known(name), WAYS[way])) == ROWS[name]["ways"][way]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_class_is_as_the_table_says(name: str) -> None:
    expected = ROWS[name]["ways"]
    assert {way: plain(outcome(known(name), WAYS[way])) for way in expected} == expected


def test_nothing_is_wrong_and_whole_classes_are_split() -> None:
    outcomes = [what for row in ROWS.values() for what in row["ways"].values()]
    assert not [what for what in outcomes if "WRONG" in what or "NO REASON" in what]
    assert set(TITLES) == set(WAYS)
    assert len({name for name, _ in OFTEN}) >= 8 or len(ROWS) < 8


def test_the_page_gives_every_reason() -> None:
    ways = {
        **{"whole": "split", "blocks": "dense: no list", "eager": "split"},
        **dict.fromkeys(("cast", "cast_blocks", "cast_eager"), "split"),
        **dict.fromkeys(("lora", "lora_blocks", "lora_eager"), "none: no layers"),
        **{"cache": "1 of 2 split: odd", "cache_blocks": "none: no list", "cache_eager": "split"},
    }
    result = {
        "environment": {"device": "cpu", "torch": "2", "commit": "x"},
        "rows": {"a": {"class": "A", "ways": ways}},
    }
    text = "\n".join(page(result))
    assert "| `A` | whole, eager (1) | split | - (2) | - (3) | eager (4, 1) |" in text
    for note in (
        "1. by blocks: no list",
        "2. not run",
        "3. no layers",
        "4. whole: 1 of 2 split: odd",
    ):
        assert note in text


def test_a_row_says_of_which_commits_it_is() -> None:
    old = {"class": "A", "commit": "one", "ways": {"whole": "split", "blocks": "dense: x"}}
    part = renewed(old, {"blocks": "split"}, "two")
    assert part == {"commit": "one and two", "ways": {"whole": "split", "blocks": "split"}}
    assert renewed(part, part["ways"], "three") == {"commit": "three", "ways": part["ways"]}
    assert renewed({}, {"whole": "split"}, "two") == {"commit": "two", "ways": {"whole": "split"}}
    rows = {"a": old, "b": {"class": "B", **part}, "c": old}
    where = {"device": "cpu", "torch": "2"}
    assert commits({"environment": where, "rows": rows}) == {"one": 2, "one and two": 1}
    lines = page({"environment": where, "rows": rows})
    assert lines[:4] == ["cpu, torch 2, classes by commit:", "", "- one: 2", "- one and two: 1"]
    assert page({"environment": where, "rows": {"a": old}})[0] == "cpu, torch 2, commit one."
