"""The examples of pipelines run as they are, on tiny pipelines, and stay short."""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch

import freqopt

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = {
    "optimize_wan": ("wan", "WanPipeline"),
    "optimize_cogvideox": ("cogvideox", "CogVideoXPipeline"),
    "optimize_hunyuan": ("hunyuan", "HunyuanVideoPipeline"),
    "optimize_ltx": ("ltx", "LTXPipeline"),
    "optimize_flux": ("flux", "FluxPipeline"),
}


def small(piped: pipelines.Piped) -> Any:
    """The pipeline, which takes a text for its embeddings and any size for its own."""
    kind = type(piped.pipe)

    class Small(kind):  # type: ignore[misc, valid-type]
        @functools.wraps(kind.__call__)
        def __call__(self, prompt: str | None = None, **options: Any) -> Any:
            own = {**piped.call, "output_type": "latent"}
            return super().__call__(**own)

        def to(self, *_: Any, **__: Any) -> Any:
            return self

        def enable_model_cpu_offload(self) -> None:
            for block in self.transformer.transformer_blocks:
                block.forward = functools.partial(block.forward)

    piped.pipe.__class__ = Small
    return piped.pipe


@pytest.mark.parametrize("name", KINDS)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, pipeline = KINDS[name]
    piped = pipelines.made(kind)
    second = tmp_path / "plans"
    if name in ("optimize_wan", "optimize_flux"):
        second = tmp_path / "prompts.txt"
        second.write_text("a cat\na dog\n")
        fast = functools.partial(
            freqopt.calibrate, rounds=0, progress=False, order="grid", timestep_buckets=1
        )
        monkeypatch.setattr(
            "freqopt.front.optimize.calibrate", functools.wraps(freqopt.calibrate)(fast)
        )
    else:
        plans = piped.plans(1.0)
        if name == "optimize_ltx":
            monkeypatch.setattr(freqopt.Plan, "at", lambda plan, target_error: plan)
        freqopt.Plans(plans).save_pretrained(second)
    monkeypatch.setattr("freqopt.backend.inner_backend", lambda *_: lambda gm, _: gm.forward)
    # The plans of these tests have no evidence, which the pages are about.
    monkeypatch.setattr("freqopt.reporting.report.report", lambda plan, path: Path(path))
    loaded = small(piped)
    monkeypatch.setattr(
        getattr(diffusers, pipeline), "from_pretrained", staticmethod(lambda *_, **__: loaded)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "model", str(second)])
    with torch.no_grad():
        runpy.run_path(str(EXAMPLES / f"{name}.py"))
    shown = capsys.readouterr().out
    assert "transformer" in shown and "probe error" in shown
    if name not in ("optimize_wan", "optimize_flux"):  # whose tiny plans may split nothing
        assert "not called yet" not in shown


def test_examples_are_short() -> None:
    for name in KINDS:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 25
