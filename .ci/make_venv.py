"""Create the virtual environment that `make` works in, or say plainly why it cannot be done.

Usage: python make_venv.py FOLDER. Standard library only; the Makefile has checked the version.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
USABLE_TORCH = """
import torch
assert torch.cuda.is_available()
assert tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
print(torch.__version__)
"""


def main() -> None:
    if len(sys.argv) != 2:
        stop("usage: python make_venv.py FOLDER")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop(
            "this Python has no venv or pip: install its venv package (python3-venv on Debian and "
            "Ubuntu), or name another Python, as in `make demo PYTHON=python3.12`"
        )
    folder = os.path.abspath(sys.argv[1])
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        say(f"creating {folder}")
        options = ["--system-site-packages"] if installed_torch(sys.executable) else []
        run(sys.executable, "-m", "venv", *options, folder)
    # Asked of the new environment: one made from another does not see that one's packages.
    torch = installed_torch(python)
    constraints = os.path.join(ROOT, "constraints.txt")
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if torch:
        say(f"using the PyTorch {torch} that is already installed, with its CUDA")
        constraints = without_torch(constraints, os.path.join(folder, "constraints.txt"))
    else:
        # First and alone: what comes later finds its requirement met and brings no second PyTorch.
        say("installing PyTorch (the largest download)")
        run(*pip, "-c", constraints, "torch")
    say("installing freqopt and what its tests and the demo use")
    run(*pip, "-c", constraints, "setuptools")
    run(*pip, "-c", constraints, "--no-build-isolation", "-e", f"{ROOT}[dev,diffusers]")


def installed_torch(python: str) -> str | None:
    """Version of a PyTorch with a working GPU that this Python has, or None."""
    found = subprocess.run(
        [python, "-c", USABLE_TORCH], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return found.stdout.decode().strip() if found.returncode == 0 else None


def without_torch(source: str, target: str) -> str:
    """The constraints less those that would replace the installed PyTorch; the path of the copy."""
    with open(source) as lines:
        kept = [line for line in lines if not line.startswith(("torch==", "triton=="))]
    with open(target, "w") as copy:
        copy.writelines(kept)
    return target


def run(*command: str) -> None:
    found = subprocess.run(command)
    if found.returncode:
        stop(f"`{' '.join(command)}` failed (exit code {found.returncode})")


def say(text: str) -> None:
    print("make: " + text)
    sys.stdout.flush()


def stop(text: str) -> NoReturn:
    sys.exit("make: " + text)


if __name__ == "__main__":
    main()
