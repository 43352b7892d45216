"""The symlinked layout installs whole, and hides no other package of the same name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

import freqopt

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
assert SPEC is not None and SPEC.loader is not None
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)
LINKED = ("passes", "kernels", "exporters", "models_zoo")
PROJECT = (ROOT / "pyproject.toml").read_text()
DATA_SUFFIXES = {".safetensors", ".html", ".json", ".jsonl", ".css", ".cc", ".h"}
LARGEST = 2**20
LARGEST_WEIGHTS = 16 * 2**20


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd)
    assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
    return found.stdout


OF_A_CHECKOUT = "freqopt/models_zoo/training/"
"""In the sdist and not in the wheel."""


def ours() -> set[str]:
    """Files of the package, as paths below site-packages or an unpacked sdist."""
    own = [f.relative_to(ROOT) for f in (ROOT / "freqopt").rglob("*")]
    found = [f for f in own if f.parts[1] not in LINKED]
    for name in LINKED:
        found += [Path("freqopt") / f.relative_to(ROOT) for f in (ROOT / name).rglob("*")]
    return {str(f) for f in found if f.suffix in {".py", *DATA_SUFFIXES}}


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.smoke
def test_linked_folders(name: str) -> None:
    link = ROOT / "freqopt" / name
    assert link.is_symlink(), f"freqopt/{name} must be a symlink (Windows: core.symlinks=true)"
    assert os.readlink(link) == f"../{name}", "the symlink must be relative"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()
    assert not (ROOT / name / "__init__.py").exists(), (
        f"{name}/ with an __init__.py would be a package of that name wherever the root is on the "
        "path, and break whoever looks for another package called so"
    )


def test_the_root_hides_no_other_package() -> None:
    """From the root, `kernels` is at most an empty namespace, and what probes for it works."""
    script = """
import importlib.util
for name in ("passes", "kernels", "exporters", "models_zoo"):
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None, (name, spec)
import transformers, diffusers
from diffusers import WanTransformer3DModel
from transformers import VideoMAEModel
"""
    run(sys.executable, "-c", script)


def test_entry_point() -> None:
    points = [p for p in entry_points(group="torch_dynamo_backends") if p.name == "freqopt"]
    assert len(points) == 1, "freqopt is not installed: make .venv/.freqopt-ready"
    assert points[0].value == "freqopt.backend:freqopt_backend"
    assert callable(points[0].load())


def test_dynamo_finds_the_backend() -> None:
    import torch._dynamo

    from freqopt.backend import freqopt_backend

    assert "freqopt" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("freqopt") is freqopt_backend


def test_version_is_stated_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", freqopt.__version__)
    assert installed_version("freqopt") == freqopt.__version__
    assert "version" not in re.findall(r"^(\w+) =", PROJECT.split("[project.optional")[0], re.M)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist) built from a copy of what is tracked or new, without touching the network."""
    wheel, sdist = release.build(tmp_path_factory.mktemp("built"), untracked=True)
    return wheel, sdist


def test_wheel_has_every_module_and_its_data(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    unwanted = {name for name in ours() if name.startswith(OF_A_CHECKOUT)}
    assert OF_A_CHECKOUT + "train.py" in unwanted and not unwanted & names
    missing = ours() - unwanted - names
    assert not missing, missing
    assert {n.split("/")[0] for n in names} == {
        "freqopt",
        f"freqopt-{freqopt.__version__}.dist-info",
    }
    assert {
        "freqopt/py.typed",
        "freqopt/kernels/op.py",
        "freqopt/passes/find.py",
        "freqopt/models_zoo/sampling.py",
        "freqopt/models_zoo/weights/video_dit.safetensors",
    } <= names
    assert not [n for n in names if "__pycache__" in n]


def test_what_is_released_is_checked(built: tuple[Path, Path], tmp_path: Path) -> None:
    assert release.problems_of_wheel(built[0]) == []
    spoilt = tmp_path / built[0].name
    with zipfile.ZipFile(built[0]) as right, zipfile.ZipFile(spoilt, "w") as wrong:
        for name in right.namelist():
            data = right.read(name)
            if name.endswith("METADATA"):
                data = data.replace(b"License-Expression: Apache-2.0\n", b"")
            if not name.endswith(".safetensors"):
                wrong.writestr(name, data)
        wrong.writestr("freqopt/models_zoo/training/train.py", "")
    found = " ".join(release.problems_of_wheel(spoilt))
    for words in ("License-Expression is None", "training/train.py", "lacks the zoo's weights"):
        assert words in found
    assert len(release.problems_of_wheel(spoilt)) == 3


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("## [Unreleased]\n\n## [1.2.0] - 2030-01-31\n\n- a\n\n## [1.1.0] - 2029-01-31\n", 0),
        ("## [Unreleased]\n\n### Added\n\n- x\n\n## [1.2.0] - 2030-01-31\n\n- a\n", 1),
        ("## [Unreleased]\n\n## [1.1.0] - 2030-01-31\n\n- a\n", 1),
        ("## [Unreleased]\n\n## [1.2.0]\n", 1),
        ("## [Unreleased]\n\n- x\n", 2),
    ],
)
def test_a_release_needs_a_dated_changelog(text: str, wrong: int) -> None:
    assert len(release.problems_of_changelog(text, "1.2.0")) == wrong


def test_what_runs_where_is_said_once() -> None:
    """The Pythons of the metadata are those of continuous integration's matrix."""
    yaml = pytest.importorskip("yaml")
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = flow["jobs"]["test"]["strategy"]["matrix"]
    listed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert listed == matrix["python"] and len(listed) >= 4
    assert f'requires-python = ">={listed[0]}"' in PROJECT
    environment = (ROOT / ".ci" / "environment").read_text()
    for torch in [*matrix["torch"], *(more["torch"] for more in matrix["include"])]:
        assert f"  {torch}) torch=" in environment
    for form in (ROOT / ".github").rglob("*.yml"):
        assert isinstance(yaml.safe_load(form.read_text()), dict), form


def test_sdist_has_every_module_and_its_data(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        members = {m.name.split("/", 1)[-1]: m for m in sdist.getmembers()}
    assert ours() <= members.keys()
    assert {"pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= members.keys()
    assert not [m for m in members.values() if m.issym()], "links would point outside the archive"


def test_installed_wheel_works_without_the_checkout(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        built[0],
        cwd=tmp_path,
    )
    script = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "freqopt" not in repr(f)]
sys.path.insert(0, {str(site)!r})
import freqopt, torch
from freqopt.kernels import op
from freqopt.passes import find
assert freqopt.__file__.startswith({str(site)!r}) and op.__file__.startswith({str(site)!r})
x = torch.randn(1, 1, 60, 8)
assert freqopt.split_attention(x, x, x, grid=(3, 4, 5), threshold=0.0).isfinite().all()
from freqopt.models_zoo.sampling import sample
from freqopt.models_zoo.video_dit import load_pretrained
assert sample(load_pretrained(), frames=1, height=8, width=8, steps=1, seed=0).isfinite().all()
"""
    run(sys.executable, "-c", script, cwd=tmp_path)


def test_no_large_file_is_tracked() -> None:
    for name in run("git", "ls-files").splitlines():
        file = ROOT / name
        if file.is_file() and not file.is_symlink():
            limit = LARGEST_WEIGHTS if file.suffix == ".safetensors" else LARGEST
            assert file.stat().st_size <= limit, f"{name} is larger than {limit} bytes"
