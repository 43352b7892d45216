"""Prepares an exported graph for the TensorRT plugin, and lays the plugin's sources beside it.

TensorRT has no boolean plugin inputs and keeps every input on the device, so what the launches must
know on the host becomes an attribute, and the nodes keep five inputs: query, key, value, budget,
order.
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
SHARED_SOURCES = ("split_cuda.cc", "split_cuda.h", "cuda_driver.h")
DEFAULT_CAPABILITIES = (80, 90)


def fit_nodes(model: ir.Model) -> list[str]:
    """Rewrite the split nodes for the plugin; what it cannot serve is left alone and returned."""
    import onnx_ir as ir

    from freqopt.exporters.onnx.body import DOMAIN, INPUTS, OP_NAME

    problems = []
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, OP_NAME):
            continue
        given = dict(zip(INPUTS, node.inputs, strict=True))
        before = constant(given["text_before"])
        mask = constant(given["key_mask"])
        reasons = []
        if mask is None or mask.shape != (1, 1):
            reasons.append("it takes a key mask, which the plugin does not")
        if before is None:
            reasons.append("the number of text tokens before the video is known at run time only")
        if constant(given["order"]) is None:
            reasons.append("its grid is known at run time only; export with fixed extents")
        if reasons:
            problems.append(f"{node.name}: {'; '.join(reasons)}")
            continue
        assert before is not None
        node.attributes["text_before"] = ir.AttrInt64("text_before", int(before.reshape(-1)[0]))
        kept = [given[name] for name in ("query", "key", "value", "budget", "order")]
        node.resize_inputs(len(kept))
        for i, value in enumerate(kept):
            node.replace_input_with(i, value)
    return problems


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
