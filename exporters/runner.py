"""Runs an exported ONNX artifact under onnxruntime and says which nodes ran where.

onnxruntime falls back to the CPU without a word when a provider cannot be loaded; here that is an
error unless the CPU was asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from freqopt.errors import InputError, OptionError
from freqopt.exporters.lengths import check_served
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx.body import OP_NAME
from freqopt.exporters.onnx.library import OLDEST_ONNXRUNTIME, attend_counts, check_library
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.exporters.trust import check_external_data, library_to_load

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ELEMENT_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(double)": torch.float64,
}


@dataclass(frozen=True)
class RunResult:
    """Outputs by name, and the evidence of how they were made.

    Attributes:
        outputs: tensors by name.
        provider: the one that was wanted and ran.
        nodes: by provider and operator: how many nodes ran there.
        split: what computed the split sites: "library", "plugin" or "function body".
        seconds: one run.
        kernels: which of the library's GPU kernels attended, and how often.
    """

    outputs: dict[str, Tensor]
    provider: str
    nodes: dict[str, dict[str, int]]
    split: str
    seconds: float
    kernels: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"ran on {self.provider} in {self.seconds:.3f} s; split sites by {self.split}"]
        lines += [f"  {count} attended by {kernel}" for kernel, count in self.kernels.items()]
        for provider, nodes in self.nodes.items():
            total, most = sum(nodes.values()), Counter(nodes).most_common(6)
            if OP_NAME in nodes and OP_NAME not in dict(most):
                most.insert(0, (OP_NAME, nodes[OP_NAME]))
            lines.append(f"  {provider}: {total} nodes ({', '.join(f'{k} {n}' for k, n in most)})")
        return "\n".join(lines)


def run_artifact(
    path: str | os.PathLike[str] | Artifact,
    inputs: Mapping[str, Tensor],
    *,
    provider: str = "auto",
    library: bool = True,
    threads: int = 0,
    trust: bool = False,
) -> RunResult:
    """Check an artifact, run it once, and verify what ran.

    No program of the folder runs unless you say that you trust its maker, or it is a library that
    this machine built itself.

    Args:
        path: an exported folder; one of TensorRT's runs its engine, whatever the other options.
        inputs: tensors by input name; extents may differ from the export's where they are dynamic.
        provider: "cpu", "cuda", or "auto": CUDA where onnxruntime has it.
        library: on CUDA, use the artifact's operator library where it has one; the function body
            runs otherwise.
        threads: of onnxruntime's CPU pool; 0 lets it choose.
        trust: whether the folder's maker may run programs here: its operator library on CUDA, a
            TensorRT engine and its plugin.

    Raises:
        ArtifactError: tampered files, files that the manifest does not list, a program that nobody
            trusts, a library for another machine.
        InputError: inputs whose names, types or ranks are not the model's.
        NotAvailableError: onnxruntime missing or too old, or the provider does not really run.
        OptionError: an unknown provider; trust that is neither True nor False.
        PlanError: inputs of a length that the plan in the file does not serve.
    """
    if not isinstance(trust, bool):  # "no" would be a yes
        raise OptionError(f"trust is {trust!r}; True or False is needed")
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise OptionError(f"threads is {threads!r}; a whole number is needed")
    check_inputs(inputs)
    artifact = path if isinstance(path, Artifact) else Artifact.load(path)
    check_served(artifact.manifest, inputs)
    if artifact.kind == "tensorrt":
        from freqopt.exporters.tensorrt.runner import run_engine

        outputs, seconds, layers = run_engine(artifact, inputs, trust=trust)
        split = "plugin" if artifact.sites else "nothing: no site was split"
        return RunResult(outputs, "TensorRT", {"TensorRT": layers}, split, seconds)
    wanted = _wanted_provider(provider)
    library_path = None
    if library and wanted == PROVIDERS["cuda"]:
        library_path = library_to_load(artifact, trust=trust)
    check_external_data(artifact)
    with tempfile.TemporaryDirectory(prefix="freqopt-") as scratch:
        session = _open_session(artifact, wanted, library_path, threads, Path(scratch))
        values = _bind_inputs(session, inputs)
        attended = attend_counts(library_path) if library_path else {}
        start = time.perf_counter()
        results = session.run_with_ort_values(None, values)
        seconds = time.perf_counter() - start
        names = [output.name for output in session.get_outputs()]
        outputs = {name: _to_tensor(v) for name, v in zip(names, results, strict=True)}
        nodes = nodes_by_provider(Path(session.end_profiling()))
    split = _verify(nodes, wanted, artifact, library_path)
    now = attend_counts(library_path) if library_path else {}
    kernels = {name: now[name] - n for name, n in attended.items() if now[name] > n}
    return RunResult(outputs, wanted, nodes, split, seconds, kernels)


def check_inputs(inputs: object) -> None:
    """Refuse inputs of another kind, before a model is opened.

    Raises:
        InputError: it is no dict of tensors by name that have values.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs is a {type(inputs).__name__}; tensors by input name are needed")
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "on meta" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise InputError(f"input {name!r} is {what}; a torch.Tensor with values is needed")


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise NotAvailableError(
            "onnxruntime is not installed; pip install 'freqopt[onnx]' (or onnxruntime-gpu)"
        ) from error
    return onnxruntime


