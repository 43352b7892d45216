"""Time the exported operator inside ONNX Runtime's CUDA provider against the op in PyTorch.

    python -m benchmarks.export prepare FOLDER [--capability 90]  (needs onnx and g++, no GPU)
    python -m benchmarks.export measure FOLDER [--out FOLDER]     (needs onnxruntime-gpu and a GPU)

Each case is one node, run from the same file with the library and with its function body, on the
same tensors as the op in PyTorch. A row whose output is wrong or whose node ran elsewhere says so,
has no times, and makes the command fail. On a CPU, for tests, there is the function body alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import freqopt.kernels.op  # noqa: F401  registers the operator
from benchmarks.common import environment, milliseconds, write
from benchmarks.natural import natural_attention
from freqopt.exporters.onnx.library import LIBRARY_NAME, attend_counts, build_library
from freqopt.exporters.runner import PROVIDERS, nodes_by_provider
from freqopt.grid import token_order
from freqopt.kernels.variant import Variant

PROBES, DENSITY = 64, 0.1
TOLERANCES = {"float16": 1e-2, "bfloat16": 2e-2}
"""Relative L2 distance from the op in PyTorch: rounding to the type, and blocks that tie."""

KINDS = {torch.float16: 10, torch.bfloat16: 16, torch.float32: 1, torch.bool: 9, torch.int64: 7}
OP = "SplitAttention"


@dataclass(frozen=True)
class Case:
    """One call. before, after: text tokens around the video; masked: the last text is padding.

    attend: the kernel of the library that must serve it on Hopper. density: as of an export without
    a plan; 0 for thresholds.
    """

    name: str
    dtype: str
    head_dim: int
    grid: tuple[int, int, int]
    heads: int
    attend: str
    batch: int = 1
    kv_heads: int | None = None
    before: int = 0
    after: int = 0
    masked: bool = False
    density: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def model(self) -> str:
        """The ONNX file: types and attributes are fixed in it, extents are free."""
        density = f"_{self.density}" if self.density else ""
        return f"split_{self.dtype}_{self.head_dim}{density}.onnx"

    def variant(self, capability: int) -> Variant:
        """What its kernels are compiled for."""
        return Variant(capability, self.dtype, self.head_dim, self.masked)


HOPPER, PORTABLE = "attend_hopper", "attend"
CASES = (
    Case("Wan, 81 frames at 480p", "bfloat16", 128, (21, 30, 52), 24, HOPPER),
    Case("half precision", "float16", 128, (13, 30, 52), 24, HOPPER),
    Case("CogVideoX", "bfloat16", 64, (13, 30, 45), 30, HOPPER, before=226),
    Case("HunyuanVideo", "bfloat16", 128, (13, 30, 52), 24, HOPPER, after=256, masked=True),
    Case("no plan", "float16", 128, (13, 30, 52), 24, HOPPER, density=0.25),
    Case("another head dim", "float16", 96, (13, 30, 52), 24, PORTABLE),
    Case(
        "odd sizes",
        "bfloat16",
        128,
        (5, 7, 9),
        4,
        HOPPER,
        batch=2,
        kv_heads=2,
        before=3,
        after=130,
        masked=True,
    ),
)


def prepare(folder: Path, capability: int, cases: Sequence[Case] = CASES) -> None:
    """Write the cases' ONNX files, and the library with kernels for one GPU."""
    import onnx

    from freqopt.exporters.onnx.cubins import compile_table, write_sources

    folder.mkdir(parents=True, exist_ok=True)
    for case in {case.model: case for case in cases}.values():
        onnx.save(_one_node(case), folder / case.model)
    variants = list(dict.fromkeys(case.variant(capability) for case in cases))
    with tempfile.TemporaryDirectory() as scratch:
        table = compile_table(variants, Path(scratch))
        build_library(folder, write_sources(table, Path(scratch)))


