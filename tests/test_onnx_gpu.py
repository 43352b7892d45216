"""The library under onnxruntime's CUDA provider: right, ours, and as fast as in PyTorch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attention_cases import relative

from freqopt.exporters.cubins import compile_table, write_sources
from freqopt.exporters.ort_library import build_library
from freqopt.grid import token_order
from freqopt.kernels.variant import Variant

pytestmark = pytest.mark.gpu
GRID, HEADS, DIM = (13, 30, 52), 24, 128


def cuda_session(library: str | None, folder: Path) -> Any:
    from onnx_cases import split_model

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    model = split_model(
        20, torch.float16, takes_order=True, scale=DIM**-0.5, density=0.0, mid_band=0, probes=64
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CUDAExecutionProvider"]
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    return session


def bind(session: Any, tensors: dict[str, torch.Tensor], out: torch.Tensor) -> Any:
    kinds = {torch.float16: 10, torch.float32: 1, torch.bool: 9, torch.int64: 7}
    binding = session.io_binding()
    for name, x in tensors.items():
        kind = x.device.type
        binding.bind_input(name, kind, 0, kinds[x.dtype], tuple(x.shape), x.data_ptr())
    binding.bind_output("out", "cuda", 0, 10, tuple(out.shape), out.data_ptr())
    return binding


def best(run: Any, repeats: int = 20) -> float:
    """Milliseconds of the fastest of some runs, each waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def test_library_under_the_cuda_provider(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    variant = Variant(major * 10 + minor, "float16", DIM, False, False)
    sources = write_sources(compile_table([variant], tmp_path), tmp_path)
    library = build_library(tmp_path, extra_sources=tuple(sources), defines=("FREQOPT_CUDA",))
    tokens = GRID[0] * GRID[1] * GRID[2]
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, tokens, DIM, device="cuda", generator=generator).half()
        for _ in range(3)
    )
    budget = torch.full((2, HEADS), 1.0, device="cuda")
    tensors = {
        "query": query, "key": key, "value": value, "budget": budget,
        "key_mask": torch.ones(1, 1, dtype=torch.bool, device="cuda"),
        "order": token_order(GRID, query.device).long(),
        "text_before": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip

    def in_torch() -> torch.Tensor:
        out: torch.Tensor = torch.ops.freqopt.split_attention(
            query, key, value, budget, None, list(GRID), 0, 0, DIM**-0.5, 0.0, False, 64
        )[0]
        return out

    expected = in_torch()
    times = {"PyTorch op": best(in_torch)}
    for name, path in (("library", str(library)), ("function body", None)):
        out = torch.full_like(expected.contiguous(), torch.nan)
        session = cuda_session(path, tmp_path)
        binding = bind(session, tensors, out)
        run = lambda s=session, b=binding: s.run_with_iobinding(b)  # noqa: E731
        run()
        torch.cuda.synchronize()
        assert relative(out, expected) < 1e-2, name
        times[name] = best(run, 20 if path else 3)
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = {
            event["args"].get("provider")
            for event in events
            if event.get("args", {}).get("op_name") == "SplitAttention"
        }
        assert ran == ({"CUDAExecutionProvider"} if path else set())
    print({name: f"{ms:.3f} ms" for name, ms in times.items()})
    assert times["library"] < 1.05 * times["PyTorch op"] + 0.1
    assert times["library"] < times["function body"] / 3
