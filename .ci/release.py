"""Builds what would be released and checks it; uploads nothing. `make release`.

The sdist is made from a copy of the files that git knows, and the wheel from the unpacked sdist, as
installers do. Standard library and setuptools only; twine's own check runs where twine is.
"""

from __future__ import annotations

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BACKEND = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
FIELDS = {
    "Name": "freqopt",
    "License-Expression": "Apache-2.0",
    "Requires-Python": ">=3.10",
    "Description-Content-Type": "text/markdown",
}
UNWANTED = re.compile(r"(^|/)(tests|benchmarks|__pycache__)/|\.py[co]$|/models_zoo/training/")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed."""
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd)
    if found.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed\n{found.stdout}{found.stderr}")
    return found.stdout


def build(folder: Path, *, untracked: bool = False) -> tuple[Path, Path]:
    """Write the wheel and the sdist into a folder and return their paths; needs no network.

    untracked: with files that git does not know yet, as tests of a change want it.
    """
    others = ["--others", "--exclude-standard"] if untracked else []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        for name in run("git", "ls-files", "--cached", *others).splitlines():
            if (ROOT / name).exists():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
        run(sys.executable, "-c", BACKEND, "build_sdist", folder, cwd=source)
        (sdist,) = folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(Path(scratch) / "unpacked", filter="data")
        (unpacked,) = (Path(scratch) / "unpacked").iterdir()
        run(sys.executable, "-c", BACKEND, "build_wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return wheel, sdist


def problems_of_wheel(wheel: Path) -> list[str]:
    """What its metadata and its list of files lack, or should not have."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    found = [
        f"{wheel.name}: {field} is {metadata[field]!r} and not {wanted!r}"
        for field, wanted in FIELDS.items()
        if metadata[field] != wanted
    ]
    if not metadata.get_payload():
        found.append(f"{wheel.name}: no description")
    found += [f"{wheel.name} holds {name}" for name in names if UNWANTED.search(name)]
    if not any(name.endswith(".safetensors") for name in names):
        found.append(f"{wheel.name} lacks the zoo's weights")
    return found


def problems_of_changelog(text: str, version: str) -> list[str]:
    """Whether it names the version, with a date, and leaves nothing unreleased."""
    unreleased, *dated = re.split(r"^## \[(\d[^\]]*)\] - (\d{4}-\d{2}-\d{2})$", text, flags=re.M)
    found = []
    if re.search(r"^[-*] ", unreleased, re.M):
        found.append("CHANGELOG.md has entries under Unreleased")
    if dated[:1] != [version]:
        found.append(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD' above the others")
    return found


def problems_of_tree(version: str) -> list[str]:
    """Whether what was built is a commit, and one that has no release yet."""
    found = []
    if run("git", "status", "--porcelain"):
        found.append("the working tree is not clean: commit first")
    if f"v{version}" in run("git", "tag").split():
        found.append(f"the tag v{version} exists already")
    return found


def main() -> None:
    """Build into dist/, print what is there and what is wrong; exit status 1 if anything is."""
    folder = ROOT / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    wheel, sdist = build(folder)
    version = wheel.name.split("-")[1]
    found = problems_of_wheel(wheel)
    found += problems_of_changelog((ROOT / "CHANGELOG.md").read_text(), version)
    found += problems_of_tree(version)
    for path in (wheel, sdist):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB")
    if importlib.util.find_spec("twine"):
        print(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist), end="")
    else:
        print("twine is not installed, so its check was left out")
    for problem in found:
        print(f"problem: {problem}")
    if found:
        sys.exit(1)
    print(f"version {version} is ready; nothing was uploaded. What is left to do by hand:")
    print(f"  git tag v{version} && git push origin v{version}")
    print(f"  twine upload {wheel.relative_to(ROOT)} {sdist.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
