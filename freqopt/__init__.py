"""freqopt: a torch.compile backend that rewrites dense attention into frequency-split attention.

Everything public is loaded on first use, so that `import freqopt` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from freqopt.eager.announced import announce

if TYPE_CHECKING:
    from freqopt.calibration.calibrate import calibrate
    from freqopt.calibration.samples import recording
    from freqopt.calibration.samples_file import load_samples, save_samples
    from freqopt.errors import (
        CalibrationError,
        FileError,
        FreqoptError,
        InputError,
        OptionError,
        PlanError,
        SiteError,
    )
    from freqopt.exporters.manifest import Artifact
    from freqopt.exporters.onnx.export import export_onnx
    from freqopt.exporters.problems import ArtifactError, ExportError, NotAvailableError
    from freqopt.exporters.tensorrt.export import export_tensorrt
    from freqopt.front.handle import Handle
    from freqopt.front.optimize import optimize
    from freqopt.inspection import Inspection, inspect
    from freqopt.kernels.attention import SplitStats, merge_attention, split_attention
    from freqopt.options import Options
    from freqopt.plan.plan import Plan
    from freqopt.plan.plans import Plans
    from freqopt.regional import attach
    from freqopt.reporting.report import report
    from freqopt.telling.counting import Counters, counters, reset_counters

__version__ = "0.2.0"

_HOMES = {
    "Artifact": "exporters.manifest",
    "ArtifactError": "exporters.problems",
    "CalibrationError": "errors",
    "Counters": "telling.counting",
    "ExportError": "exporters.problems",
    "FileError": "errors",
    "FreqoptError": "errors",
    "Handle": "front.handle",
    "InputError": "errors",
    "Inspection": "inspection",
    "NotAvailableError": "exporters.problems",
    "OptionError": "errors",
    "Options": "options",
    "Plan": "plan.plan",
    "PlanError": "errors",
    "Plans": "plan.plans",
    "SiteError": "errors",
    "SplitStats": "kernels.attention",
    "attach": "regional",
    "calibrate": "calibration.calibrate",
    "counters": "telling.counting",
    "export_onnx": "exporters.onnx.export",
    "export_tensorrt": "exporters.tensorrt.export",
    "inspect": "inspection",
    "load_samples": "calibration.samples_file",
    "merge_attention": "kernels.attention",
    "optimize": "front.optimize",
    "recording": "calibration.samples",
    "report": "reporting.report",
    "reset_counters": "telling.counting",
    "save_samples": "calibration.samples_file",
    "split_attention": "kernels.attention",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "CalibrationError",
    "Counters",
    "ExportError",
    "FileError",
    "FreqoptError",
    "Handle",
    "InputError",
    "Inspection",
    "NotAvailableError",
    "OptionError",
    "Options",
    "Plan",
    "PlanError",
    "Plans",
    "SiteError",
    "SplitStats",
    "__version__",
    "attach",
    "calibrate",
    "counters",
    "export_onnx",
    "export_tensorrt",
    "inspect",
    "load_samples",
    "merge_attention",
    "optimize",
    "recording",
    "report",
    "reset_counters",
    "save_samples",
    "split_attention",
]


def __getattr__(name: str) -> Any:
    if name == "parallel":  # a room of its own, whose names are loaded on first use as well
        return importlib.import_module("freqopt.parallel")
    if name not in _HOMES:
        raise AttributeError(f"module 'freqopt' has no attribute {name!r} (public: {__all__})")
    value = getattr(importlib.import_module(f"freqopt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


announce()
