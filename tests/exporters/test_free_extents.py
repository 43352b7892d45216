"""Free extents: lengths that a plan serves, and extents that were asked to be free and are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from calibration_models import TinyVideo, make_model
from plans import plan_of
from safetensors.torch import save_file
from typer.testing import CliRunner

from freqopt.cli.export import _dynamic_shapes, run_command_app
from freqopt.errors import OptionError, PlanError
from freqopt.exporters.exchange import exchange_plan
from freqopt.exporters.lengths import _UnknownError, check_served, evaluated, length_notes
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx.export import export_onnx, write_onnx
from freqopt.exporters.program import Program, make_program
from freqopt.exporters.runner import run_artifact
from freqopt.exporters.tensorrt.export import export_tensorrt
from freqopt.plan.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore")
FREE = torch.export.Dim.AUTO
ALL = {"video": {0: FREE, 2: FREE, 3: FREE, 4: FREE}, "timestep": {0: FREE}}
SITES = ("blocks.0.attn", "blocks.1.attn")


def call(t: int, h: int, w: int, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(batch, 3, t, 2 * h, 2 * w, generator=generator)
    return {"video": video, "timestep": torch.rand(batch, generator=generator)}


def with_tokens(plan: Plan, tokens: int) -> Plan:
    sites = {n: s.model_copy(update={"tokens": tokens}) for n, s in plan.sites.items()}
    return plan.model_copy(update={"sites": sites})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(make_model().eval(), call(3, 6, 10), 3.0)


@pytest.fixture(scope="module")
def artifact(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = make_model().eval()
    program = make_program(model, (), call(3, 6, 10, 2), plan=plan, dynamic_shapes=ALL)
    return write_onnx(program, tmp_path_factory.mktemp("free"), plan=plan, library=False)


@pytest.mark.smoke
def test_a_file_says_and_keeps_the_lengths_of_its_plan(artifact: Artifact) -> None:
    assert artifact.manifest["plan"]["lengths"] == {site: [23, 1440] for site in SITES}
    (note,) = (note for note in artifact.notes if "tokens" in note)
    assert "23 to 1440 tokens" in note and "video[2]" in note
    for served in (call(3, 6, 10), call(5, 7, 9, 2), call(15, 8, 12)):
        assert run_artifact(artifact, served, provider="cpu").outputs
    for off, tokens in ((call(2, 3, 3), 18), (call(9, 13, 14), 1638)):
        with pytest.raises(PlanError, match=rf"over {tokens} tokens .* 23 to 1440"):
            run_artifact(artifact, off, provider="cpu")


def test_the_command_refuses_other_lengths(artifact: Artifact, tmp_path: Path) -> None:
    save_file(call(9, 13, 14), tmp_path / "in.safetensors")
    args = [str(artifact.path), "--inputs", str(tmp_path / "in.safetensors")]
    result = CliRunner().invoke(run_command_app, args)
    assert isinstance(result.exception, PlanError) and "1638 tokens" in str(result.exception)


def test_an_example_off_the_plan_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="factor of 8"):
        make_program(make_model(), (), call(9, 13, 14, 2), plan=plan, dynamic_shapes=ALL)


def test_another_plan_brings_its_own_lengths(plan: Plan, tmp_path: Path) -> None:
    model, other = make_model().eval(), with_tokens(plan, 1000)
    for folder in ("free", "fixed"):
        (tmp_path / folder).mkdir()
    program = make_program(model, (), call(3, 6, 10, 2), plan=plan, dynamic_shapes=ALL)
    artifact = write_onnx(program, tmp_path / "free", plan=plan, library=False)
    changed = exchange_plan(artifact, other)
    assert any("125 to 8000 tokens" in note for note in changed.notes)
    check_served(changed.manifest, call(9, 13, 14))
    with pytest.raises(PlanError, match="125 to 8000"):
        check_served(changed.manifest, call(3, 4, 5))
    program = make_program(model, (), call(3, 6, 10), plan=plan)
    fixed = write_onnx(program, tmp_path / "fixed", plan=plan, library=False)
    assert [site["length"] for site in fixed.sites.values()] == [180, 180]
    assert not any("tokens" in note for note in fixed.notes)
    with pytest.raises(PlanError, match="180 tokens here"):
        exchange_plan(fixed, with_tokens(plan, 10_000))


def test_a_length_that_sizes_do_not_tell_is_noted(plan: Plan) -> None:
    (note,) = length_notes(dict.fromkeys(SITES), plan)
    assert "cannot be told" in note
    assert not length_notes(dict.fromkeys(SITES), None)


@pytest.mark.parametrize(
    "formula", ["__import__('os')", "2 ** 99", "video.shape", "other[0]", "video[9]", "1 // 0", "("]
)
def test_formulas_are_sums_products_and_divisions(formula: str) -> None:
    """A manifest may come from a stranger; what is read nowhere else refuses nothing."""
    with pytest.raises(_UnknownError):
        evaluated(formula, call(3, 6, 10))
    for deep in ("(" * 900 + "1" + ")" * 900, "-" * 1900 + "1", "9*" * 2000 + "9"):
        try:
            evaluated(deep, {})
        except _UnknownError:
            continue
    assert evaluated("(video[2] + 1) * (video[3] // 5) - 7 % 4", call(3, 6, 10)) == 4 * 2 - 3


def test_symbols_that_are_parts_of_a_size(tmp_path: Path) -> None:
    """Where a model lets only even sizes through, an input's size is twice the symbol."""

    class Even(TinyVideo):
        def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
            return super().forward(video.unflatten(3, (-1, 2)).flatten(3, 4), timestep)

    torch.manual_seed(0)
    model = Even().eval()
    example = call(3, 6, 10, 2)
    program = make_program(
        model, (), example, plan=plan_of(model, example, 3.0), dynamic_shapes=ALL
    )
    lengths = [site.length for site in program.split.values()]
    assert len(lengths) == 2
    for length in lengths:
        assert isinstance(length, str) and evaluated(length, call(5, 7, 9)) == 5 * 7 * 9


