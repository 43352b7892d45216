"""Registers the nodes of model.trt.onnx with TensorRT: Quickly Deployable Plugins with PTX.

It stands on its own beside `nodes.json` and the PTX files: only the tensorrt package is needed,
freqopt and Triton are not. Each node is one kernel; the finished plan carries it and needs no
Python. `build_engine.py` calls `register`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import GenericAlias
from typing import Any

NAMESPACE = "freqopt"
IO_TYPES = {
    "fp32": "FP32",
    "fp16": "FP16",
    "bf16": "BF16",
    "i64": "INT64",
    "i32": "INT32",
    "i8": "INT8",
}


def register(folder: Path, plugin: Any = None, tensorrt: Any = None) -> list[str]:
    """Register every node of a folder; their names.

    plugin, tensorrt: the modules `tensorrt.plugin` and `tensorrt`, imported where not given.
    """
    if plugin is None or tensorrt is None:
        tensorrt = importlib.import_module("tensorrt")
        plugin = importlib.import_module("tensorrt.plugin")
    nodes = json.loads((folder / "nodes.json").read_text())
    for node in nodes:
        _register_node(node, folder, plugin, tensorrt)
    return [node["name"] for node in nodes]


def _register_node(node: dict[str, Any], folder: Path, plugin: Any, tensorrt: Any) -> None:
    name = f"{NAMESPACE}::{node['name']}"
    inputs = [f"input_{i}" for i in range(node["inputs"])]
    types = {
        "fp32": tensorrt.float32,
        "fp16": tensorrt.float16,
        "bf16": tensorrt.bfloat16,
        "i64": tensorrt.int64,
        "i32": tensorrt.int32,
        "i8": tensorrt.int8,
    }

    def describe(*tensors: Any) -> Any:
        made = [
            plugin.from_shape_expr((tensors[0].shape_expr[0], *out["shape"]), types[out["type"]])
            if out["rewrites"] is None
            else tensors[out["rewrites"]].aliased()
            for out in node["outputs"]
        ]
        return tuple(made)

    def implement(*given: Any) -> Any:
        # TensorRT numbers a plugin's own tactics from 1, and passes 0 where there is no choice.
        tactic = node["tactics"][max(given[-1] - 1, 0)]
        batch = given[0].shape_expr[0]
        launch = plugin.KernelLaunchParams()
        for axis, (count, batched) in zip("xyz", tactic["grid"], strict=False):
            setattr(launch, f"grid_{axis}", batch * count if batched else count)
        launch.block_x, launch.shared_mem = tactic["warps"] * 32, tactic["shared"]
        integers = plugin.SymIntExprs(len(node["integers"]))
        for i, value in enumerate(node["integers"]):
            integers[i] = plugin.SymInt32(value)
        return tactic["symbol"], (folder / tactic["ptx"]).read_text(), launch, integers

    def tune(*given: Any) -> Any:
        kinds = [*node["input_types"], *(out["type"] for out in node["outputs"])]
        spelled = ", ".join(IO_TYPES[kind] for kind in kinds)
        tactics = list(range(1, len(node["tactics"]) + 1))
        return [plugin.AutoTuneCombination(spelled, "LINEAR", tactics)]

    descriptors = GenericAlias(tuple, (plugin.TensorDesc,) * len(node["outputs"]))
    launches = GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    annotated = dict.fromkeys(inputs, plugin.TensorDesc)
    plugin.register(name)(_signed(describe, annotated, descriptors))
    extra = {"outputs": descriptors, "tactic": int}
    plugin.aot_impl(name)(_signed(implement, {**annotated, **extra}, launches))
    if len(node["tactics"]) > 1:
        extra = {"outputs": descriptors}
        plugin.autotune(name)(
            _signed(tune, {**annotated, **extra}, GenericAlias(list, plugin.AutoTuneCombination))
        )


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Any:
    """The function with named parameters, which TensorRT reads the numbers of tensors from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, kind, annotation=a) for n, a in parameters.items()],
        return_annotation=returns,
    )
    return function
