"""The place of `save_samples` and `load_samples` before they became public as `freqopt.*`.

Users' scripts name it; it goes in version 0.3.
"""

from __future__ import annotations

from freqopt.calibration.samples_file import load_samples, save_samples

__all__ = ["load_samples", "save_samples"]