def _one_node(case: Case) -> Any:
    from onnx import TensorProto, helper

    from freqopt.exporters.onnx.body import DOMAIN, INPUTS, OP_NAME, OP_VERSION, split_function

    own = TensorProto.FLOAT16 if case.dtype == "float16" else TensorProto.BFLOAT16
    shapes: dict[str, tuple[int, list[Any]]] = {
        **{name: (own, [None] * 4) for name in INPUTS[:3]},
        "budget": (TensorProto.FLOAT, [None]),
        "key_mask": (TensorProto.BOOL, [None, None]),
        "order": (TensorProto.INT64, [None]),
        "text_before": (TensorProto.INT64, [1]),
    }
    names = [name.removeprefix("query_") for name in INPUTS]  # queries are the keys' tokens
    node = helper.make_node(
        OP_NAME,
        names,
        ["out"],
        domain=DOMAIN,
        scale=case.head_dim**-0.5,
        density=case.density,
        probes=PROBES,
        own=1,
    )
    inputs = [helper.make_tensor_value_info(n, *shape) for n, shape in shapes.items()]
    out = helper.make_tensor_value_info("out", own, [None] * 4)
    return helper.make_model(
        helper.make_graph([node], "split", inputs, [out]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OP_VERSION)],
        functions=[split_function(20, ("out",))],
        ir_version=10,
    )


