"""What a plan is made of: records checked field by field, and what was measured for them.

The backend reads identity and budgets; the evidence is for the report and for people.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from freqopt.config import ALL, SMALLEST_CHUNK

MAX_THRESHOLD = 1e30
"""Largest threshold in a plan: no score comes near it, and float32 holds it."""

MOST_HEADS = 1 << 16
"""Most heads of a site: a plan from a stranger is given budgets for as many as it says."""


Extent = Annotated[int, Field(ge=1, le=1 << 24)]
"""Extent of a grid, in tokens."""

Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of all: fields are checked strictly, unknown ones refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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
            in what steps; an empty name for a constant, which the steps then are. Empty where it
            comes from no sizes.
    """

    grid: tuple[Extent, Extent, Extent]
    before: int = Field(default=0, ge=0)
    after: int = Field(default=0, ge=0)
    mask: int = Field(default=0, ge=0, le=2)
    sources: list[tuple[str, int, int]] = []


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
    budgets: list[Budget] = []
    chunks: list[int] = []
    density: list[float] = []
    error: list[float] = []
    gains: list[list[float]] = []
    marginals: list[list[float]] = []
    layouts: list[SiteLayout] = []

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


class Curve(Record):
    """Error and cost of a ladder of thresholds at one site, by rung and head throughout.

    Attributes:
        density: share of pairs attended exactly.
        error: relative L2 error of the head's output.
        bias: signed part of it along the head's own output.
        probe_error: what the op's probes reported.
    """

    density: list[list[float]]
    error: list[list[float]]
    bias: list[list[float]]
    probe_error: list[list[float]]

    def check(self, rungs: int, heads: int) -> None:
        """Raise ValueError unless all are of so many rungs and heads."""
        _check_rows("a curve", rungs, heads, self.density, self.error, self.bias, self.probe_error)


def _check_rows(what: str, rungs: int, heads: int, *tables: list[list[float]]) -> None:
    for table in tables:
        if len(table) != rungs or any(len(row) != heads for row in table):
            raise ValueError(f"{what} is not of {rungs} thresholds by {heads} heads")


class ContentCurve(Record):
    """What a site's heads do with their tokens ordered by content, by rung and head.

    Attributes:
        chunk: tokens of the chunks.
        density: share of pairs attended exactly.
        error: relative L2 error of the head's output.
    """

    chunk: int
    density: list[list[float]]
    error: list[list[float]]

    def check(self, rungs: int, heads: int) -> None:
        """Raise ValueError unless all are of so many rungs and heads."""
        _check_rows("a curve by content", rungs, heads, self.density, self.error)


class BucketCurves(Record):
    """The curve of one site over the samples of one timestep bucket.

    Attributes:
        bucket: number of the bucket.
        samples: how many told.
        energy: each head's share of the site's output energy in these samples.
        curve: as measured on them.
        content: in orders by content, where these were considered.
    """

    bucket: Count
    samples: Count
    energy: list[float]
    curve: Curve
    content: list[ContentCurve] = []


class Spectrum(Record):
    """Power of the keys over the token lattice, per head, as shares that sum to 1 over the bins.

    Attributes:
        edges: upper edges of the radial bins, in cycles per token.
        power: by head and bin.
        cutoff: frequency up to which means of 64 tokens carry power, in cycles per token.
        low: share of the power that they can carry, by head.
    """

    edges: list[float] = Field(min_length=1)
    power: list[list[float]]
    cutoff: float
    low: list[float] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Spectrum:
        if any(len(row) != len(self.edges) for row in self.power):
            raise ValueError("a spectrum's power is not of one value per bin")
        return self


