"""Time the exported operator inside ONNX Runtime's CUDA provider against the op in PyTorch.

    python -m benchmarks.export prepare FOLDER [--capability 90]  (needs onnx and g++, no GPU)
    python -m benchmarks.export measure FOLDER [--out FOLDER]     (needs onnxruntime-gpu and a GPU)

One file, run with the library and with its function body; outputs are compared with the PyTorch op
before any time is reported, and onnxruntime's profile must show where the node ran.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import freqopt.kernels.op  # noqa: F401  registers the operator
from benchmarks.common import environment, milliseconds, write
from freqopt.exporters.ort_library import LIBRARY_NAME, build_library
from freqopt.grid import token_order
from freqopt.kernels.variant import Variant

GRID, HEADS, DIM, PROBES = (13, 30, 52), 24, 128, 64
THRESHOLD = 1.0
TOLERANCE = 1e-2  # relative L2, half precision
KINDS = {torch.float16: 10, torch.float32: 1, torch.bool: 9, torch.int64: 7}


def prepare(folder: Path, capability: int) -> None:
    """Write split.onnx, one node with its body, and the library with kernels for one GPU."""
    import onnx
    from onnx import TensorProto, helper

    from freqopt.exporters.cubins import compile_table, write_sources
    from freqopt.exporters.onnx_body import DOMAIN, INPUTS, OP_NAME, split_function

    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, list[Any]]] = {
        **{name: (TensorProto.FLOAT16, [None] * 4) for name in INPUTS[:3]},
        "budget": (TensorProto.FLOAT, [2, None]), "key_mask": (TensorProto.BOOL, [None, None]),
        "order": (TensorProto.INT64, [None]), "text_before": (TensorProto.INT64, [1]),
    }  # fmt: skip
    node = helper.make_node(
        OP_NAME, list(INPUTS), ["out"], domain=DOMAIN,
        scale=DIM**-0.5, density=0.0, mid_band=0, probes=PROBES,
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(n, *shapes[n]) for n in INPUTS]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT16, [None] * 4)
    model = helper.make_model(
        helper.make_graph([node], "split", inputs, [out]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
        functions=[split_function(20, ("out",))],
        ir_version=10,
    )
    onnx.save(model, folder / "split.onnx")
    with tempfile.TemporaryDirectory() as scratch:
        table = compile_table([Variant(capability, "float16", DIM, False, False)], Path(scratch))
        sources = tuple(write_sources(table, Path(scratch)))
        build_library(folder, extra_sources=sources, defines=("FREQOPT_CUDA",))


def measure(folder: Path) -> dict[str, Any]:
    """Milliseconds of the op in PyTorch, in the library and in the body; raises if one is wrong."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, HEADS, tokens, DIM)
    query, key, value = (
        torch.randn(shape, device="cuda", generator=generator).half() for _ in range(3)
    )
    budget = torch.full((2, HEADS), THRESHOLD, device="cuda")
    tensors = {
        "query": query, "key": key, "value": value, "budget": budget,
        "key_mask": torch.ones(1, 1, dtype=torch.bool, device="cuda"),
        "order": token_order(GRID, query.device).long(),
        "text_before": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip

    def in_torch() -> torch.Tensor:
        out: torch.Tensor = torch.ops.freqopt.split_attention(
            query, key, value, budget, None, list(GRID), 0, 0, DIM**-0.5, 0.0, False, PROBES
        )[0]
        return out

    expected = in_torch()
    torch.cuda.synchronize()  # the sessions launch on streams of their own
    times, errors = {"pytorch": milliseconds(in_torch)}, {}
    for name, library in (("library", folder / LIBRARY_NAME), ("body", None)):
        out = torch.full(shape, torch.nan, dtype=torch.float16, device="cuda")
        session, stream = open_session(folder, library)
        binding = bind(session, tensors, out)
        with torch.cuda.stream(stream):
            session.run_with_iobinding(binding)
            stream.synchronize()
            times[name] = milliseconds(partial(session.run_with_iobinding, binding))
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        errors[name] = float(error)
        if not errors[name] < TOLERANCE:  # a NaN too
            raise RuntimeError(f"{name} is off by {errors[name]:.3g}; no time reported")
        ran = where_ran(Path(session.end_profiling()))
        if ran != ({"CUDAExecutionProvider"} if library else set()):
            raise RuntimeError(f"{name}: SplitAttention ran on {ran or 'nothing'}")
    return {"tokens": tokens, "heads": HEADS, "head_dim": DIM, "ms": times, "l2": errors}


def open_session(folder: Path, library: Path | None) -> tuple[Any, torch.cuda.Stream]:
    """A profiled session on the CUDA provider, and the stream that it launches on."""
    import onnxruntime

    onnxruntime.preload_dlls()
    stream = torch.cuda.Stream()
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    if library is not None:
        options.register_custom_ops_library(str(library))
    provider = ("CUDAExecutionProvider", {"user_compute_stream": str(stream.cuda_stream)})
    session = onnxruntime.InferenceSession(
        str(folder / "split.onnx"), options, providers=[provider]
    )
    if session.get_providers()[0] != provider[0]:
        raise RuntimeError(f"onnxruntime fell back to {session.get_providers()}")
    return session, stream


def bind(session: Any, tensors: dict[str, torch.Tensor], out: torch.Tensor) -> Any:
    binding = session.io_binding()
    for name, x in tensors.items():
        kind = KINDS[x.dtype]
        binding.bind_input(name, x.device.type, 0, kind, tuple(x.shape), x.data_ptr())
    binding.bind_output("out", "cuda", 0, KINDS[out.dtype], tuple(out.shape), out.data_ptr())
    return binding


def where_ran(profile: Path) -> set[str]:
    """Providers on which a SplitAttention node ran, from onnxruntime's profile."""
    events = json.loads(profile.read_text())
    profile.unlink()
    details = [e["args"] for e in events if e.get("args", {}).get("op_name") == "SplitAttention"]
    return {str(d["provider"]) for d in details if "provider" in d}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["prepare", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.step == "prepare":
        prepare(given.folder, given.capability)
        return
    import onnxruntime

    head = {**environment(), "onnxruntime": onnxruntime.__version__}
    result = {"environment": head, **measure(given.folder)}
    print(json.dumps(result, indent=1))
    write("export", result, given.out)


if __name__ == "__main__":
    main()
