"""The examples of the gallery run as they are, and say what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import freqopt

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "wan_two_experts": "diffusers",
    "flux_packed": "diffusers",
    "hunyuan_video": "diffusers",
    "videomae": "transformers",
    "own_model": "torch",
    "several_gpus": "torch",
}
OF_OTHER_TESTS = {
    "deploy_onnxruntime",
    "build_tensorrt_engine",
    "wan_ulysses",
    "optimize_wan",
    "optimize_flux",
    "optimize_hunyuan",
    "optimize_ltx",
    "optimize_cogvideox",
}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(NEEDS[name])
    torch._dynamo.reset()
    freqopt.reset_counters()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out  # what ran is forgotten with the models, but was printed
    torch._dynamo.reset()
    (split,) = re.findall(r"(\d+) attention calls (?:were )?split", said)
    assert int(split) >= 2, said
    if name == "wan_two_experts":
        rows = {line.split()[0] for line in said.splitlines() if "WanTransformer3DModel" in line}
        assert {"transformer", "transformer_2"} <= rows and int(split) >= 8
    elif name == "flux_packed":
        assert "the grid, read off the positions: [(1, 16, 24)]" in said
    elif name == "hunyuan_video":
        assert 0 < float(said.strip().rsplit(" ", 1)[1]) < 0.1
    elif name == "videomae":
        assert 0.9 < float(said.strip().rsplit(" ", 1)[1]) <= 1.0
    elif name == "several_gpus":
        assert "rank 0 of 1: 2 attention calls were split" in said


def test_the_gallery_lists_every_example() -> None:
    text = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    listed = set(re.findall(r"\(\.\./examples/([\w.]+)\)", text))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {Path(name).stem for name in listed} == {*NEEDS, *OF_OTHER_TESTS, "quick_start"}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small settings, in a kernel of its own, as Jupyter runs it."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source = "frames, height, width, steps = 3, 28, 36, 4\ntarget_error = 0.1"
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in outputs)
    assert "attention calls split" in said and "PSNR" in said
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert freqopt.Plan.load(tmp_path / "plan.json").measured_error <= 0.1
    assert (tmp_path / "report.html").exists()
