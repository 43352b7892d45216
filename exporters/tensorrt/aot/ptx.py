"""PTX of the chain's kernels in the form that a plugin compiled ahead of time is launched with.

Such a launch passes the input pointers, then integers, then the output pointers, and nothing else:
no floats, no scratch. PTX refers to parameters by name, so Triton's are put into that order, and
its two scratch pointers are dropped where nothing reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from freqopt.exporters.child import run_module
from freqopt.exporters.problems import ExportError, NotAvailableError
from freqopt.exporters.tensorrt.aot.chain import Batch, Call, Step, chain, element_type
from freqopt.kernels.variant import Variant

PLAIN_SHARED = 48 * 1024
"""Bytes of shared memory that every launch gets; a plugin cannot ask for more to be granted."""

SMALL: dict[str, list[dict[str, int]]] = {
    "first": [{"num_warps": 4}, {"num_warps": 2}],
    "disperse": [{"BI": 32, "BJ": 32}, {"BI": 16, "BJ": 16}],
    "score": [
        {"TILES": tiles, "BJ": blocks, "WIDE": blocks, "num_warps": 4}
        for tiles, blocks in ((4, 64), (4, 32), (1, 32), (1, 16))
    ],
    "probe": [{"BP": 32}, {"BP": 16}],
    "estimate": [{"BP": 32, "BJ": 32}, {"BP": 16, "BJ": 32}, {"BP": 16, "BJ": 16}],
    "fit": [{"BP": 32, "BJ": 32}, {"BP": 16, "BJ": 32}, {"BP": 16, "BJ": 16}],
    "ridge": [{"BD": 32, "num_warps": 4}, {"BD": 32, "num_warps": 2}],
    "attend": [{"BM": 64, "num_warps": 4}, {"BM": 32, "num_warps": 4}, {"BM": 16, "num_warps": 4}],
    "text": [{"BM": 64}, {"BM": 32}, {"BM": 16}],
}
"""Tiles to try, widest first, for a tactic within PLAIN_SHARED; all with one stage."""

DECLARED = re.compile(r"\.param \.(\w+)[^\n,]*?(\w+_param_(\d+))")


def compile_calls(
    requests: Sequence[tuple[Call, Variant, float]], folder: Path
) -> list[list[dict[str, Any]]]:
    """Compile the chains of calls into `folder`: for each its nodes, as `trt/aot_plugin.py` reads.

    requests: the call, what its kernels are compiled for, and the scale of its logits.

    Raises:
        NotAvailableError: triton is missing or its compiler fails.
        ExportError: a kernel without a tactic that a plain launch can carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([[asdict(c), asdict(v), scale] for c, v, scale in requests])
    done = run_module("freqopt.exporters.tensorrt.aot.ptx", folder, text)
    if done.returncode:
        raise NotAvailableError(
            f"the kernels could not be compiled; Triton's last words: {done.stderr[-1500:]}"
        )
    nodes: list[list[dict[str, Any]]] = json.loads((folder / "chains.json").read_text())
    (folder / "chains.json").unlink()
    for node in (node for chain_ in nodes for node in chain_):
        if min(t["shared"] for t in node["tactics"]) > PLAIN_SHARED:
            raise ExportError(
                f"the {node['kernel']} kernel has no tiles within {PLAIN_SHARED} bytes of shared "
                "memory, which is all that a plugin compiled ahead of time is sure to get; export "
                "with plugin='cpp'"
            )
    return nodes


def reorder(ptx: str, arguments: Sequence[str], wanted: Sequence[tuple[str, str | None]]) -> str:
    """The PTX with its parameters in the order of `wanted`, and without debug information.

    arguments: the kernel's in Triton's order; wanted: ("u64" | "u32", argument), None for one that
    the kernel does not take. Kernel arguments that are not wanted must be unread.

    Raises:
        RuntimeError: a parameter that nobody passes is read, or one has another size.
    """
    ptx = strip_debug(ptx)
    start = ptx.index("(", ptx.index(".entry"))
    end = ptx.index("\n)", start)
    body = ptx[end:]
    declared = {int(i): (kind, name) for kind, name, i in DECLARED.findall(ptx[start:end])}
    if len(declared) != len(arguments) + 2:
        raise RuntimeError(f"{len(declared)} parameters for {len(arguments)} arguments and scratch")
    place = {name: i for i, name in enumerate(arguments)}
    lines, passed = [], set()
    for at, (kind, argument) in enumerate(wanted):
        if argument is None:
            lines.append(f"\t.param .{kind} unread_{at}")
            continue
        found, name = declared[place[argument]]
        if found != kind:
            raise RuntimeError(f"{argument} is compiled as {found} and passed as {kind}")
        lines.append(f"\t.param .{kind} {name}")
        passed.add(place[argument])
    read = {int(i) for i in re.findall(r"_param_(\d+)\b", body)}
    if read - passed:
        missing = [arguments[i] if i < len(arguments) else "scratch" for i in read - passed]
        raise RuntimeError(f"the kernel reads {', '.join(missing)}, which nobody passes")
    return ptx[: start + 1] + "\n" + ",\n".join(lines) + body


