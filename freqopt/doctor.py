"""What works on this machine, and why the rest does not: for people, and for bug reports.

`examine` tries things rather than trusting versions: the op is run against dense attention on every
device that it has an implementation for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import freqopt

State = Literal["ok", "absent", "broken"]

OPTIONAL = {
    "diffusers": "pip install 'freqopt[diffusers]' to compile its models and to run the whole demo",
    "onnx": "pip install 'freqopt[onnx]'",
    "onnxruntime": "pip install 'freqopt[onnx]'",
    "tensorrt": "pip install 'freqopt[tensorrt]'",
}
REQUIRED = (
    "triton",
    "numpy",
    "networkx",
    "platformdirs",
    "pydantic",
    "safetensors",
    "matplotlib",
    "jinja2",
    "rich",
)
OLDEST_CAPABILITY = (8, 0)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Finding:
    """One line of the overview. detail: what was seen and, unless ok, what can be done."""

    group: str
    name: str
    state: State
    detail: str


def environment() -> dict[str, str]:
    """Device, versions and commit, for the head of a result file."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "freqopt": freqopt.__version__,
        "torch": torch.__version__,
        "triton": _version("triton") or "none",
        "diffusers": _version("diffusers") or "none",
        "python": platform.python_version(),
        "commit": _commit(),
    }


def examine() -> list[Finding]:
    """Everything worth knowing about this machine; takes seconds, most of them on a GPU's first."""
    return [
        finding
        for look in (_versions, _devices, _compiler, _op, _backend, _optional)
        for finding in look()
    ]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", f"{platform.python_version()}, {sys.executable}")
    where = Path(freqopt.__file__).parent
    yield Finding("versions", "freqopt", "ok", f"{freqopt.__version__}, {where}")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", built without CUDA"
    yield Finding("versions", "torch", "ok", torch.__version__ + cuda)
    for name in REQUIRED:
        version = _version(name)
        if version:
            yield Finding("versions", name, "ok", version)
        elif name == "triton":
            yield Finding("versions", name, "absent", "no GPU kernels; pip install triton (Linux)")
        else:
            yield Finding("versions", name, "broken", f"missing; pip install {name}")


def _devices() -> Iterator[Finding]:
    threads = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Finding("devices", "cpu", "ok", threads + "; faster than dense at low densities")
    if not torch.cuda.is_available():
        yield Finding("devices", "cuda", "absent", _why_no_cuda())
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        detail = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
        old = capability < OLDEST_CAPABILITY
        yield Finding(
            "devices",
            f"cuda:{index}",
            "broken" if old else "ok",
            detail + ("; older than sm_80, for which there are no kernels" if old else ""),
        )
        yield _attempt("devices", f"launches on cuda:{index}", partial(_launches, index))


def _launches(index: int) -> str:
    from freqopt.kernels.tuned import file_of, read_choices

    device = torch.device("cuda", index)
    tuned = read_choices(device)
    if tuned:
        return f"measured here, in {file_of(device)}: {'; '.join(tuned)}"
    return "as shipped; `freqopt kernels tune` measures them"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install one with it to use an NVIDIA GPU"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver was found"
    return "there is a driver, but PyTorch cannot use it; compare nvidia-smi's CUDA version"


def _compiler() -> Iterator[Finding]:
    found = cpp_compiler()
    if found:
        yield Finding("compilation", "C++ compiler", "ok", found)
    else:
        yield Finding(
            "compilation",
            "C++ compiler",
            "absent",
            "inductor cannot compile for the CPU; install g++, or use the option inner='eager'",
        )


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that inductor would use, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def _op() -> Iterator[Finding]:
    """Split attention at threshold 0 against dense attention, on each device."""
    tries: list[tuple[str, torch.dtype]] = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        tries.append(("cuda", torch.bfloat16))
    for device, dtype in tries:
        yield _attempt("op", f"split_attention on {device}", partial(_try_op, device, dtype))


def _try_op(device: str, dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, 4 * 8 * 8, 64, generator=generator, dtype=torch.float32).to(device, dtype)
        for _ in range(3)
    )
    out = freqopt.split_attention(query, key, value, grid=(4, 8, 8), threshold=0.0)
    assert isinstance(out, torch.Tensor)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float()
    )
    error = float((out.float() - truth).norm() / truth.norm())
    if not error < TOLERANCE[dtype]:
        raise RuntimeError(f"differs from dense attention by {error:.1e} at threshold 0")
    return f"{str(dtype).removeprefix('torch.')}, relative error {error:.1e} at threshold 0"


def _backend() -> Iterator[Finding]:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if not any(point.name == "freqopt" for point in points):
        yield Finding(
            "compilation",
            "backend",
            "broken",
            "backend='freqopt' is not registered: install the package (pip install -e .)",
        )
        return
    yield _attempt("compilation", "backend", _try_backend)


def _try_backend() -> str:
    from torch._dynamo.backends.registry import lookup_backend

    lookup_backend("freqopt")
    return "torch.compile(model, backend='freqopt') is registered"


def _optional() -> Iterator[Finding]:
    for name, advice in OPTIONAL.items():
        version = _version(name)
        yield Finding("optional", name, "ok" if version else "absent", version or advice)
    weights = sorted(Path(freqopt.__file__).parent.glob("models_zoo/weights/*.safetensors"))
    if weights:
        listed = ", ".join(f"{w.name} ({w.stat().st_size / 2**20:.1f} MiB)" for w in weights)
        yield Finding("optional", "zoo weights", "ok", listed)
    else:
        yield Finding(
            "optional", "zoo weights", "absent", "they ship with freqopt: install it again"
        )


def _attempt(group: str, name: str, call: Callable[[], str]) -> Finding:
    try:
        return Finding(group, name, "ok", call())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Finding(group, name, "broken", f"{type(error).__name__}: {lines[0]}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(name), "__version__", "unknown version"))
    except ImportError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit; FREQOPT_COMMIT where the code was copied without its history."""
    if given := os.environ.get("FREQOPT_COMMIT"):
        return given
    root = Path(freqopt.__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            cwd=root,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