class SiteEvidence(Record):
    """Measurements of one site.

    Attributes:
        thresholds: the ladder, ascending.
        energy: each head's share of the site's output energy, over all samples.
        curve: over all samples, tokens ordered by the grid.
        buckets: the same for each timestep bucket that has samples; empty if there is only one.
        spectrum: of the keys, where it was taken.
        times_ms: of one call, dense and split at the plan's budgets, where costs were measured.
        content: over all samples in orders by content, where these were considered.
        key_heads: which query heads share, and with them an order.
    """

    thresholds: list[float]
    energy: list[float]
    curve: Curve
    buckets: list[BucketCurves] = []
    spectrum: Spectrum | None = None
    times_ms: tuple[float, float] | None = None
    content: list[ContentCurve] = []
    key_heads: int | None = Field(default=None, ge=1)

    def check(self, heads: int, buckets: int) -> None:
        """Raise ValueError unless all of it is of so many heads and timestep buckets."""
        ladder = self.thresholds
        if not ladder or ladder[0] <= 0 or any(a >= b for a, b in pairwise(ladder)):
            raise ValueError("evidence's thresholds are not positive and ascending")
        parts: list[SiteEvidence | BucketCurves] = [self, *self.buckets]
        for part in parts:
            if len(part.energy) != heads or len(part.content) != len(self.content):
                raise ValueError(f"evidence's energy or orders are not of {heads} heads")
            curves: list[Curve | ContentCurve] = [part.curve, *part.content]
            for curve in curves:
                curve.check(len(ladder), heads)
        numbers = [each.bucket for each in self.buckets]
        if len(set(numbers)) != len(numbers) or any(n >= buckets for n in numbers):
            raise ValueError(f"evidence's buckets are not among the plan's {buckets}")
        if self.key_heads is not None and heads % self.key_heads:
            raise ValueError(f"{self.key_heads} key heads do not go with {heads} heads")


class SiteTiming(Record):
    """Times of attention of one shape on the device of the calibration, in ms for all heads.

    Attributes:
        base_ms: of the line ms = base_ms + density_ms * density through the points.
        density_ms: its slope.
        points: (mean density, ms) of split attention as timed.
        heads: number of query heads.
        tokens: length.
        head_dim: channels of a head.
        dense_ms: `scaled_dot_product_attention`.
        orders: (chunk, ms) of making an order by content for all heads, where that was considered.
    """

    base_ms: float = Field(ge=0)
    density_ms: float = Field(ge=0)
    points: list[tuple[float, float]]
    heads: int = Field(ge=1, le=MOST_HEADS)
    tokens: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dense_ms: float = Field(ge=0)
    orders: list[tuple[int, float]] = []


class Trial(Record):
    """One verification: the model run with candidate budgets on held-out samples.

    Attributes:
        multiplier: Lagrange multiplier that the budgets were allocated with.
        predicted_error: what allocation expected.
        measured_error: root mean square over the samples.
        worst_error: of the worst sample.
        mean_density: share of pairs attended exactly.
        sample_errors: one by one.
    """

    multiplier: float
    predicted_error: float
    measured_error: float
    worst_error: float
    mean_density: float
    sample_errors: list[float]


class Verified(Record):
    """What the model did with the plan on the held-out samples.

    Attributes:
        sample_errors: relative L2 error of the output, by sample.
        spread: their standard deviation.
        quantile_error: what the share `Plan.target_quantile` of the samples stays within.
        dtype: of the model's parameters.
        model_ms: ms of a whole run of the model, dense and split, where there is a clock; it was
            not compiled outside of attention.
    """

    sample_errors: list[float]
    spread: float = Field(ge=0)
    quantile_error: float | None = None
    dtype: str
    model_ms: tuple[float, float] | None = None


class Evidence(Record):
    """Why the plan is what it is; read by the report, not by the backend.

    Attributes:
        samples: fitted samples.
        held_out: samples held out for verification.
        notes: what was odd, or is otherwise than one may think.
        rounding_error: output error with every pair attended exactly by the op: a floor for all
            plans.
        bucket_samples: fitted samples in each timestep bucket.
        timings: what the cost model was made from, one entry for each shape of attention; empty
            where costs were counted in multiply-adds, as on a CPU.
        trials: verifications, in their order.
        dense_sites: attention that cannot be split at all, with the reason.
        sites: what was measured at each site.
    """

    samples: Count
    held_out: Count
    notes: list[str] = []
    rounding_error: float | None = None
    bucket_samples: list[Count] = []
    timings: list[SiteTiming] = []
    trials: list[Trial] = []
    dense_sites: dict[str, str] = {}
    sites: dict[str, SiteEvidence] = {}
