"""Names of modules and how those of two models match; what is running, by Python's stack."""

from __future__ import annotations

import pieces_models as models
import pytest
from torch import nn

from freqopt.capture.modules import (
    blocks_around,
    match_names,
    module_of_site,
    modules_of,
    names_of,
    running,
)
from freqopt.passes.naming import plain_path, readable_path


class Asking(nn.Module):
    def forward(self) -> list[nn.Module]:
        return list(running())


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> list[nn.Module]:
        found: list[nn.Module] = self.inner()
        return found


@pytest.mark.parametrize(
    ("names", "planned", "expected"),
    [
        (["blocks.0.attn"], ["blocks.0.attn", "blocks.1.attn"], {"blocks.0.attn": "blocks.0.attn"}),
        (
            ["a.blocks.0.attn", "a.blocks.1.attn"],
            ["blocks.0.attn", "blocks.1.attn"],
            {"a.blocks.0.attn": "blocks.0.attn", "a.blocks.1.attn": "blocks.1.attn"},
        ),
        (["blocks.0.attn"], ["model.blocks.0.attn"], {"blocks.0.attn": "model.blocks.0.attn"}),
        (["blocks.0.wrapped.attn"], ["blocks.0.attn"], {"blocks.0.wrapped.attn": "blocks.0.attn"}),
        (["one.blocks.0.attn", "two.blocks.0.attn"], ["blocks.0.attn"], {}),
        (["blocks.10.attn"], ["blocks.0.attn", "0.attn"], {}),
        (["blocks.0.attn2"], ["blocks.0.attn"], {}),
        (["a.b.attn#1"], ["b.attn", "b.attn#1"], {"a.b.attn#1": "b.attn#1"}),
        (["attn", "attn@1"], ["attn"], {"attn": "attn", "attn@1": "attn"}),
        (["attn", "attn@1"], ["attn", "attn@1"], {"attn": "attn", "attn@1": "attn@1"}),
    ],
)
def test_names_match_where_that_is_unique(
    names: list[str], planned: list[str], expected: dict[str, str]
) -> None:
    assert match_names(names, planned) == expected


def test_an_attention_inside_a_wrapper_of_its_own_has_the_wrappers_name() -> None:
    names, planned = ["blocks.0.attn.inner", "blocks.0.attn.cross"], ["blocks.0.attn"]
    assert match_names(names, planned) == {}
    assert match_names(names, planned, []) == {}, "which of the two is not said"
    found = match_names(names, planned, ["blocks.0.attn.cross"])
    assert found == {"blocks.0.attn.inner": "blocks.0.attn"}
    assert match_names(["attn.a#1"], ["attn", "attn#1"], []) == {"attn.a#1": "attn#1"}


def test_a_site_is_an_attention_of_a_module() -> None:
    assert module_of_site("blocks.3.attn") == ("blocks.3.attn", 0)
    assert module_of_site("blocks.3.attn#2@1") == ("blocks.3.attn", 2)
    assert module_of_site("model#1") == ("", 1)


def test_wrappers_and_processors_are_no_part_of_a_name() -> None:
    assert plain_path("_orig_mod.blocks.0._checkpoint_wrapped_module.attn.processor") == (
        "blocks.0.attn"
    )
    assert readable_path("L['self'].fn_ref.original_forward.__self__.attn1") == "attn1"
    model = nn.Sequential(Asking())
    wrapped = Around(model)
    assert names_of(wrapped)[id(model[0])] == "inner.0"
    assert modules_of(wrapped)["inner.0"] is model[0]


def test_the_innermost_running_module_comes_first() -> None:
    inner = Asking()
    outer = Around(inner)
    assert outer() == [inner, outer]
    outer.compile(backend="eager")
    assert outer() == [inner, outer], "a module that is compiled runs itself"
    assert list(running()) == []


def test_all_blocks_that_hold_a_module_are_found_by_its_one_name() -> None:
    model = models.make()
    model.blocks[1].attn = model.blocks[0].attn
    blocks = model.blocks
    del model.blocks
    model.first, model.blocks = blocks[2], blocks  # blocks.2 is called "first" now
    names = ["blocks.0.attn", "first.attn"]
    assert blocks_around(model, names) == ("blocks.0", "blocks.1", "first")
