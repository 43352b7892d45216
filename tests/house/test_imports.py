"""Imports stay light and point down only (CONTRIBUTING.md, "Direction of imports")."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "freqopt"
LINKED = ("passes", "kernels", "exporters", "models_zoo")

HEAVY = {
    "diffusers",
    "jinja2",
    "matplotlib",
    "networkx",
    "onnx",
    "onnxruntime",
    "pydantic",
    "rich",
    "safetensors",
    "tensorrt",
    "transformers",
    "triton",
    "typer",
}
OPTIONAL = {"diffusers", "onnx", "onnxruntime", "onnxscript", "tensorrt", "transformers"}

BASE = {"break_even", "chunks", "config", "errors", "files", "grid", "positions", "shown"}
CORE = {
    "backend",
    "calibration",
    "capture",
    "decisions",
    "eager",
    "given_grid",
    "inspection",
    "options",
    "parallel",
    "plan",
    "progress",
    "regional",
    "reuse",
    "selecting",
    "telling",
    "turns",
}

FLOORS = (
    *("values", "team", "outputs", "samples", "samples_file", "checkpoint", "randomness", "given"),
    "misfits",
    *("measure", "runner", "search", "estimate", "survey", "whole", "asked", "evidence"),
    *("moving", "fewer", "phases"),
    "calibrate",
)
"""Of calibration, from the ground up: a module imports from its own floor and from lower ones."""

NOT_INSTALLED = "models_zoo.training."

LAYERS = {
    "base": 0,
    "kernels": 1,
    "passes": 2,
    "core": 3,
    "top": 4,
    "models_zoo": 4,
}
"""A module imports from its own layer and from lower ones."""

ALLOWED_OUTSIDE = {
    "base": {"torch", "numpy", "platformdirs", "filelock"},
    "kernels": {"torch", "triton", "numpy"},
    "passes": {"torch", "networkx", "numpy"},
    "models_zoo": {"torch", "safetensors", "rich", "numpy"},
}


def modules() -> dict[str, Path]:
    """Every module of ours as {name inside freqopt: file}."""
    own = [d for d in PACKAGE.iterdir() if d.is_dir() and not d.is_symlink()]
    files = [*PACKAGE.glob("*.py"), *(f for d in own for f in d.rglob("*.py"))]
    linked = [f for d in LINKED for f in (ROOT / d).rglob("*.py")]
    named = [(f.relative_to(PACKAGE), f) for f in files] + [
        (f.relative_to(ROOT), f) for f in linked
    ]
    return {".".join(name.with_suffix("").parts): file for name, file in named}


def layer_of(name: str) -> str:
    """Layer of a module named relative to freqopt; '__init__' is the lazy front, on top of all."""
    first = name.split(".")[0]
    if first in ("kernels", "passes", "models_zoo"):
        return first
    if first == "exporters":
        return "top"
    if first in BASE:
        return "base"
    return "core" if any(first == c or first.startswith(f"{c}_") for c in CORE) else "top"


def imports_of(tree: ast.AST, *, at_import: bool) -> Iterator[str]:
    """Dotted names that a module imports: anywhere, or only what runs at its own import."""
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports_of(node, at_import=at_import)


def inner_target(imported: str, known: dict[str, Path]) -> str | None:
    """The module inside freqopt that an import names, or None for one from outside."""
    parts = imported.split(".")
    if parts[0] != "freqopt":
        return None
    for length in range(len(parts), 1, -1):
        if ".".join(parts[1:length]) in known:
            return ".".join(parts[1:length])
    return "__init__"


@pytest.mark.parametrize("name", sorted(modules().keys() - {"__init__", "__main__"}))
def test_imports_point_down(name: str) -> None:
    known = modules()
    own = layer_of(name)
    for imported in imports_of(ast.parse(known[name].read_text()), at_import=False):
        target = inner_target(imported, known)
        if target == "__init__":
            # `import freqopt` alone loads nothing else; what is reached through it must not be
            # used to go up.
            public = imported.split(".")[1:2]
            assert own == "top" or public in ([], ["__version__"]), f"{name} imports {imported}"
            continue
        if target is None:
            first = imported.split(".")[0]
            assert first not in LINKED, f"{name}: import freqopt.{first}, not the bare {first}"
            allowed = ALLOWED_OUTSIDE.get(own)
            if allowed is not None and first not in sys.stdlib_module_names:
                assert first in allowed, f"{name} ({own}) imports {first}; allowed: {allowed}"
            continue
        if target.startswith(NOT_INSTALLED):
            assert name.startswith(NOT_INSTALLED), f"{name} imports {imported}: not in the wheel"
        if own == "models_zoo":
            assert layer_of(target) == "models_zoo", f"{name} imports {imported}: not torch only"
            continue
        assert LAYERS[layer_of(target)] <= LAYERS[own], (
            f"{name} ({own}) imports {imported} ({layer_of(target)}): imports point down only"
        )


def needs_of(known: dict[str, Path]) -> dict[str, set[str]]:
    """{module: modules among these that it imports}, imports for type checking included."""
    needs: dict[str, set[str]] = {}
    for name, file in known.items():
        nodes = ast.walk(ast.parse(file.read_text()))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        named = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
        needs[name] = {inner_target(each, known) or "" for each in named} & set(known)
    return needs


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Each module can be read after those that it needs; the lazy front names all of them."""
    known = {name: file for name, file in modules().items() if name != "__init__"}
    needs = needs_of(known)
    assert sum(map(len, needs.values())) > 800
    for room in ("passes", "calibration", "plan"):
        assert sum(len(each) for name, each in needs.items() if name.startswith(room)) > 10
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({**needs, "plan.records": {"calibration.phases"}}).prepare()


