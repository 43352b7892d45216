"""What was measured for a plan: curves, spectra, times, trials, and what was verified.

For the report and for people; the backend reads none of it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from freqopt.plan.record import MOST_HEADS, Count, Record


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
    content: list[ContentCurve] = Field(default=[])


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
    buckets: list[BucketCurves] = Field(default=[])
    spectrum: Spectrum | None = None
    times_ms: tuple[float, float] | None = None
    content: list[ContentCurve] = Field(default=[])
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
    orders: list[tuple[int, float]] = Field(default=[])


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


class Comparison(Record):
    """A way to choose budgets, run on the fitted samples near the target, as all others were.

    Attributes:
        name: of the way; "one threshold for all" is always among them.
        taken: whether the plan was searched along it.
        predicted_error: what allocation expected, of the model's output.
        measured_error: what it was judged by, as measured: of the model's output, its root mean
            square or quantile over these samples, or of what the pipeline generates.
        mean_density: share of pairs attended exactly, as measured.
        cost: of attention at these densities, over that of dense attention.
    """

    name: str
    taken: bool
    predicted_error: float
    measured_error: float = Field(ge=0)
    mean_density: float = Field(ge=0)
    cost: float = Field(ge=0)


ModelClock = Literal["eager", "compiled", "graphs"]
"""How a model ran when it was timed: compiled nowhere but at attention, by torch.compile, or in
CUDA graphs too."""


class Verified(Record):
    """What the model did with the plan on the held-out samples.

    Attributes:
        sample_errors: relative L2 error of the output, by sample.
        sample_timesteps: timestep of each, in the units of `Plan.timestep_name`; empty where they
            have none.
        spread: standard deviation of the errors.
        quantile_error: what the share `Plan.target_quantile` of the samples stays within.
        dtype: of the model's parameters.
        adapters: names of the adapters that were active in the model, or merged into it while they
            were still there to be seen; None where nobody looked.
        model_ms: ms of a whole run of the model, dense and split, where there is a clock.
        model_clock: how it ran then; None where it was not timed, or the plan does not say.
    """

    sample_errors: list[float]
    sample_timesteps: list[float] = Field(default=[])
    spread: float = Field(ge=0)
    quantile_error: float | None = None
    dtype: str
    adapters: list[str] | None = None
    model_ms: tuple[float, float] | None = None
    model_clock: ModelClock | None = None

    @model_validator(mode="after")
    def _check(self) -> Verified:
        if self.sample_timesteps and len(self.sample_timesteps) != len(self.sample_errors):
            raise ValueError("sample_timesteps is not one timestep for each sample")
        return self


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
        compared: ways to choose budgets that were run on the same samples, the cheapest first.
        dense_sites: attention that cannot be split at all, with the reason.
        sites: what was measured at each site.
    """

    samples: Count
    held_out: Count
    notes: list[str] = Field(default=[])
    rounding_error: float | None = None
    bucket_samples: list[Count] = Field(default=[])
    timings: list[SiteTiming] = Field(default=[])
    trials: list[Trial] = Field(default=[])
    compared: list[Comparison] = Field(default=[])
    dense_sites: dict[str, str] = Field(default={})
    sites: dict[str, SiteEvidence] = Field(default={})
