"""Writes split sites as chains of one-kernel nodes with PTX, for plugins compiled ahead of time.

The nodes stand in model.trt.onnx under names of their own; `aot/aot_plugin.py` registers them. The
kernels are the portable ones: the Hopper kernel's tensor maps are arguments that such a plugin
cannot pass (docs/design/export.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqopt.exporters.problems import ExportError
from freqopt.kernels.variant import Variant

if TYPE_CHECKING:
    import onnx_ir as ir

    from freqopt.exporters.tensorrt.aot.chain import Call

MODULE = Path(__file__).parent / "aot_plugin.py"
FOLDER = "aot"
DEFAULT_CAPABILITY = 80
"""PTX for 8.0 runs on every later GPU: the driver compiles it once more."""

TYPES = {
    "fp32": "FLOAT",
    "fp16": "FLOAT16",
    "bf16": "BFLOAT16",
    "i64": "INT64",
    "i32": "INT32",
    "i8": "INT8",
}


@dataclass(frozen=True)
class Site:
    """A split node that `fit_nodes` has prepared, and what it asks for."""

    node: Any
    call: Call
    dtype: str
    scale: float


def find_calls(model: ir.Model) -> tuple[list[Site], list[str]]:
    """The split nodes that chains can serve, and why others cannot be."""
    from freqopt.exporters.onnx.body import DOMAIN, OP_NAME
    from freqopt.exporters.onnx.nodes import orders_of
    from freqopt.exporters.tensorrt.aot.chain import Call
    from freqopt.exporters.tensorrt.plugin import constant

    sites, problems = [], []
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, OP_NAME) or len(node.inputs) != 6:
            continue
        query, key, _, _, order, _ = node.inputs
        extents = [*query.shape[1:], key.shape[1]]
        probes = node.attributes["probes"].as_int()
        if not all(isinstance(n, int) for n in extents):
            problems.append(f"{node.name}: only the batch of query {query.shape} may be free")
        elif orders_of(node) or not node.attributes["own"].as_int():
            problems.append(
                f"{node.name}: its tokens are ordered by content, which chains of nodes do not; "
                "export with plugin='cpp'"
            )
        elif probes == 0:
            problems.append(f"{node.name}: it has no probes; export with probes=64")
        else:
            heads, length, dim, kv_heads = extents
            call = Call(
                heads,
                kv_heads,
                length,
                dim,
                constant(order).size,
                node.attributes["text_before"].as_int(),
                node.attributes["density"].as_float(),
                probes,
            )
            dtype = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
            sites.append(
                Site(node, call, dtype[query.dtype.name], node.attributes["scale"].as_float())
            )
    return sites, problems


def write_chains(
    model: ir.Model, folder: Path, capabilities: Sequence[int]
) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """Expand the split nodes of a model; (files written, rows for the manifest, problems).

    Raises:
        ExportError: several capabilities, or kernels that a plain launch cannot carry.
        NotAvailableError: triton is missing or its compiler fails.
    """
    from freqopt.exporters.tensorrt.aot.ptx import compile_calls

    if len(set(capabilities)) != 1:
        raise ExportError(
            f"capabilities {tuple(capabilities)}: a node compiled ahead of time has one PTX; name "
            "one, 80 for code that runs on every later GPU"
        )
    (capability,) = set(capabilities)
    target = folder / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    sites, problems = find_calls(model)
    if not sites:
        return [], [], problems
    asked = [(s.call, Variant(capability, s.dtype, s.call.dim, False), s.scale) for s in sites]
    distinct = list(dict.fromkeys(asked))
    compiled = dict(zip(distinct, compile_calls(distinct, target), strict=True))
    table: dict[str, dict[str, Any]] = {}
    for site, request in zip(sites, asked, strict=True):
        for node in _expand(model, site, compiled[request]):
            table[node["name"]] = {
                k: v for k, v in node.items() if k not in ("input_names", "output_names")
            }
    (target / "nodes.json").write_text(json.dumps(list(table.values()), indent=1) + "\n")
    shutil.copyfile(MODULE, target / MODULE.name)
    files = [f"{FOLDER}/{path.name}" for path in sorted(target.iterdir())]
    rows = [
        {
            "kernel": node["kernel"],
            "capability": capability,
            "dtype": request[1].dtype,
            "head_dim": request[0].dim,
            "masked": False,
            "warps": tactic["warps"],
            "shared": tactic["shared"],
        }
        for request, nodes in compiled.items()
        for node in nodes
        for tactic in node["tactics"]
    ]
    return files, rows, problems


def _expand(model: ir.Model, site: Site, chain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the chain's nodes in a split node's place; the chain with its input types."""
    import onnx_ir as ir

    from freqopt.exporters.onnx.body import DOMAIN

    names = ("query", "key", "value", "budget", "order")
    at = dict(zip(names, site.node.inputs, strict=False))  # the queries' order is the keys'
    codes = {name: code for code, name in TYPES.items()}
    batch = site.node.inputs[0].shape[0]
    made, known = [], []
    for step in chain:
        inputs = [at[name] for name in step["input_names"]]
        known.append({**step, "input_types": [codes[x.dtype.name] for x in inputs]})
        outputs = [
            ir.Value(
                name=f"{site.node.name}/{step['name']}/{i}",
                shape=ir.Shape([batch, *out["shape"]]),
                type=ir.TensorType(ir.DataType[TYPES[out["type"]]]),
            )
            for i, out in enumerate(step["outputs"])
        ]
        made.append(
            ir.Node(
                DOMAIN,
                step["name"],
                inputs,
                name=f"{site.node.name}/SplitAttention/{step['name']}",
                attributes=[
                    ir.AttrString("plugin_namespace", DOMAIN),
                    ir.AttrString("plugin_version", "1"),
                ],
                outputs=outputs,
            )
        )
        at.update(zip(step["output_names"], outputs, strict=True))
    result, was = at["out"], site.node.outputs[0]
    result.shape, result.type = was.shape, was.type
    outputs_of_graph = [i for i, v in enumerate(model.graph.outputs) if v is was]
    model.graph.insert_after(site.node, made)
    ir.convenience.replace_all_uses_with(was, result)
    for i in outputs_of_graph:
        model.graph.outputs[i] = result
    name = was.name
    model.graph.remove(site.node, safe=True)
    result.name = name
    return known
