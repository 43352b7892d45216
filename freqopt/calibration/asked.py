"""What a calibration is asked for, checked and made plain numbers before anything runs.

A mistake here must not cost what was measured: all of it is found before the first run.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from freqopt.calibration.whole import CLOCKS
from freqopt.errors import OptionError
from freqopt.files import check_path, check_writable, real_path
from freqopt.options import extents_of
from freqopt.plan.folder import check_place

DEFAULT_ERROR = 0.03
"""The target where none is given."""

TARGETS = ("target_error", "target_psnr", "target_density")

SEEDS = (-(2**63), 2**64 - 1)
"""Least and largest seed of PyTorch's generators."""

WHOLE = {"timestep_buckets": 1, "rounds": 0, "passes": 1}
"""Options that are whole numbers, and the least of each."""


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `freqopt.calibrate` as plain numbers; without a target, DEFAULT_ERROR is one.

    Raises:
        OptionError: one that is out of range or of another kind, or two that exclude each other.
        FileError: the output or the checkpoint cannot be written.
    """
    found = {**options, **_targets(options)}
    for name, least in WHOLE.items():
        if found.get(name) is not None:
            found[name] = _whole(name, found[name])
            if found[name] < least:
                raise OptionError(f"{name} {found[name]} must be {least} or more")
    if found.get("seed") is not None:
        found["seed"] = _whole("seed", found["seed"])
        if not SEEDS[0] <= found["seed"] <= SEEDS[1]:
            raise OptionError(
                f"seed {found['seed']} is outside -2**63 to 2**64 - 1, which PyTorch takes"
            )
    for name, known in (("order", ("auto", "grid")), ("clock", tuple(CLOCKS))):
        if name in found and found[name] not in known:
            raise OptionError(f"{name} {found[name]!r} is none; supported: {', '.join(known)}")
    if found.get("grid") is not None:
        found["grid"] = extents_of(found["grid"])
    if not isinstance(found.get("timestep"), (str, type(None))):
        raise OptionError(f"timestep {found['timestep']!r} must be the name of an argument")
    _check_files(found.get("output"), found.get("checkpoint"))
    return found


def check_apart(
    output: str | os.PathLike[str] | None, checkpoints: Iterable[str | os.PathLike[str] | None]
) -> None:
    """Refuse a checkpoint that would take the place of the plan, and be removed with it.

    Raises:
        OptionError: they are one file.
    """
    for path in checkpoints:
        if path is not None and output is not None and real_path(path) == real_path(output):
            raise OptionError(
                f"output and checkpoint are both {os.fspath(output)!r}: the checkpoint is removed "
                "when the plan is written; give it a name of its own"
            )


def _targets(options: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in (*TARGETS, "quantile"):
        given = options.get(name)
        found[name] = None if given is None else number_of(name, given)
    error, psnr, density = (found[name] for name in TARGETS)
    given = [name for name in TARGETS if found[name] is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} were both given; pass one of them")
    if not given:
        error = found["target_error"] = DEFAULT_ERROR
    if error is not None and not 0.0 < error < 1.0:
        raise OptionError(
            f"target_error {error} is outside (0, 1): it is the relative L2 error of the "
            "model's output; 0.01 is very close, 0.03 the default, 0.1 visible"
        )
    if psnr is not None and not 5.0 <= psnr <= 100.0:
        raise OptionError(
            f"target_psnr {psnr} is outside 5 to 100 dB; 30 is similar, 40 very close"
        )
    if density is not None and not 0.0 < density <= 1.0:
        raise OptionError(
            f"target_density {density} is outside (0, 1]: it is the share of pairs to "
            "attend exactly; 0.1 is typical for long sequences"
        )
    quantile = found["quantile"]
    if quantile is None:
        return found
    if error is None:
        raise OptionError(
            "quantile is the share of inputs that target_error is for, and of no other"
        )
    if not 0.0 < quantile < 1.0:
        raise OptionError(
            f"quantile {quantile} is outside (0, 1): it is the share of inputs that the error is "
            "held for, such as 0.9"
        )
    return found


def number_of(name: str, given: Any) -> float:
    """A number of any library as a float.

    Raises:
        OptionError: it is none.
    """
    if not isinstance(given, (bool, str, bytes)):
        try:
            return float(given)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise OptionError(f"{name} {given!r} must be a number")


def _whole(name: str, given: Any) -> int:
    if not isinstance(given, (bool, str, bytes)):
        try:
            return operator.index(given)
        except (TypeError, RuntimeError):
            pass
    raise OptionError(f"{name} {given!r} must be a whole number")


def _check_files(output: Any, checkpoint: Any) -> None:
    for name, path in (("output", output), ("checkpoint", checkpoint)):
        if path is not None:
            check_path(path, name)
    check_apart(output, [checkpoint])
    if output is not None:
        check_place(output)
    if checkpoint is not None:
        check_writable(checkpoint)
