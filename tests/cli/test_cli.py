"""The command line: what each command writes, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_plans import full_plan
from torch import nn

import freqopt
from freqopt import doctor
from freqopt.__main__ import command
from freqopt.calibration.samples_file import load_samples, save_samples
from freqopt.cli import app as cli
from freqopt.cli.arguments import choose_device, load_model, parse_grid
from freqopt.errors import InputError, OptionError, PlanError
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans

FACTORY = '''
"""A one-layer video transformer over tokens of a (4, 8, 8) grid, as a user would write it."""
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.patchify = nn.Conv3d(3, 32, (1, 2, 2), stride=(1, 2, 2))
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, video, timestep):
        x = self.patchify(video)
        x = x.flatten(2).transpose(1, 2) * (1 + timestep[:, None, None])
        q, k, v = (p.unflatten(2, (2, 16)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))

def make():
    torch.manual_seed(0)
    return Tiny()

READY = make()

def number():
    return 7
'''


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with models.py and samples.safetensors, made the current one."""
    (tmp_path / "models.py").write_text(FACTORY)
    calls = []
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        video = torch.randn(1, 3, 4, 16, 16, generator=generator)
        calls.append({"video": video, "timestep": torch.tensor([index / 4 + 0.1])})
    save_samples(tmp_path / "samples.safetensors", calls)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("models", None)
    yield tmp_path
    sys.modules.pop("models", None)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(work: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit status and both streams."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        torch._dynamo.reset()
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        status = left.value.code or 0
        assert isinstance(status, int)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


def test_calibrate_and_report(work: Path, run: Run) -> None:
    done = run(
        "calibrate",
        "models:make",
        "--samples",
        "samples.safetensors",
        "--target-error",
        "0.2",
        "--device",
        "cpu",
        "-o",
        "out/plan.json",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    plan = Plan.load(work / "out/plan.json")
    assert plan.model.class_name == "Tiny" and plan.grids == [(4, 8, 8)]
    assert plan.target_error == 0.2 and plan.measured_error <= 0.2
    assert "wrote out/plan.json" in done.stdout
    done = run("report", "out/plan.json")
    assert done.returncode == 0, done.stderr
    page = (work / "out/plan.html").read_text()
    assert "Tiny" in page and "<script src" not in page


def test_several_experts_have_a_page_each(work: Path, run: Run) -> None:
    plans = Plans({"transformer": full_plan(), "transformer_2": full_plan()})
    plans.save(work / "plans.json")
    done = run("report", "plans.json", "-o", "pages/wan.html")
    assert done.returncode == 0, done.stderr
    names = sorted(page.name for page in (work / "pages").iterdir())
    assert names == ["wan-transformer.html", "wan-transformer_2.html"]
    told = json.loads(run("report", "plans.json", "--json").stdout)
    assert {name: each["format"] for name, each in told.items()} == dict.fromkeys(
        plans, "freqopt-plan"
    )
    with pytest.raises(PlanError, match="plans of several models: read it with freqopt.Plans.load"):
        Plan.load(work / "plans.json")


def test_inspect_prints_the_sites(run: Run) -> None:
    command = ("inspect", "models.py:make", "--samples", "samples.safetensors")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "self" in done.stdout and "256" in done.stdout and "min_tokens" in done.stdout
    done = run(*command, "--min-tokens", "1", "--grid", "4,8,8")
    assert done.returncode == 0 and "min_tokens" not in done.stdout


def test_a_damaged_plan_is_one_line(work: Path, run: Run) -> None:
    (work / "plan.json").write_text('{"format": "freqopt-pl')
    done = run("report", "plan.json")
    assert done.returncode == cli.BAD_INPUT
    assert done.stderr.startswith("freqopt: ") and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(PlanError, match="truncated"):
        cli.main(["--traceback", "report", "plan.json"])


def test_an_unknown_option_is_refused(run: Run) -> None:
    done = run("demo", "--sedd", "3")
    assert done.returncode == cli.BAD_INPUT and "--sedd" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_cuda_is_said(run: Run) -> None:
    done = run("demo", "--device", "cuda")
    assert done.returncode == cli.BAD_INPUT and "no CUDA" in done.stderr
    with pytest.raises(OptionError, match="no CUDA"):
        choose_device("cuda:1")


def test_models_are_found_by_module_and_by_file(work: Path) -> None:
    for text in ("models.py:make", "models:make", "models:READY"):
        model = load_model(text)
        assert type(model).__name__ == "Tiny" and not model.training
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("models", OptionError, "MODULE:FACTORY"),
        ("models.py:makee", OptionError, "did you mean make"),
        ("nothing.py:make", OptionError, "no file"),
        ("no_such_module_of_mine:make", OptionError, "no module"),
        ("models.py:number", InputError, "gives a int"),
    ],
)
def test_a_wrong_model_is_refused(work: Path, text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load_model(text)


def test_a_defect_inside_a_users_module_is_not_called_a_missing_one(work: Path) -> None:
    (work / "wanting.py").write_text("import surely_not_installed_anywhere\n")
    with pytest.raises(InputError, match="ModuleNotFoundError.*surely_not_installed"):
        load_model("wanting:make")


def test_an_error_of_the_users_factory_is_shown_as_theirs_in_two_lines(
    work: Path, run: Run
) -> None:
    (work / "failing.py").write_text("def make():\n    return {}['weights']\n")
    done = run("inspect", "failing.py:make", "--samples", "samples.safetensors")
    assert done.returncode == cli.BAD_INPUT and "Traceback" not in done.stderr
    first, second = done.stderr.strip().splitlines()
    assert first == "freqopt: failing.py:make failed: KeyError: 'weights'"
    assert "failing.py:2, in make" in second
    with pytest.raises(InputError) as caught:
        cli.main(["--traceback", "inspect", "failing.py:make", "--samples", "samples.safetensors"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_version_is_said(run: Run) -> None:
    done = run("--version")
    assert done.returncode == 0 and done.stdout == f"freqopt {freqopt.__version__}\n"


def test_two_targets_are_refused(run: Run) -> None:
    done = run(
        "calibrate",
        "models:make",
        "--samples",
        "samples.safetensors",
        "--target-error",
        "0.1",
        "--target-density",
        "0.5",
    )
    assert done.returncode == cli.BAD_INPUT and "both given" in done.stderr


@pytest.mark.usefixtures("no_code")
def test_how_the_model_will_run_is_passed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = freqopt.calibrate

    def calibrate(*arguments: Any, clock: str, **options: Any) -> Any:
        asked.append(clock)
        return original(*arguments, clock=clock, **options)

    monkeypatch.setattr(freqopt, "calibrate", calibrate)
    given = ("calibrate", "models:make", "--samples", "samples.safetensors", "--device", "cpu")
    quick = ("--rounds", "0", "--quiet", "--target-error", "0.2", "--order", "grid")
    done = run(*given, *quick, "--clock", "compiled")
    assert done.returncode == 0 and asked == ["compiled"], done.stderr
    done = run(*given, *quick)
    assert done.returncode == 0 and asked == ["compiled", "auto"], done.stderr
    done = run(*given, "--clock", "wall")
    assert done.returncode == cli.BAD_INPUT
    assert "clock 'wall' is none; supported: auto, eager, compiled, graphs" in done.stderr


def test_a_dry_run_measures_nothing(work: Path, run: Run) -> None:
    done = run("calibrate", "models:make", "--samples", "samples.safetensors", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 samples to fit and 2 held out; timestep 0.1 to 0.85" in done.stdout
    assert "would measure 1 sites" in done.stdout and not (work / "plan.json").exists()


def test_json_for_other_programs(run: Run) -> None:
    done = run("inspect", "models:make", "--samples", "samples.safetensors", "--json")
    (site,) = json.loads(done.stdout)["sites"]
    assert site["grid"] == [4, 8, 8] and site["eligible"]
    done = run("doctor", "--json")
    assert {"group", "name", "state", "detail"} == set(json.loads(done.stdout)[0])


@pytest.mark.parametrize("text", ["21,30,52", "21x30x52", "21, 30, 52"])
def test_grids(text: str) -> None:
    assert parse_grid(text) == (21, 30, 52)


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a,b,c", "0,2,3", "-1,2,3", "1.5,2,3"])
def test_a_wrong_grid_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="t,h,w"):
        parse_grid(text)


@pytest.mark.smoke
def test_samples_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    tensors = [torch.randn(2, 3), torch.arange(4), torch.randn(3, 4).T, torch.randn(1).bfloat16()]
    calls = [
        ((tensors[0], 3), {"ids": tensors[1], "return_dict": False}),
        ((), {"x": tensors[2], "y": tensors[3], "sizes": [1, 2]}),
    ]
    save_samples(path, calls)
    (args, kwargs), (none, second) = load_samples(path)
    assert torch.equal(args[0], tensors[0]) and args[1] == 3 and none == ()
    assert torch.equal(kwargs["ids"], tensors[1]) and kwargs["return_dict"] is False
    assert torch.equal(second["x"], tensors[2]) and second["y"].dtype == torch.bfloat16
    assert second["sizes"] == [1, 2]


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"video": 1}, {}, "'<call>/<argument>'"),
        ({"0/a b": 1}, {}, "'<call>/<argument>'"),
        ({"1/video": 1}, {}, "without gaps"),
        ({"0/1": 1}, {}, "gap"),
        ({"0/video": 1}, {"0/flag": "nope"}, "not JSON"),
        ({}, {"format": "pt"}, "no samples"),
    ],
)
def test_wrong_samples_are_refused(
    tmp_path: Path, tensors: dict[str, int], metadata: dict[str, str], said: str
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    save_file({name: torch.ones(1) for name in tensors}, path, metadata=metadata)
    with pytest.raises(InputError, match=said):
        load_samples(path)


def test_missing_and_truncated_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_samples(tmp_path / "none.safetensors")
    path = tmp_path / "s.safetensors"
    save_samples(path, [{"x": torch.ones(100)}])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a complete"):
        load_samples(path)
    with pytest.raises(InputError, match="JSON can express"):
        save_samples(path, [{"x": object()}])


def test_doctor_tries_the_op_and_names_what_is_missing() -> None:
    findings = {found.name: found for found in doctor.examine()}
    assert findings["split_attention on cpu"].state == "ok"
    assert findings["backend"].state == "ok", findings["backend"].detail
    assert "relative error" in findings["split_attention on cpu"].detail
    if not torch.cuda.is_available():
        assert findings["cuda"].state == "absent" and findings["cuda"].detail


@pytest.mark.smoke
def test_doctor_sees_a_broken_op(monkeypatch: pytest.MonkeyPatch) -> None:
    import freqopt

    monkeypatch.setattr(freqopt, "split_attention", lambda q, k, v, **unused: q * 1.01)
    found = next(doctor._op())
    assert found.state == "broken" and "differs" in found.detail


def test_bare_python_m_freqopt_is_the_doctor(tmp_path: Path) -> None:
    """In a process of its own, as every other command would be."""
    done = subprocess.run(
        [sys.executable, "-m", "freqopt"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "split_attention on cpu" in done.stdout


def test_environment_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREQOPT_COMMIT", "abc123")
    found = doctor.environment()
    assert found["commit"] == "abc123" and found["torch"] == torch.__version__


PIPELINE = '''
import torch
from models import Tiny

class Pipe:
    """A pipeline of somebody's own, which denoises in a few steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = Tiny().eval()

    def __call__(self, prompt, steps=4, scale=1.0):
        video = torch.randn(1, 3, 4, 16, 16) * scale
        for step in range(steps):
            self.transformer(video, timestep=torch.tensor([1 - step / steps]))
        return video

def make():
    return Pipe()
'''


def test_a_pipeline_is_calibrated_on_prompts(work: Path, run: Run) -> None:
    (work / "piped.py").write_text(PIPELINE)
    (work / "prompts.txt").write_text("# what to ask for\na cat\n\na dog\n")
    given = ("calibrate", "piped:make", "--prompts", "prompts.txt", "--device", "cpu")
    done = run(*given, "--dry-run", "--run-option", "steps=2")
    assert done.returncode == 0, done.stderr
    assert "2 samples to fit and 2 held out" in done.stdout and "memory:" in done.stdout
    assert "in all" in done.stdout
    quick = ("--rounds", "0", "--quiet", "--target-density", "0.7", "--order", "grid")
    done = run(*given, *quick, "--run-option", "steps=2", "-o", "plans")
    assert done.returncode == 0 and "wrote plans" in done.stdout, done.stderr
    assert Plan.from_pretrained(work / "plans").component == "transformer"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--samples", "samples.safetensors", "--prompts", "p.txt"), "one of them"),
        ((), "one of them"),
        (("--samples", "samples.safetensors", "--target-psnr", "30"), "pass --prompts"),
        (("--prompts", "absent.txt"), "cannot read the prompts"),
        (("--prompts", "p.txt"), "--prompts needs a pipeline"),
        (("--prompts", "p.txt", "--target-psnr", "3", "--target-error", ".1"), "both given"),
    ],
)
def test_what_a_pipeline_needs_is_said(
    work: Path, run: Run, options: tuple[str, ...], said: str
) -> None:
    (work / "p.txt").write_text("a cat\n")
    done = run("calibrate", "models:make", "--device", "cpu", *options)
    assert done.returncode == 2 and said in done.stderr


def test_no_weights_are_needed_to_inspect(run: Run) -> None:
    given = ("inspect", "models:make", "--samples", "samples.safetensors", "--min-tokens", "0")
    expected = run(*given, "--device", "cpu").stdout
    done = run(*given, "--no-weights")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected and "4x8x8" in expected


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def make(:\n", "cannot be imported: SyntaxError: "),
        ("import sys\nsys.exit('no weights')\n", "cannot be imported: SystemExit: no weights"),
        ("def make():\n    raise SystemExit(3)\n", "failed: SystemExit: 3"),
    ],
)
@pytest.mark.parametrize("name", ["bad", "bad.py"])
def test_whatever_users_code_raises_is_shown_as_theirs(
    work: Path, run: Run, name: str, source: str, said: str
) -> None:
    (work / "bad.py").write_text(source)
    sys.modules.pop("bad", None)
    done = run("inspect", f"{name}:make", "--samples", "samples.safetensors")
    assert done.returncode == cli.BAD_INPUT and not done.stdout
    assert said in done.stderr and "freqopt --traceback" in done.stderr