def strip_debug(ptx: str) -> str:
    """PTX without line tables: they name source files of the machine that compiled it."""
    cut = re.search(r"^\s*\.section\s+\.debug", ptx, re.MULTILINE)
    text = ptx[: cut.start()] if cut else ptx
    kept = (x for x in text.splitlines() if not re.match(r"\s*(\.loc|\.file)\s|\s*//", x))
    return re.sub(r"(\.target \w+), debug", r"\1", "\n".join(kept)) + "\n"


def node_of(
    step: Step, call: Call, variant: Variant, scale: float, given: Any, folder: Path
) -> dict[str, Any]:
    """One node of the table, its tactics compiled. given: the kernel's Specialised."""
    function, names = given.function, list(given.function.arg_names)
    outputs = {o.argument for o in step.outputs}
    integers = [n for n in names if n in step.integers and n not in given.constants]
    inputs = [(None, name) for name in step.unread] + list(step.inputs.items())
    rewritten = {o.rewrites for o in step.outputs}
    wanted: list[tuple[str, str | None]] = [
        ("u64", None if tensor in rewritten else argument) for argument, tensor in inputs
    ]
    wanted += [("u32", name) for name in integers]
    wanted += [("u64", o.argument) for o in step.outputs]
    assert outputs <= set(names), f"{function} takes no {outputs - set(names)}"
    tactics: list[dict[str, Any]] = []
    for option in _tilings(given, variant):  # compiling is slow: no further than one that fits
        tactic = _tactic(option, step, variant, scale, wanted, folder)
        fits = tactic["shared"] <= PLAIN_SHARED
        if fits or not tactics:
            tactics.append(tactic)
        if fits:
            break
    own = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[variant.dtype]

    def kind(argument: str) -> str:
        found = element_type(argument)
        return own if found == "own" else found

    node: dict[str, Any] = {
        "kernel": step.kernel,
        "inputs": len(inputs),
        "outputs": [
            {
                "type": kind(o.argument),
                "shape": list(o.shape),
                "rewrites": None
                if o.rewrites is None
                else [tensor for _, tensor in inputs].index(o.rewrites),
            }
            for o in step.outputs
        ],
        "integers": [_checked(name, step.integers[name]) for name in integers],
        "tactics": tactics,
    }
    digest = hashlib.sha256(json.dumps(node, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "name": f"{step.kernel}_{digest}",
        **node,
        "input_names": [tensor for _, tensor in inputs],
        "output_names": [o.name for o in step.outputs],
    }


def _checked(name: str, value: int) -> int:
    if value >= 2**31:
        raise ExportError(f"{name} is {value}, and kernels count in 32 bits; export fewer tokens")
    return value


def _tilings(given: Any, variant: Variant) -> list[Any]:
    tilings = [given]
    for option in SMALL.get(given.name, []):
        options = {**given.options, "num_stages": 1}
        options.update({k: v for k, v in option.items() if k in options})
        constants = {**given.constants}
        for k, v in option.items():
            if k in constants:
                constants[k] = min(v, constants[k])
        tilings.append(given._replace(constants=constants, options=options))
    return tilings


def _tactic(
    given: Any,
    step: Step,
    variant: Variant,
    scale: float,
    wanted: list[tuple[str, str | None]],
    folder: Path,
) -> dict[str, Any]:
    from freqopt.kernels.specialise import compile_specialised

    names = list(given.function.arg_names)
    fixed = {"scale": scale} if "scale" in names else {}
    given = given._replace(constants={**given.constants, **fixed})
    made = compile_specialised(given, variant)
    arguments = [n for n in names if n not in given.constants]
    text = reorder(made.asm["ptx"], arguments, wanted)
    file = f"{given.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.ptx"
    (folder / file).write_text(text)
    return {
        "ptx": file,
        "symbol": made.metadata.name,
        "warps": made.metadata.num_warps,
        "shared": made.metadata.shared,
        "grid": [_axis(a, given.constants) for a in step.grid],
    }


def _axis(axis: Any, constants: dict[str, Any]) -> list[int]:
    """[programs, whether they are times the batch]."""
    if isinstance(axis, Batch):
        return [axis.times, 1]
    if isinstance(axis, int):
        return [axis, 0]
    name, count = axis
    return [-(-count // constants[name]), 0]


def main() -> None:
    """Read calls as JSON from standard input, compile their chains into the folder given."""
    from freqopt.kernels.specialise import specialisations

    folder, found = Path(sys.argv[1]), []
    for call, variant, scale in json.load(sys.stdin):
        made, about = Call(**call), Variant(**variant)
        kernels = {given.name: given for given in specialisations(about)}
        found.append(
            [node_of(s, made, about, scale, kernels[s.kernel], folder) for s in chain(made)]
        )
    used = {t["ptx"] for nodes in found for node in nodes for t in node["tactics"]}
    for path in folder.glob("*.ptx"):
        if path.name not in used:
            path.unlink()
    (folder / "chains.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
