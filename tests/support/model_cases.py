"""Real models from public libraries, small and with random weights, and what should be found.

Each function builds a model and inputs whose tokens lie on a grid; its decorator says how many
attentions are dense over them, of which kind, and where the text is. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from refilled import refilled
from torch import Tensor, nn

Grid = tuple[int, int, int]
Made = tuple[nn.Module, dict[str, Any]]

TEXT = 7
"""Text tokens in the inputs of all cases."""

VARIANTS: tuple[tuple[Grid, int], ...] = (
    ((3, 6, 10), 1),
    ((5, 7, 9), 2),
    ((1, 14, 22), 2),
    ((3, 6, 10), 2),
    ((5, 7, 9), 1),
)
"""Grids and batches, spread over the cases in turn."""

IMAGES: tuple[Grid, ...] = ((1, 14, 22), (1, 15, 21), (1, 18, 10))
"""Grids of images; much smaller ones have too few blocks to split."""


LINE: tuple[Grid, ...] = ((1, 1, 300), (1, 1, 240))
"""Grids of audio and text."""

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Sizes that most classes of transformers have."""


@dataclass(frozen=True)
class Case:
    """A class and what its graph shows.

    make: builds the model and its inputs for a grid and a batch. dense: attentions that can be
    split. kind, before, after: of each of these, text in tokens; or `each` says so one by one.
    others: attentions that must be left alone. source: "graph" if the grid is read there, "given"
    if it has to be, "" if there is nothing to split. order: of the grid's axes in memory. image:
    the grid is (1, h, w). frames: further ones on the same grid, from other inputs. fullgraph: the
    model is compiled so. tolerance: of the output. grids, batches: those to try, instead of
    `VARIANTS`. note: what is special, for docs/results/models.md.
    """

    name: str
    library: str
    make: Callable[[Grid, int], Made]
    dense: int
    others: int = 0
    kind: str = "self"
    before: int = 0
    after: int = 0
    each: tuple[tuple[str, int, int], ...] = ()
    source: str = "graph"
    order: tuple[int, int, int] = (0, 1, 2)
    image: bool = False
    frames: int = 0
    fullgraph: bool = False
    tolerance: float = 1e-4
    grids: tuple[Grid, ...] = ()
    batches: tuple[int, ...] = ()
    note: str = ""

    def sites(self) -> tuple[tuple[str, int, int], ...]:
        """Kind and text before and after of each attention that can be split."""
        return self.each or ((self.kind, self.before, self.after),) * self.dense

    def variant(self, index: int) -> tuple[Grid, int]:
        """The grid and the batch that this case is tried on."""
        grid, batch = VARIANTS[index % len(VARIANTS)]
        grids = self.grids or (IMAGES if self.image else ())
        if grids:
            grid = grids[index % len(grids)]
        return grid, self.batches[index % len(self.batches)] if self.batches else batch


CASES: dict[str, Case] = {}


def case(name: str, library: str = "diffusers", **expected: Any) -> Callable[..., Any]:
    """Register what a function makes, under its name, as an instance of a class."""

    def register(make: Callable[[Grid, int], Made]) -> Callable[[Grid, int], Made]:
        assert make.__name__ not in CASES, f"{make.__name__} is a case already"
        CASES[make.__name__] = Case(name, library, make, **expected)
        return make

    return register


encoder_case = functools.partial(case, library="transformers")
"""As `case`, for what `encoder` builds."""


def build(name: str, library: str = "diffusers", /, **config: Any) -> nn.Module:
    """A model of diffusers with random weights, in evaluation mode."""
    return refilled(lambda: getattr(pytest.importorskip(library), name)(**config))


def inner(name: str, /, **config: Any) -> nn.Module:
    """As `build`, of a model that diffusers has, but does not list among its own."""
    models = pytest.importorskip("diffusers.models")
    return refilled(lambda: getattr(models, name)(**config))


def encoder(name: str, config: str, /, **values: Any) -> nn.Module:
    """A model of transformers with random weights, in evaluation mode."""
    library = pytest.importorskip("transformers")
    return build(name, "transformers", config=getattr(library, config)(**values))


def latents(grid: Grid, batch: int, channels: int = 4, patch: Grid = (1, 2, 2)) -> Tensor:
    """(B, C, T, H, W) that make tokens on `grid`."""
    extents = (g * p for g, p in zip(grid, patch, strict=True))
    return torch.randn(batch, channels, *extents)


def image(grid: Grid, batch: int, channels: int = 4, patch: int = 2) -> Tensor:
    """(B, C, H, W) that make tokens on (1, h, w)."""
    return torch.randn(batch, channels, grid[1] * patch, grid[2] * patch)


def text(batch: int, width: int = 16, length: int = TEXT) -> Tensor:
    """(B, L, width) of text embeddings."""
    return torch.randn(batch, length, width)


def steps(batch: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """(B) time steps."""
    return torch.full((batch,), 500, dtype=dtype)


def positions(grid: Grid) -> Tensor:
    """(N, 3) places of the tokens on the grid, as pipelines pass them."""
    axes = [torch.arange(float(extent)) for extent in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


FAMILIES = ("wan", "video", "packed", "image", "unet", "audio", "vision", "language")
"""What the models are; the cases of each are in a module of its own, `model_cases_<family>.py`."""


def load_all() -> dict[str, Case]:
    """All cases by name, those of the other modules too."""
    for family in FAMILIES:
        importlib.import_module(f"model_cases_{family}")
    return CASES


def cases_of(family: str) -> list[str]:
    """Names of the cases of one module."""
    module = f"model_cases_{family}"
    return [key for key, case in load_all().items() if case.make.__module__ == module]