def test_what_users_code_prints_is_not_among_the_json(work: Path, run: Run) -> None:
    loud = FACTORY.replace("torch.manual_seed(0)", "print('making')").replace(
        "x = self.patchify(video)", "print('called')\n        x = self.patchify(video)"
    )
    (work / "loud.py").write_text("print('imported')\n" + loud)
    given = ("--samples", "samples.safetensors", "--device", "cpu")
    done = run("inspect", "loud.py:make", *given, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["sites"]
    assert {"imported", "making", "called"} <= set(done.stderr.split())


def test_a_file_elsewhere_imports_what_is_beside_it(work: Path, run: Run) -> None:
    folder = work / "elsewhere"
    folder.mkdir()
    (folder / "beside_it.py").write_text(FACTORY)
    (folder / "making.py").write_text("from beside_it import make\n")
    given = ("--samples", "samples.safetensors", "--device", "cpu", "--json")
    done = run("inspect", "elsewhere/making.py:make", *given)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["inspect", "calibrate"])
def test_samples_that_the_model_does_not_take_are_said(work: Path, run: Run, command: str) -> None:
    calls = load_samples("samples.safetensors", "cpu")
    save_samples("other.safetensors", [{"video": kwargs["video"]} for _, kwargs in calls])
    wide = [{**kwargs, "video": torch.randn(1, 5, 4, 16, 16)} for _, kwargs in calls]
    save_samples("wide.safetensors", wide)
    for name, said in (("other", "'timestep'"), ("wide", "to have 3 channels, but got 5")):
        done = run(command, "models:make", "--samples", f"{name}.safetensors", "--device", "cpu")
        assert done.returncode == cli.BAD_INPUT and not done.stdout
        assert said in done.stderr and "Traceback" not in done.stderr
        if name == "wide":
            assert "models.py" in done.stderr and "in forward" in done.stderr


def test_wrong_options_of_a_calibration_are_said_before_the_model_is_made(run: Run) -> None:
    for options, said in (
        (("--target-error", "0.1", "--target-density", "0.5"), "both given"),
        (("--passes", "0"), "passes 0"),
        (("--seed", str(2**70)), "seed"),
        (("--target-density", "nan"), "outside"),
    ):
        done = run("calibrate", "nowhere:make", "--samples", "none", "--device", "cpu", *options)
        assert done.returncode == cli.BAD_INPUT and said in done.stderr


def test_a_plan_can_go_to_the_folder_here(work: Path, run: Run) -> None:
    given = ("--samples", "samples.safetensors", "--device", "cpu", "--quiet", "--rounds", "0")
    done = run("calibrate", "models:make", *given, "--target-density", "0.9", "-o", ".")
    assert done.returncode == 0, done.stderr
    assert (work / "model.plan.json").is_file() and not list(work.glob("*.resume"))


def test_ctrl_c_while_the_command_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "freqopt.cli.app", Interrupting())  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as left:
        command(["doctor"])
    assert left.value.code == 130 and capsys.readouterr().err == "freqopt: interrupted\n"
