"""What a plan is made of: records checked field by field, and what was measured for them.

The backend reads identity and budgets; the evidence is for the report and for people.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from freqopt.config import ALL, SMALLEST_CHUNK
from freqopt.plan.measured import (
    BucketCurves,
    Comparison,
    ContentCurve,
    Curve,
    Evidence,
    SiteEvidence,
    SiteTiming,
    Spectrum,
    Trial,
    Verified,
)
from freqopt.plan.record import MOST_HEADS, Count, Extent, Record

__all__ = [
    "MAX_THRESHOLD",
    "MOST_HEADS",
    "BucketCurves",
    "Budget",
    "Comparison",
    "ContentCurve",
    "Count",
    "Curve",
    "Evidence",
    "Extent",
    "ModelIdentity",
    "Record",
    "SiteEvidence",
    "SiteLayout",
    "SitePlan",
    "SiteTiming",
    "Spectrum",
    "Trial",
    "Verified",
    "Versions",
]

MAX_THRESHOLD = 1e30
"""Largest threshold in a plan: no score comes near it, and float32 holds it."""


class ModelIdentity(Record):
    """Which model a plan belongs to.

    Attributes:
        class_name: of the model's class.
        fingerprint: `model_fingerprint` of the model.
    """

    class_name: str
    fingerprint: str


class Versions(Record):
    """Library versions the plan was calibrated with.

    Attributes:
        freqopt: of this package.
        torch: of PyTorch.
        triton: of Triton, where it was installed.
    """

    freqopt: str
    torch: str
    triton: str | None = None


class Budget(Record):
    """Budgets of one site in one timestep bucket, one entry per head.

    Attributes:
        threshold: routing scores at or above it are attended exactly; 0 is dense.
    """

    threshold: list[float]

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if any(not 0 <= value <= MAX_THRESHOLD for value in self.threshold):
            raise ValueError("a threshold is negative or too large")
        return self


class SiteLayout(Record):
    """How the tokens of a site lay when it was calibrated, see `freqopt.passes.site.Known`.

    Attributes:
        grid: extents of the video tokens.
        before: tokens of text before them.
        after: tokens of text after them.
        mask: 0 none, 1 a mask over keys, 2 one over pairs; proven to hide text only.
        sources: for t, h and w the model's argument whose size it comes from, which dimension, and
            in what steps: dimension -1 where the argument is an int itself, an empty name for a
            constant, which the steps then are. Empty where it comes from neither.
    """

    grid: tuple[Extent, Extent, Extent]
    before: int = Field(default=0, ge=0)
    after: int = Field(default=0, ge=0)
    mask: int = Field(default=0, ge=0, le=2)
    sources: list[tuple[str, int, int]] = Field(default=[])


class SitePlan(Record):
    """What the plan says about one site.

    Attributes:
        heads: number of query heads.
        head_dim: channels of a head.
        tokens: length that it was calibrated at.
        decision: "split" or "dense".
        reason: why.
        budgets: one `Budget` per timestep bucket; empty if the site stays dense.
        chunks: tokens of each key head's chunks, a power of two, where tokens are ordered by
            content; 0 where by the grid. Empty if all are by the grid.
        density: share of pairs attended exactly, per head, as measured over all timesteps.
        error: relative L2 error of the head's output, per head, likewise.
        gains: by bucket and head: relative error of the model's output over that of the site which
            caused it.
        marginals: by bucket and head: change of the output's squared error with that of the head,
            all others split too, over what it would be with that error alone; below 0 where the
            head undoes errors of others. Empty where they decided nothing.
        layouts: how its tokens lay, one for each layout in the samples.
    """

    heads: int = Field(ge=1, le=MOST_HEADS)
    head_dim: int = Field(ge=1, le=1 << 20)
    tokens: int = Field(ge=1, le=1 << 48)
    decision: Literal["split", "dense"]
    reason: str
    budgets: list[Budget] = Field(default=[])
    chunks: list[int] = Field(default=[])
    density: list[float] = Field(default=[])
    error: list[float] = Field(default=[])
    gains: list[list[float]] = Field(default=[])
    marginals: list[list[float]] = Field(default=[])
    layouts: list[SiteLayout] = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> SitePlan:
        if (self.decision == "split") != bool(self.budgets):
            raise ValueError("a split site needs budgets and a dense site has none")
        rows = [self.density, self.error, *self.gains, *self.marginals]
        if any(row and len(row) != self.heads for row in rows) or any(
            len(budget.threshold) != self.heads for budget in self.budgets
        ):
            raise ValueError(f"a list does not have one entry for each of the {self.heads} heads")
        if self.chunks and self.heads % len(self.chunks):
            raise ValueError(f"{len(self.chunks)} chunks do not go with {self.heads} heads")
        if any(c and (c < SMALLEST_CHUNK or c & (c - 1) or c > ALL) for c in self.chunks):
            raise ValueError(f"a chunk is no power of two from {SMALLEST_CHUNK} to {ALL}")
        return self