def _wanted_provider(provider: str) -> str:
    runtime = _onnxruntime()
    available = runtime.get_available_providers()
    if provider == "auto":
        return PROVIDERS["cuda" if PROVIDERS["cuda"] in available else "cpu"]
    if provider not in PROVIDERS:
        raise OptionError(f"provider {provider!r} is unknown; supported: auto, cpu, cuda")
    if PROVIDERS[provider] not in available:
        raise NotAvailableError(
            f"this onnxruntime {runtime.__version__} has no {PROVIDERS[provider]} (it has "
            f"{', '.join(available)}); install onnxruntime-gpu, or pass provider='cpu'"
        )
    return PROVIDERS[provider]


def _open_session(
    artifact: Artifact, wanted: str, library: Path | None, threads: int, scratch: Path
) -> Any:
    runtime = _onnxruntime()
    version = tuple(int(part) for part in runtime.__version__.split(".")[:2])
    if version < OLDEST_ONNXRUNTIME:
        raise NotAvailableError(
            f"onnxruntime {runtime.__version__} is too old; 1.17 or newer is supported"
        )
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    if library is not None:
        check_library(library)
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # onnxruntime raises its own types, which vary by version
            raise ArtifactError(f"onnxruntime could not load {library}: {error}") from error
    if wanted == PROVIDERS["cuda"] and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()
    try:
        session = runtime.InferenceSession(
            str(artifact.model_path),
            options,
            providers=list(dict.fromkeys([wanted, PROVIDERS["cpu"]])),
        )
    except Exception as error:
        raise NotAvailableError(
            f"onnxruntime {runtime.__version__} could not open {artifact.model_path} (opset "
            f"{artifact.manifest.get('opset')}): {error}"
        ) from error
    if session.get_providers()[0] != wanted:
        raise NotAvailableError(
            f"{wanted} was wanted but onnxruntime runs {session.get_providers()}: its CUDA "
            "libraries could not be loaded. Install the CUDA packages it names in its log, import "
            "torch first, or pass provider='cpu'"
        )
    return session


def _bind_inputs(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    runtime = _onnxruntime()
    expected = {value.name: value for value in session.get_inputs()}
    listing = ", ".join(f"{v.name}: {v.type} {v.shape}" for v in expected.values())
    if set(inputs) != set(expected):
        raise InputError(f"inputs {sorted(inputs)} were given; the model takes {listing}")
    values = {}
    for name, tensor in inputs.items():
        kind = ELEMENT_TYPES.get(expected[name].type)
        shape = expected[name].shape
        fits = len(shape) == tensor.dim() and all(
            not isinstance(want, int) or want == have
            for want, have in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != kind or not fits:
            raise InputError(
                f"input {name!r} is {tensor.dtype} {tuple(tensor.shape)}; the model takes {listing}"
            )
        plain = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            raw = plain.view(torch.uint16).numpy()
            values[name] = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, 16)
        else:
            values[name] = runtime.OrtValue.ortvalue_from_numpy(plain.numpy())
    return values


def _to_tensor(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
    return torch.from_numpy(value.numpy())


def nodes_by_provider(profile: Path) -> dict[str, dict[str, int]]:
    """Count the distinct nodes of each operator that ran on each provider, in a profile."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    seen: dict[str, dict[str, set[str]]] = {}
    for event in events:
        details = event.get("args", {})
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        where = seen.setdefault(str(details.get("provider", "unknown")), {})
        where.setdefault(str(details.get("op_name")), set()).add(
            f"{event['name']} {details.get('node_index')}"
        )
    return {p: {op: len(names) for op, names in ops.items()} for p, ops in seen.items()}


def _verify(
    nodes: dict[str, dict[str, int]], wanted: str, artifact: Artifact, library: Path | None
) -> str:
    if wanted not in nodes:
        raise NotAvailableError(f"no node ran on {wanted}; nodes ran on {', '.join(nodes)}")
    if not artifact.sites:
        return "nothing: no site was split"
    ours = {provider: ops.get(OP_NAME, 0) for provider, ops in nodes.items()}
    if library is None:
        return "function body"
    if ours[wanted] != len(artifact.sites):
        raise NotAvailableError(
            f"{ours[wanted]} of the {len(artifact.sites)} split sites ran in the library on "
            f"{wanted} ({ours}): it does not serve this type or head dimension there. Run with "
            "library=False, or export again on this machine"
        )
    return "library"
