"""Launch choices on disk: kept, read back, refused where they cannot be trusted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from freqopt.cli.kernels import problem_of
from freqopt.errors import OptionError
from freqopt.kernels import autotune, tuned
from freqopt.kernels.tiles import launch_for

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def pretend_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name and shared memory, and an empty cache folder."""
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1000 (PCIe)")
    monkeypatch.setattr(tuned, "shared_memory", lambda device: 101_376)
    tuned._launch_of.cache_clear()


def launch(tokens: int = 30_000, dtype: torch.dtype = torch.float16, dim: int = 128) -> object:
    return tuned.launch_on(GPU, dtype, dim, tokens)


def test_without_a_file_the_shipped_choice_runs() -> None:
    assert launch() == launch_for(torch.float16, 128, 101_376)


def test_a_kept_choice_runs_in_its_bucket_only() -> None:
    shipped = launch_for(torch.float16, 128, 101_376)
    launch()  # what was read before must not stick
    path = tuned.keep_choice(GPU, torch.float16, 128, tuned.bucket_of(9_000), {"rows": 64})
    tuned.keep_choice(GPU, torch.float16, 128, tuned.bucket_of(32_768), {"score_tiles": 2})
    assert path.name == "launches-nvidia-test-1000-pcie.json"
    assert launch() == shipped._replace(rows=64, score_tiles=2)
    assert launch(tokens=8_192) == launch(tokens=40_000) == launch(tokens=10**6) == shipped
    assert launch(dtype=torch.float32) == launch_for(torch.float32, 128, 101_376)
    assert launch(dim=64) == launch_for(torch.float16, 64, 101_376)
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"choices": 3}',
        '{"choices": {"x": {"rows": 24}}, "made_for": {}}',
        '{"choices": {"x": {"precision": "tf32"}}, "made_for": {}}',
        '{"choices": {"x": {"warps": true}}, "made_for": {}}',
    ],
)
def test_a_broken_file_is_named_and_ignored(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tuned.file_of(GPU)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert launch() == launch_for(torch.float16, 128, 101_376)
    assert str(path) in caplog.text and "cannot be used" in caplog.text


@pytest.mark.parametrize("changed", ["device", "triton", "kernels"])
def test_choices_of_other_kernels_are_ignored(
    changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned.keep_choice(GPU, torch.float16, 128, tuned.bucket_of(30_000), {"rows": 64})
    held = json.loads(path.read_text())
    held["made_for"][changed] = "other"
    path.write_text(json.dumps(held))
    tuned._launch_of.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert launch() == launch_for(torch.float16, 128, 101_376)
    assert "freqopt kernels tune" in caplog.text


def test_half_precision_has_two_programs_to_a_processor_where_they_fit() -> None:
    chosen = launch_for(torch.bfloat16, 128)
    assert (chosen.rows, chosen.warps, chosen.stages) == (64, 4, 3)
    assert launch_for(torch.bfloat16, 128, 101_376).rows == 128


def test_a_field_no_launch_has_is_refused() -> None:
    with pytest.raises(ValueError, match="rows is 65"):
        tuned.keep_choice(GPU, torch.float16, 128, tuned.bucket_of(1), {"rows": 65})
    assert not tuned.file_of(GPU).exists()


def choose(times: dict[tuple[int, int], float], wrong: frozenset[int] = frozenset()) -> object:
    """Outcome for a part whose time and results are made up, by (rows, warps)."""
    launched: list[tuple[int, int]] = []

    def run(launch: autotune.Launch) -> tuple[torch.Tensor, ...]:
        launched.append((launch.rows, launch.warps))
        if launch.warps == 2:
            raise autotune.TritonError("out of registers")
        return (torch.full((4,), 3.0 if launch.rows in wrong else 1.0),)

    def timer(call: object) -> float:
        call()  # type: ignore[operator]
        return times[launched[-1]]

    candidates = [dict(rows=rows, warps=warps) for rows in (32, 64, 128) for warps in (2, 4)]
    shipped = launch_for(torch.float16, 128)._replace(rows=128, warps=8)
    steps: list[int] = []
    found = autotune.choose(
        autotune.Part("attention", candidates, run), shipped, timer, lambda: steps.append(1)
    )
    assert len(steps) == len(candidates)
    return found


def test_the_fastest_candidate_that_is_right_is_chosen() -> None:
    times = {(128, 8): 2.0, (32, 4): 0.5, (64, 4): 1.0, (128, 4): 0.99}
    assert choose(times) == autotune.Chosen(
        "attention", {"rows": 32, "warps": 4}, 0.5, 2.0, tried=6, failed=3, wrong=0
    )
    assert choose(times, frozenset({32})) == autotune.Chosen(
        "attention", {"rows": 64, "warps": 4}, 1.0, 2.0, tried=6, failed=3, wrong=1
    )


def test_a_gain_within_the_noise_changes_nothing() -> None:
    times = {(128, 8): 2.0, (32, 4): 1.99, (64, 4): 3.0, (128, 4): 2.0}
    found = choose(times)
    assert (found.fields, found.ms) == ({}, 2.0)  # type: ignore[attr-defined]


def test_results_that_are_not_finite_are_wrong() -> None:
    one = (torch.ones(3),)
    assert autotune.agrees(one, one)
    assert not autotune.agrees((torch.tensor([1.0, 1.0, torch.nan]),), one)
    assert not autotune.agrees((torch.tensor([1.0, 1.0, 1.1]),), one)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((128, "float64", 24, "21,30,52"), "no kernels for float64"),
        ((128, "float16", 24, "21,30"), "not three positive extents"),
        ((128, "float16", 0, "21,30,52"), "heads is 0"),
        ((128, "float16", 24, "21,30,52"), "needs an NVIDIA GPU"),
    ],
)
def test_bad_options_and_no_gpu_say_so(options: tuple, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        problem_of(*options)