def inputs_of(case: Case, device: str) -> dict[str, Tensor]:
    """The node's inputs: video tokens like those of natural video, text tokens of noise."""
    made = [
        natural_attention(
            case.grid,
            heads=case.heads,
            dim=case.head_dim,
            dtype=getattr(torch, case.dtype),
            device=device,
            seed=100 * i,
        )
        for i in range(case.batch)
    ]
    generator = torch.Generator(device).manual_seed(1)

    def sequence(videos: list[Tensor], heads: int) -> Tensor:
        video = torch.cat([x[:, :heads] for x in videos])
        parts = [
            torch.randn(
                case.batch, heads, count, case.head_dim, device=device, generator=generator
            ).to(video.dtype)
            for count in (case.before, case.after)
        ]
        return torch.cat([parts[0], video, parts[1]], 2).contiguous()

    kv_heads = case.kv_heads or case.heads
    threshold = 1.0
    if device == "cuda" and not case.density:
        from benchmarks.attention import threshold_for

        threshold = threshold_for(made[0], DENSITY)
    budget = torch.full((case.heads,), threshold, device=device)
    query = sequence([m.query for m in made], case.heads)
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    if case.masked:
        mask = mask.expand(case.batch, query.shape[2]).contiguous()
        mask[:, -(case.after // 3) :] = False
    return {
        "query": query,
        "key": sequence([m.key for m in made], kv_heads),
        "value": sequence([m.value for m in made], kv_heads),
        "budget": budget,
        "key_mask": mask,
        "order": token_order(case.grid, query.device).long(),
        "text_before": torch.tensor([case.before]),
    }


def in_torch(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The op in PyTorch on a case's inputs."""
    out: Tensor = torch.ops.freqopt.split_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        tensors["budget"],
        tensors["key_mask"] if case.masked else None,
        list(case.grid),
        case.before,
        case.after,
        case.head_dim**-0.5,
        case.density,
        PROBES,
    )[0]
    return out


def measure_case(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """A row: times in ms, errors, where every node ran, and what is wrong with it."""
    tensors = inputs_of(case, device)
    expected = in_torch(case, tensors)
    if device == "cuda":
        torch.cuda.synchronize()  # the sessions launch on streams of their own
    times = {"pytorch": _time(partial(in_torch, case, tensors), device)}
    row: dict[str, Any] = {**asdict(case), "tokens": case.tokens, "l2": {}, "nodes": {}}
    wrong = []
    sessions = {"library": folder / LIBRARY_NAME, "body": None}
    if device == "cpu":
        del sessions["library"]
    for name, library in sessions.items():
        ran = _run(case, folder, library, tensors, device)
        error = (ran["out"].float() - expected.float()).norm() / expected.float().norm()
        row["l2"][name], row["nodes"][name], times[name] = float(error), ran["nodes"], ran["ms"]
        if not float(error) < TOLERANCES[case.dtype]:  # a NaN too
            wrong.append(f"{name} is off by {float(error):.3g}")
        split_on = [p for p, ops in ran["nodes"].items() if OP in ops]
        if split_on != ([PROVIDERS[device]] if library else []):
            wrong.append(f"{name}: {OP} ran on {split_on or 'nothing'}")
        if library:
            row["attended_by"] = ran["attended_by"]
            if set(ran["attended_by"]) != {case.attend}:
                wrong.append(f"attended by {ran['attended_by']}, not {case.attend}")
    return {**row, "wrong": wrong} if wrong else {**row, "ms": times}


def _run(
    case: Case, folder: Path, library: Path | None, tensors: dict[str, Tensor], device: str
) -> dict[str, Any]:
    """Output, time and evidence of one session."""
    # The body copies through pinned memory, which onnxruntime frees in a callback of the stream; on
    # a stream of ours that aborts the process ("operation not permitted" from cudaFreeHost).
    stream = torch.cuda.Stream() if device == "cuda" and library else None
    session, options = open_session(folder / case.model, library, device, stream)
    out = torch.full_like(tensors["query"], torch.nan)
    binding = bind(session, tensors, out)
    before = attend_counts(library) if library else {}
    call = partial(session.run_with_iobinding, binding, options)
    with torch.cuda.stream(stream) if stream else nullcontext():
        call()
        if stream:
            stream.synchronize()
        found = out.clone()
        ms = _time(call, device)
    profile = Path(session.end_profiling())
    nodes = nodes_by_provider(profile)
    profile.unlink()
    after = attend_counts(library) if library else {}
    attended_by = {k: n - before[k] for k, n in after.items() if n > before[k]}
    return {"out": found, "ms": ms, "nodes": nodes, "attended_by": attended_by}


def _time(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return milliseconds(call)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def open_session(
    model: Path, library: Path | None, device: str, stream: torch.cuda.Stream | None
) -> tuple[Any, Any]:
    """A profiled session on the device's provider, and run options that do not wait for a GPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "freqopt_export")
    if library is not None:
        options.register_custom_ops_library(str(library))
    provider: Any = PROVIDERS[device]
    run_options = onnxruntime.RunOptions()
    if stream is not None:
        onnxruntime.preload_dlls()
        provider = (provider, {"user_compute_stream": str(stream.cuda_stream)})
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=[provider])
    if session.get_providers()[0] != PROVIDERS[device]:
        raise RuntimeError(f"onnxruntime fell back to {session.get_providers()}")
    return session, run_options


def bind(session: Any, tensors: dict[str, Tensor], out: Tensor) -> Any:
    """Inputs and output as they lie in memory."""
    binding = session.io_binding()
    for name, x in tensors.items():
        kind = KINDS[x.dtype]
        binding.bind_input(name, x.device.type, 0, kind, tuple(x.shape), x.data_ptr())
    binding.bind_output(
        "out", out.device.type, 0, KINDS[out.dtype], tuple(out.shape), out.data_ptr()
    )
    return binding


def measure(
    folder: Path,
    device: str = "cuda",
    cases: Sequence[Case] = CASES,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """All rows, each printed as it is done; one that raises is a wrong row.

    keep: called after each with the result so far.
    """
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"density": DENSITY, "probes": PROBES, "rows": rows}
    for case in cases:
        try:
            row = measure_case(case, folder, device)
        except Exception as error:  # the other rows are still worth having
            row = {**asdict(case), "wrong": [f"{type(error).__name__}: {error}"]}
        print(describe(row), flush=True)
        rows.append(row)
        keep(result)
    return result


def describe(row: dict[str, Any]) -> str:
    """One row, for people."""
    head = f"{row['name']}: {row['dtype']}, head dim {row['head_dim']}, grid {row['grid']}"
    if "wrong" in row:
        return f"{head}\n  WRONG: {'; '.join(row['wrong'])}"
    ms = dict(row["ms"])
    pytorch = ms.pop("pytorch")
    where = "; ".join(
        f"{name} " + ", ".join(f"{p} {sum(ops.values())}" for p, ops in nodes.items())
        for name, nodes in row["nodes"].items()
    )
    times = "; ".join(
        f"{name} {time:.3f} ms = {time / pytorch:.3f} x PyTorch, L2 {row['l2'][name]:.1e}"
        for name, time in ms.items()
    )
    return (
        f"{head}\n  PyTorch {pytorch:.3f} ms; {times}\n"
        f"  attended by {row.get('attended_by', 'the CPU')}; nodes: {where}"
    )


def main() -> None:
    """Run one step of the command line; the second writes export.json."""
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
    print(json.dumps(head))
    result = measure(
        given.folder, keep=lambda rows: write("export", {"environment": head, **rows}, given.out)
    )
    sys.exit(any("wrong" in row for row in result["rows"]))


if __name__ == "__main__":
    main()
