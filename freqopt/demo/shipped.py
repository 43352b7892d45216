"""The plan that ships for the demo on a CPU, where calibrating would take longer than the demo.

It is a plan like any other: `make demo ARGS="--calibrate"` writes one like it, and the demo
measures its error on the video's own steps before it says anything about it.
"""

from __future__ import annotations

from pathlib import Path

from freqopt.models_zoo.video_dit import VideoDiT
from freqopt.plan.plan import Plan

SHIPPED = Path(__file__).parent / "video_dit_plan.json"


def shipped_plan(model: VideoDiT) -> Plan:
    """The plan, if it is for this model.

    Raises:
        PlanError: it is not there, damaged, or for another model.
    """
    plan = Plan.load(SHIPPED)
    plan.check_model(model)
    return plan
