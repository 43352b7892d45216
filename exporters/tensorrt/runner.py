"""Runs the engine of a TensorRT artifact on the current GPU, on PyTorch's stream."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from freqopt.errors import InputError
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.exporters.tensorrt.cpp.build_engine import ENGINE, PLUGIN


def run_engine(
    artifact: Artifact, inputs: Mapping[str, Tensor], *, trust: bool
) -> tuple[dict[str, Tensor], float, dict[str, int]]:
    """Outputs by name (on the CPU), seconds of one run, and how many layers of each kind there are.

    trust: whether the maker of the folder may run programs here, which engine and plugin are.

    Raises:
        NotAvailableError: no engine in the folder, TensorRT or a GPU missing, or a run that failed.
        ArtifactError: no trust, or an engine or plugin that the manifest does not list or that this
            TensorRT cannot load.
        InputError: inputs whose names, types or shapes are not the engine's.
    """
    if not (artifact.path / ENGINE).is_file():
        raise NotAvailableError(
            f"{artifact.path} is a tensorrt artifact without an engine; run `python "
            f"{artifact.path / 'build_engine.py'}` where TensorRT is installed"
        )
    if not trust:
        raise ArtifactError(
            f"{artifact.path} is run by its engine and plugin, which are programs, and nobody said "
            "that its maker may run programs here: pass --trust (trust=True) if you would"
        )
    engine_file, plugin_name = artifact.file(ENGINE), f"plugin/{PLUGIN}"
    plugin = None
    if (artifact.path / plugin_name).exists():
        plugin = artifact.file(plugin_name)
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise NotAvailableError(
            f"TensorRT is not installed here ({error}); run the engine where it is"
        ) from error
    if not torch.cuda.is_available():
        raise NotAvailableError("an engine needs an NVIDIA GPU and none is visible to PyTorch")
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    if plugin is not None and tensorrt.get_plugin_registry().load_library(str(plugin)) is None:
        raise ArtifactError(f"TensorRT {tensorrt.__version__} could not load {plugin}")
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None:
        raise ArtifactError(
            f"TensorRT {tensorrt.__version__} could not load {engine_file}: engines are bound to "
            "the version and GPU they were built with; run build_engine.py again here"
        )
    outputs, seconds = _execute(tensorrt, engine, inputs)
    return outputs, seconds, _layers(tensorrt, engine)


def _execute(
    tensorrt: Any, engine: Any, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    kinds = {
        tensorrt.float32: torch.float32,
        tensorrt.float16: torch.float16,
        tensorrt.bfloat16: torch.bfloat16,
        tensorrt.int32: torch.int32,
        tensorrt.int64: torch.int64,
        tensorrt.bool: torch.bool,
    }
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    wanted = [n for n in names if engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
    if set(wanted) != set(inputs):
        raise InputError(f"inputs {sorted(inputs)} were given; the engine takes {sorted(wanted)}")
    held = {}
    for name in wanted:
        kind = kinds[engine.get_tensor_dtype(name)]
        if inputs[name].dtype != kind:
            raise InputError(f"input {name!r} is {inputs[name].dtype}; the engine takes {kind}")
        held[name] = inputs[name].cuda().contiguous()
        if not context.set_input_shape(name, tuple(held[name].shape)):
            raise InputError(
                f"input {name!r} is {tuple(held[name].shape)}, outside the engine's profile "
                f"{engine.get_tensor_profile_shape(name, 0)}; build it with a wider --shape"
            )
    results = {}
    for name in names:
        if name not in held:
            shape = tuple(context.get_tensor_shape(name))
            kind = kinds[engine.get_tensor_dtype(name)]
            held[name] = results[name] = torch.empty(shape, dtype=kind, device="cuda")
        context.set_tensor_address(name, held[name].data_ptr())
    stream = torch.cuda.Stream()  # TensorRT synchronises needlessly on the default one
    stream.wait_stream(torch.cuda.current_stream())
    stream.synchronize()
    start = time.perf_counter()
    if not context.execute_async_v3(stream.cuda_stream):
        raise NotAvailableError("the engine did not run; the reason is in TensorRT's log above")
    stream.synchronize()
    return {k: v.cpu() for k, v in results.items()}, time.perf_counter() - start


def _layers(tensorrt: Any, engine: Any) -> dict[str, int]:
    inspector = engine.create_engine_inspector()
    plain = tensorrt.LayerInformationFormat.ONELINE
    lines = [inspector.get_layer_information(i, plain) for i in range(engine.num_layers)]
    return dict(Counter("plugin" if "SplitAttention" in x else "layer" for x in lines))
