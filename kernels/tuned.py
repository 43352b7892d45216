"""Launch choices measured on this machine, kept on disk; `freqopt kernels tune` writes them.

One JSON file for each kind of GPU: choices by dtype, head dim and bucket of lengths. They are of
one version of the kernels and of Triton; others' are ignored, and a log line says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

from freqopt.files import cache_folder, locked, read_bounded, write_atomically
from freqopt.kernels.device import shared_memory
from freqopt.kernels.tiles import Launch, launch_for

logger = logging.getLogger(__name__)

BUCKETS = (8_192, 32_768, 131_072, 524_288)
"""Lengths up to which a measured choice serves, in tokens; what is longer has a bucket too."""

ALLOWED = {
    "rows": (16, 32, 64, 128),
    "wide": (1, 2),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4, 5),
    "first_stages": (1, 2, 3),
    "score_tiles": (2, 4, 8, 16),
    "score_blocks": (32, 64, 128),
    "score_wide": (32, 64, 128),
    "score_warps": (4, 8),
    "score_stages": (1, 2, 3, 4),
    "probe_rows": (16, 32, 64),
    "fit_rows": (16, 32, 64),
    "fit_columns": (32, 64),
}
"""Values that a choice may have. The precision is not among them: it changes results."""

MOST_BYTES = 2**20
"""Of a file of choices, which has a hundred bytes for each."""

SOURCES = tuple(
    f"{part}.py"
    for part in (
        "portable/prepare",
        "portable/score",
        "portable/glue",
        "portable/attend",
        "portable/ridge",
        "split_launches",
        "forward/probe",
        "forward/split",
    )
)


def bucket_of(tokens: int) -> str:
    """Name of the bucket that a length falls into."""
    for limit in BUCKETS:
        if tokens <= limit:
            return f"up to {limit}"
    return f"over {BUCKETS[-1]}"


def choice_name(dtype: torch.dtype, head_dim: int, bucket: str) -> str:
    """Under which a choice is kept."""
    return f"{str(dtype).removeprefix('torch.')}, head dim {head_dim}, {bucket} tokens"


def made_for(device: torch.device) -> dict[str, str]:
    """What a file's choices hold for: GPU, Triton and the kernels' own text."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    text = b"".join((Path(__file__).parent / source).read_bytes() for source in SOURCES)
    return {
        "device": name,
        "triton": triton.__version__,
        "kernels": hashlib.sha256(text).hexdigest()[:16],
    }


def file_of(device: torch.device) -> Path:
    """The file of this kind of GPU; it need not exist."""
    slug = re.sub(r"[^a-z0-9]+", "-", made_for(device)["device"].lower()).strip("-")
    return cache_folder() / f"launches-{slug}.json"


def read_choices(device: torch.device) -> dict[str, dict[str, int]]:
    """Choices kept for this GPU, its kernels and its Triton.

    A file that cannot be used is ignored with a warning: launches then are the shipped ones.
    """
    path: Path | str = "the file of measured launches"
    try:
        path = file_of(device)
        held = json.loads(read_bounded(path, MOST_BYTES))
        choices = {name: checked(fields) for name, fields in held["choices"].items()}
        owner, here = held["made_for"], made_for(device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning(
            "%s cannot be used (%s); launches are the shipped ones. Delete it, or run "
            "`freqopt kernels tune` again",
            path,
            error,
        )
        return {}
    if owner != here:
        logger.warning(
            "%s was measured for %s and this is %s; launches are the shipped ones. Run "
            "`freqopt kernels tune` again",
            path,
            str(owner)[:200],
            here,
        )
        return {}
    return choices


def checked(fields: Any) -> dict[str, int]:
    """Fields of a choice, if a launch has them and their values.

    Raises:
        ValueError: it has not; 4.0 is not 4.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"a choice is {type(fields).__name__}, not fields with values")
    for name, value in fields.items():
        if name not in ALLOWED or type(value) is not int or value not in ALLOWED[name]:
            raise ValueError(f"{name} is {value!r}; allowed: {ALLOWED.get(name, 'no such field')}")
    return dict(fields)


def keep_choice(
    device: torch.device, dtype: torch.dtype, head_dim: int, bucket: str, fields: dict[str, int]
) -> Path:
    """Add fields of a choice to this GPU's file, and use them from here on.

    Raises:
        ValueError: a field or a value that no launch has.
        FileError: the file cannot be written.
    """
    fields = checked(fields)
    path = file_of(device)
    with locked(path):  # another process may be adding its own
        choices = read_choices(device)
        name = choice_name(dtype, head_dim, bucket)
        choices[name] = {**choices.get(name, {}), **fields}
        content = {"made_for": made_for(device), "choices": choices}
        write_atomically(path, json.dumps(content, indent=1))
    _launch_of.cache_clear()
    return path


def launch_on(device: torch.device | str, dtype: torch.dtype, head_dim: int, tokens: int) -> Launch:
    """Tile choices of one call: the shipped ones with those measured on this machine in place."""
    return _launch_of(torch.device(device), dtype, head_dim, bucket_of(tokens))


@functools.lru_cache(maxsize=256)
def _launch_of(device: torch.device, dtype: torch.dtype, head_dim: int, bucket: str) -> Launch:
    shipped = launch_for(dtype, head_dim, shared_memory(device))
    if device.type != "cuda":
        return shipped
    return shipped.changed(read_choices(device).get(choice_name(dtype, head_dim, bucket), {}))
