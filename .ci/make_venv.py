"""Create the virtual environment that `make` works in, or say plainly why it cannot be done.

Usage: python make_venv.py FOLDER. Standard library and syntax of Python 3.6 only, so that a Python
that is too old gets a sentence rather than a traceback.
"""

import os
import subprocess
import sys

OLDEST = (3, 10)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
USABLE_TORCH = """
import torch
assert torch.cuda.is_available()
assert tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
print(torch.__version__)
"""


def main():
    if len(sys.argv) != 2:
        stop("usage: python make_venv.py FOLDER")
    if sys.version_info < OLDEST:
        stop(
            "this is Python {}.{} and freqopt needs {}.{} or newer: install one and name it, as in "
            "`make demo PYTHON=python3.12`".format(*sys.version_info[:2], *OLDEST)
        )
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
    torch = installed_torch(python if os.path.exists(python) else sys.executable)
    if not os.path.exists(python):
        say(f"creating {folder}")
        options = ["--system-site-packages"] if torch else []
        run(sys.executable, "-m", "venv", *options, folder)
    constraints = os.path.join(ROOT, "constraints.txt")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
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


def installed_torch(python):
    """Version of a PyTorch with a working GPU that this Python has, or None."""
    found = subprocess.run(
        [python, "-c", USABLE_TORCH], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return found.stdout.decode().strip() if found.returncode == 0 else None


def without_torch(source, target):
    """The constraints less those that would replace the installed PyTorch; the path of the copy."""
    with open(source) as lines:
        kept = [line for line in lines if not line.startswith(("torch==", "triton=="))]
    with open(target, "w") as copy:
        copy.writelines(kept)
    return target


def run(*command):
    found = subprocess.run(command)
    if found.returncode:
        stop(f"`{' '.join(command)}` failed (exit code {found.returncode})")


def say(text):
    print("make: " + text)
    sys.stdout.flush()


def stop(text):
    sys.exit("make: " + text)


if __name__ == "__main__":
    main()
