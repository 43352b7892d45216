"""What a plan is made of: records checked field by field, and what was measured for them.

The backend reads identity and budgets; the evidence is for the report and for people.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_THRESHOLD = 1e30
"""Largest threshold in a plan: no score comes near it, and float32 holds it."""

MOST_HEADS = 1 << 16
"""Most heads of a site: a plan from a stranger is given budgets for as many as it says."""


class Record(BaseModel):
    """Base of all: fields are checked strictly, unknown ones refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelIdentity(Record):
    """Which model a plan belongs to: class name and `model_fingerprint`."""

    class_name: str
    fingerprint: str


class Versions(Record):
    """Library versions the plan was calibrated with."""

    freqopt: str
    torch: str
    triton: str | None = None


class Budget(Record):
    """Budgets of one site in one timestep bucket, one entry per head.

    threshold: routing scores at or above it are attended exactly; 0 is dense. mid: whether pairs
    just below the threshold are served from means of 8 tokens, which no calibration chooses.
    """

    threshold: list[float]
    mid: list[bool]

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if len(self.threshold) != len(self.mid):
            raise ValueError("threshold and mid must have one entry per head")
        if any(not 0 <= value <= MAX_THRESHOLD for value in self.threshold):
            raise ValueError("a threshold is negative or too large")
        return self


class SitePlan(Record):
    """What the plan says about one site.

    budgets: one `Budget` per timestep bucket (empty if the site stays dense). density, error: per
    head, as measured, over all timesteps: share of pairs attended exactly, relative L2 error of the
    head's output. gains: [bucket][head], relative error of the model's output over that of the
    site which caused it. marginals: [bucket][head], change of the output's squared error with that
    of the head, all others split too, over what it would be with that error alone; below 0 where
    the head undoes errors of others. Empty where they decided nothing.
    """

    heads: int = Field(ge=1, le=MOST_HEADS)
    head_dim: int = Field(ge=1)
    tokens: int = Field(ge=1)
    decision: Literal["split", "dense"]
    reason: str
    budgets: list[Budget] = []
    density: list[float] = []
    error: list[float] = []
    gains: list[list[float]] = []
    marginals: list[list[float]] = []

    @model_validator(mode="after")
    def _check(self) -> SitePlan:
        if (self.decision == "split") != bool(self.budgets):
            raise ValueError("a split site needs budgets and a dense site has none")
        rows = [budget.threshold for budget in self.budgets]
        rows += [self.density, self.error, *self.gains, *self.marginals]
        if any(row and len(row) != self.heads for row in rows):
            raise ValueError(f"a list does not have one entry for each of the {self.heads} heads")
        return self


class Curve(Record):
    """Error and cost of a ladder of thresholds at one site, [rung][head] throughout.

    density: share of pairs attended exactly. error: relative L2 error of the head's output. bias:
    signed part of it along the head's own output. probe_error: what the op's probes reported.
    """

    density: list[list[float]]
    error: list[list[float]]
    bias: list[list[float]]
    probe_error: list[list[float]]


class BucketCurves(Record):
    """The curve of one site over the samples of one timestep bucket.

    energy: each head's share of the site's output energy in these samples.
    """

    bucket: int
    samples: int
    energy: list[float]
    curve: Curve


class Spectrum(Record):
    """Power of the keys over the token lattice, per head, as shares that sum to 1 over the bins.

    edges: upper edges of the radial bins, in cycles per token. low: share of the power that means
    of 64 tokens can carry, [head]; cutoff: up to which frequency, in cycles per token.
    """

    edges: list[float]
    power: list[list[float]]
    cutoff: float
    low: list[float]


class SiteEvidence(Record):
    """Measurements of one site.

    energy, curve: over all samples; energy is each head's share of the site's output energy.
    buckets: the same for each timestep bucket that has samples, empty if there is only one.
    times_ms: of one call, dense and split at the plan's budgets, where costs were measured.
    """

    thresholds: list[float]
    energy: list[float]
    curve: Curve
    buckets: list[BucketCurves] = []
    spectrum: Spectrum | None = None
    times_ms: tuple[float, float] | None = None


class SiteTiming(Record):
    """Times of attention of one shape on the device of the calibration, in ms for all heads.

    points: (mean density, ms) of split attention as timed. base_ms, density_ms: the line through
    them, ms = base_ms + density_ms * density. dense_ms: `scaled_dot_product_attention`.
    """

    base_ms: float = Field(ge=0)
    density_ms: float = Field(ge=0)
    points: list[tuple[float, float]]
    heads: int = Field(ge=1, le=MOST_HEADS)
    tokens: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dense_ms: float = Field(ge=0)


class Trial(Record):
    """One verification: the model run with candidate budgets on held-out samples."""

    multiplier: float
    predicted_error: float
    measured_error: float
    worst_error: float
    mean_density: float
    sample_errors: list[float]


class Evidence(Record):
    """Why the plan is what it is; read by the report, not by the backend.

    timings: what the cost model was made from, one entry for each shape of attention; empty where
    costs were counted in multiply-adds, as on a CPU.
    bucket_samples: fitted samples in each timestep bucket. dense_sites: attention that cannot be
    split at all, with the reason. rounding_error: output error with every pair attended exactly by
    the op: a floor for all plans.
    """

    samples: int
    held_out: int
    notes: list[str] = []
    rounding_error: float | None = None
    bucket_samples: list[int] = []
    timings: list[SiteTiming] = []
    trials: list[Trial] = []
    dense_sites: dict[str, str] = {}
    sites: dict[str, SiteEvidence] = {}
