"""Prepares an exported graph for the TensorRT plugin, and lays the plugin's sources beside it.

TensorRT has no boolean plugin inputs and keeps every input on the device, so what the launches must
know on the host becomes an attribute. Split nodes keep six inputs: query, key, value, budget, order
and query_order; nodes that make an order by content three: tokens, base and chunks.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqopt.exporters.onnx.cubins import Compiled, compile_table, write_sources
from freqopt.exporters.onnx.library import SOURCES
from freqopt.kernels.variant import Variant

if TYPE_CHECKING:
    import onnx_ir as ir

FOLDER = Path(__file__).parent / "cpp"
SHARED_SOURCES = (
    *("launches.cc", "launches.h", "cuda_driver.h"),
    *("order_cuda.cc", "order_cuda.h", "split_cuda.cc", "split_cuda.h"),
)
DEFAULT_CAPABILITIES = (80, 90)


def fit_nodes(model: ir.Model) -> list[str]:
    """Rewrite the split nodes for the plugin; what it cannot serve is left alone and returned."""
    from freqopt.exporters.onnx.body import DOMAIN, INPUTS, OP_NAME
    from freqopt.exporters.onnx.content import CONTENT_INPUTS
    from freqopt.exporters.onnx.nodes import orders_of

    problems = []
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, OP_NAME):
            continue
        given = dict(zip(INPUTS, node.inputs, strict=True))
        made = [
            (order, dict(zip(CONTENT_INPUTS, order.inputs, strict=True)))
            for order in orders_of(node)
        ]
        mask = constant(given["key_mask"])
        reasons = []
        if mask is None or mask.shape != (1, 1):
            reasons.append("it takes a key mask, which the plugin does not")
        if any(constant(given[f"{side}text_before"]) is None for side in ("", "query_")):
            reasons.append("the number of text tokens before the video is known at run time only")
        by_content = {id(order.outputs[0]) for order, _ in made}
        bases = [x for x in (given["order"], given["query_order"]) if id(x) not in by_content]
        if any(constant(x) is None for x in (*bases, *(inputs["base"] for _, inputs in made))):
            reasons.append("its grid is known at run time only; export with fixed extents")
        if reasons:
            problems.append(f"{node.name}: {'; '.join(reasons)}")
            continue
        names = ("query", "key", "value", "budget", "order", "query_order")
        _fit(node, given, names, ("text_before", "query_text_before"))
        for order, inputs in made:
            _fit(order, inputs, ("tokens", "base", "chunks"), ("text_before",))
    return problems


def _fit(
    node: ir.Node, given: dict[str, Any], inputs: Sequence[str], attributes: Sequence[str]
) -> None:
    """Keep some of a node's inputs, and make attributes of others, which are constant."""
    import onnx_ir as ir

    for name in attributes:
        number = int(constant(given[name]).reshape(-1)[0])
        node.attributes[name] = ir.AttrInt64(name, number)
    node.resize_inputs(len(inputs))
    for i, name in enumerate(inputs):
        node.replace_input_with(i, given[name])


def constant(value: Any) -> Any:
    """The numbers of a value that is known at export, else None."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def write_plugin(folder: Path, variants: Sequence[Variant]) -> tuple[list[str], Sequence[Compiled]]:
    """Sources, kernels and build_engine.py into an artifact; (file names, table of kernels).

    Without variants there is nothing for a plugin to do, and only build_engine.py is written.
    """
    target = folder / "plugin"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copyfile(FOLDER / "build_engine.py", folder / "build_engine.py")
    if not variants:
        return ["build_engine.py"], []
    table = compile_table(variants, target)
    (target / "table.json").unlink()
    # The folder will move: the cubins are named relative to the sources that embed them.
    assembly = write_sources(table, target)[0]
    text = assembly.read_text("utf-8", "surrogateescape").replace(f"{target.resolve()}/", "")
    assembly.write_text(text, "utf-8", "surrogateescape")
    for name in SHARED_SOURCES:
        shutil.copyfile(SOURCES / name, target / name)
    shutil.copyfile(FOLDER / "split_tensorrt.cc", target / "split_tensorrt.cc")
    names = [f"plugin/{path.name}" for path in sorted(target.iterdir())]
    return ["build_engine.py", *names], table
