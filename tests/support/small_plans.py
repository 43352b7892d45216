"""A small plan that has everything a plan can have, as calibration writes it."""

from __future__ import annotations

from freqopt.plan.plan import Plan
from freqopt.plan.records import (
    BucketCurves,
    Budget,
    Curve,
    Evidence,
    ModelIdentity,
    SiteEvidence,
    SiteLayout,
    SitePlan,
    Versions,
)


def full_plan() -> Plan:
    """Two heads at one site, two timestep buckets, and evidence for the report."""
    curve = Curve(
        density=[[0.5, 0.4], [0.2, 0.1]],
        error=[[0.1, 0.1], [0.2, 0.3]],
        bias=[[0.0, 0.0], [0.0, 0.0]],
        probe_error=[[0.1, 0.1], [0.2, 0.3]],
    )
    split = SitePlan(
        heads=2,
        head_dim=64,
        tokens=256,
        decision="split",
        reason="",
        budgets=[Budget(threshold=[0.25, 2.0]), Budget(threshold=[0.5, 1.0])],
        chunks=[0, 1024],
        density=[0.1, 0.2],
        error=[0.05, 0.04],
        gains=[[0.5, 0.2], [0.5, 0.3]],
        layouts=[SiteLayout(grid=(4, 8, 8))],
    )
    return Plan(
        model=ModelIdentity(class_name="Tiny", fingerprint="0123"),
        grids=[(4, 8, 8)],
        device="cpu",
        versions=Versions(freqopt="0", torch="2"),
        target_error=0.03,
        measured_error=0.028,
        worst_error=0.029,
        mean_density=0.15,
        timestep_name="t",
        timestep_edges=[0.5],
        sites={"blocks.0.attn": split},
        evidence=Evidence(
            samples=3,
            held_out=1,
            notes=["a note"],
            bucket_samples=[2, 1],
            sites={
                "blocks.0.attn": SiteEvidence(
                    thresholds=[0.1, 1.0],
                    energy=[0.5, 0.5],
                    curve=curve,
                    buckets=[BucketCurves(bucket=0, samples=2, energy=[0.5, 0.5], curve=curve)],
                )
            },
        ),
    )