def test_data_flows_one_way_in_calibration() -> None:
    height = {floor: number for number, floor in enumerate(FLOORS)}
    known = {n: f for n, f in modules().items() if n.split(".")[0] in ("plan", "calibration")}
    for name, targets in needs_of(known).items():
        room, *inside = name.split(".")
        for target in targets:
            target_room, *target_inside = target.split(".")
            assert target_room in ("plan", room), f"{name} imports {target}"
            if target_room == "calibration":
                assert height[target_inside[0]] <= height[inside[0]], f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_optional_packages_are_imported_where_they_are_used(name: str) -> None:
    """The exporters are loaded on use themselves, so onnx at their top is where it is used."""
    found = imports_of(ast.parse(modules()[name].read_text()), at_import=True)
    allowed = {"onnx", "onnxscript"} if name.startswith("exporters.") else set()
    assert not (OPTIONAL - allowed) & {imported.split(".")[0] for imported in found}


def test_the_direction_test_sees_a_wrong_import() -> None:
    tree = ast.parse("def f():\n    from freqopt.backend import freqopt_backend\n")
    assert list(imports_of(tree, at_import=False)) == ["freqopt.backend.freqopt_backend"]
    assert list(imports_of(tree, at_import=True)) == []
    known = {"backend": Path(), "passes.find": Path()}
    assert inner_target("freqopt.backend.freqopt_backend", known) == "backend"
    assert inner_target("freqopt.passes.find.find_sites", known) == "passes.find"
    assert inner_target("freqopt.calibrate", known) == "__init__"
    assert inner_target("torch.fx", known) is None
    assert LAYERS[layer_of("calibration_measure")] > LAYERS[layer_of("passes.find")]
    assert layer_of("reporting") == layer_of("cli") == layer_of("exporters.onnx") == "top"


@functools.cache
def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport json, sys; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.smoke
def test_import_is_light() -> None:
    with_torch = loaded_by("import torch")
    added = loaded_by("import freqopt; dir(freqopt)") - with_torch
    assert not HEAVY & added, "import freqopt loads what it does not need"
    assert "freqopt" in added


@pytest.mark.parametrize("heavy", ["triton", "matplotlib"])
def test_the_op_loads_nothing_it_does_not_need(heavy: str) -> None:
    added = loaded_by("import freqopt; freqopt.split_attention") - loaded_by("import torch")
    assert heavy not in added


def test_an_unknown_name_is_an_attribute_error() -> None:
    import freqopt

    with pytest.raises(AttributeError, match="no attribute 'splitt'"):
        freqopt.splitt  # noqa: B018
