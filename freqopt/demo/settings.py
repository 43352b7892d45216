"""What the demo runs, with defaults that suit the device, and the model it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freqopt.demo.shipped import SHIPPED
from freqopt.errors import InputError, OptionError
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig, load_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What the demo runs. frames, height, width in pixels; see `default_settings`.

    density: mean density to calibrate to instead of `target_error` (relative L2 of the model's
    output). samples: model inputs to calibrate on. repeats: timed runs; the fastest counts. inner,
    mode: how both models are compiled, as torch.compile's backend and mode. calibrate: whether a
    plan is made here; else the one that ships is checked.
    """

    device: str
    dtype: str
    frames: int
    height: int
    width: int
    steps: int
    target_error: float
    density: float | None
    seed: int
    samples: int
    repeats: int
    inner: str
    mode: str | None
    out: Path
    calibrate: bool
    random_weights: bool = False
    progress: bool = True


def default_settings(device: str | None = None, **given: Any) -> Settings:
    """Settings for a device ("cuda" where there is one), with what is `given` and not None instead.

    On a GPU 21 x 30 x 52 = 32,760 tokens and 25 steps in bfloat16, calibrated there. On a CPU 10 x
    18 x 26 = 4,680 tokens and 8 steps, uncompiled ("eager"), with the plan that ships: calibrating
    takes many runs of the model. It is made anew where something says what to calibrate to, and
    where none ships.

    Raises:
        OptionError: CUDA where there is none, a dtype or size that the model cannot work on.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError("there is no CUDA device here; `freqopt doctor` says why. Use the cpu")
    defaults: dict[str, Any] = {
        "device": device,
        "target_error": 0.03,
        "density": None,
        "seed": 0,
        "out": Path("demo"),
    }
    if kind == "cuda":
        defaults |= {
            "dtype": "bfloat16",
            "frames": 21,
            "height": 120,
            "width": 208,
            "steps": 25,
            "samples": 8,
            "repeats": 3,
            # With two heads a layer every step is short, and launching takes longer than running:
            # both models are replayed as CUDA graphs.
            "inner": "inductor",
            "mode": "reduce-overhead",
        }
    else:
        defaults |= {
            "dtype": "float32",
            "frames": 10,
            "height": 72,
            "width": 104,
            "steps": 8,
            "samples": 4,
            "repeats": 1,
            "inner": "eager",
            "mode": None,
        }
    given = {k: v for k, v in given.items() if v is not None}
    told = {"target_error", "density", "samples"} & given.keys()
    made = kind == "cuda" or bool(told) or given.get("random_weights", False)
    defaults["calibrate"] = made or not SHIPPED.exists()
    if given.get("inner", defaults["inner"]) != "inductor":
        defaults["mode"] = None
    settings = Settings(**defaults | given)
    if told and not settings.calibrate:
        raise OptionError(
            f"{', '.join(sorted(told))}: said for a calibration, and none was asked for; leave out "
            "either"
        )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.dtype not in DTYPES:
        raise OptionError(f"dtype {settings.dtype!r}; supported: {', '.join(DTYPES)}")
    for name in ("frames", "height", "width", "steps", "samples", "repeats"):
        if getattr(settings, name) < 1:
            raise OptionError(f"{name} {getattr(settings, name)} must be 1 or more")
    _, patch_height, patch_width = VideoDiTConfig().patch
    if settings.height % patch_height or settings.width % patch_width:
        raise OptionError(
            f"a video of {settings.height} x {settings.width} pixels; height must be a multiple of "
            f"{patch_height} and width of {patch_width}"
        )
    if settings.random_weights and not settings.calibrate:
        raise OptionError(
            "the plan that ships is for the trained weights; leave out --random-weights, or "
            "calibrate"
        )
    if settings.density is not None and not 0 < settings.density <= 1:
        raise OptionError(f"density {settings.density} is outside (0, 1]; 0.1 is typical")


def load_model(settings: Settings) -> VideoDiT:
    """The trained model, or with `random_weights` one that only has its shape."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    if not settings.random_weights:
        try:
            return load_pretrained(device=device, dtype=dtype)
        except FileNotFoundError as error:
            raise InputError(f"{error}; or try the commands out with --random-weights") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VideoDiT(
            VideoDiTConfig(width=64, layers=2, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
        )
        # A head of zeros would hide every difference.
        nn.init.normal_(model.head.weight, std=0.1)
    return model.to(device=device, dtype=dtype).eval()