def notes_of(program: Program) -> list[str]:
    return [note for note in program.notes if "asked to be free" in note]


def test_extents_that_were_asked_to_be_free_and_are_fixed(plan: Plan) -> None:
    model, one, two = make_model().eval(), call(3, 6, 10), call(3, 6, 10, 2)
    found = notes_of(make_program(model, (), one, plan=plan, dynamic_shapes=ALL))
    assert [note.split()[0] for note in found] == ["video.0", "timestep.0"]
    assert all("fixed at 1" in note and "2 or more" in note for note in found)
    positional = (({0: FREE, 2: FREE}), {0: FREE})
    found = notes_of(make_program(model, tuple(one.values()), plan=plan, dynamic_shapes=positional))
    assert [note.split()[0] for note in found] == ["video.0", "timestep.0"]
    assert not notes_of(make_program(model, (), two, plan=plan, dynamic_shapes=ALL))
    channels = {"video": {0: FREE, 1: FREE}, "timestep": {0: FREE}}
    (note,) = notes_of(make_program(model, (), two, plan=plan, dynamic_shapes=channels))
    assert note.startswith("video.1 ") and "fixed at 3: the model" in note


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, given: dict[str, Any], more: list[Tensor]) -> Tensor:
        return self.inner(given["video"], more[0])["velocity"]  # type: ignore[no-any-return]


def test_extents_inside_of_dicts_and_lists() -> None:
    example = call(3, 6, 10)
    nested = {"more": [example["timestep"]], "given": {"video": example["video"]}}
    shapes = {"more": [{0: FREE}], "given": {"video": {0: FREE, 2: FREE}}}
    found = notes_of(make_program(Nested().eval(), (), nested, dynamic_shapes=shapes))
    assert sorted(note.split()[0] for note in found) == ["given.video.0", "more.0.0"]
    with pytest.raises(OptionError, match=r"dimension 1 of more\.0"):
        make_program(Nested(), (), nested, dynamic_shapes={**shapes, "more": [{1: FREE}]})


def test_dimensions_that_an_input_does_not_have(plan: Plan) -> None:
    shapes = {**ALL, "video": {9: FREE}}
    with pytest.raises(OptionError, match=r"dimension 9 of video.*0 to 4"):
        make_program(make_model(), (), call(3, 6, 10), plan=plan, dynamic_shapes=shapes)
    with pytest.raises(OptionError, match=r"'video:9': video .* 5 dimensions.*0 to 4"):
        _dynamic_shapes(["video:9"], call(3, 6, 10))
    with pytest.raises(OptionError, match="none can be free"):
        _dynamic_shapes(["scale:0"], {"scale": 2.0})


def test_a_manifest_of_before_is_read(artifact: Artifact) -> None:
    """Folders without lengths refuse nothing."""
    manifest = json.loads(json.dumps(artifact.manifest))
    del manifest["plan"]["lengths"]
    check_served(manifest, call(9, 13, 14))
    check_served({**manifest, "plan": None}, call(9, 13, 14))


def test_a_grid_that_the_graph_contradicts_is_noted() -> None:
    for grid, noted in (((6, 3, 10), True), ((3, 6, 10), False), (None, False)):
        program = make_program(make_model(), (), call(3, 6, 10), grid=grid)
        said = f"grid={grid} was given and the graph shows 3x6x10 at blocks.0.attn and 1 more"
        assert [note.startswith(said) for note in program.notes] == [True] * noted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probes": -1}, "probes is -1; a whole number"),
        ({"probes": "x"}, "probes is 'x'"),
        ({"probes": 2.0}, r"probes is 2\.0"),
        ({"capabilities": 90}, "capabilities is 90; a list"),
        ({"capabilities": "90"}, "capabilities is '90'; a list"),
        ({"capabilities": [9.0]}, "a list of whole numbers"),
        ({"opset": "20"}, "opset is '20', a str"),
        ({"opset": 20.0}, r"opset is 20\.0, a float"),
        ({"out_dir": 5}, "out_dir is 5; the path"),
        ({"out_dir": ""}, "out_dir is ''; the path"),
        ({"kwargs": {name: x[:0] for name, x in call(3, 6, 10).items()}}, "an empty batch"),
    ],
)
def test_options_of_another_kind(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = nn.Linear(1, 1)  # found before it is looked at
    given = {"kwargs": {}, "out_dir": tmp_path / "out", **options}
    with pytest.raises(OptionError, match=said):
        export_onnx(model, (), **given)
    assert not (tmp_path / "out").exists()
    given.pop("opset", None)
    if "opset" not in options:
        with pytest.raises(OptionError, match=said):
            export_tensorrt(model, (), **given)
