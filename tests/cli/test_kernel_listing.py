"""`freqopt kernels`: what it prints is what a call launches."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from forks import forks

from freqopt.cli import app as cli
from freqopt.cli.kernels import FORMS, chosen_variant
from freqopt.errors import OptionError

pytest.importorskip("triton")

from freqopt.kernels.variant import CAPABILITIES


def kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command outside Triton's interpreter, whose mode is a property of the process."""
    return forks(interpret=False).run("-m", "freqopt", "kernels", *arguments, COLUMNS="200")


PLAIN = """
import io, sys
from freqopt.cli.app import main
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="ascii")
main(["kernels", "list", "--capability", "90"])
"""


def test_list_names_every_kernel_with_what_it_needs() -> None:
    done = kernels("list", "--capability", "90")
    assert done.returncode == 0, done.stderr
    every = "summarise pool_tiles disperse score route probe fit attend"
    for name in f"{every} prepare_hopper score_hopper attend_hopper".split():
        assert f" {name} " in done.stdout
    assert "STAGES=3" in done.stdout
    shared = [int(found.replace(",", "")) for found in re.findall(r"([\d,]+) B ", done.stdout)]
    assert len(shared) >= 15 and 200_000 < max(shared) <= CAPABILITIES[90]


def test_a_narrow_terminal_of_ascii_is_enough(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    done = forks(interpret=False).run(str(tmp_path / "plain.py"), COLUMNS="60")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "\\u2026" in done.stdout


def test_list_of_long_sequences_has_what_they_launch_otherwise() -> None:
    done = kernels("list", "--long", "--head-dim", "64", "--capability", "80")
    assert done.returncode == 0, done.stderr
    for word in ("COPY=False", "BY_PROBE=True", "IN_PLACE=True", "route_tiles_kernel", "rank_9"):
        assert word in done.stdout


def test_show_prints_source_with_the_functions_it_calls() -> None:
    done = kernels("show", "attend", "--head-dim", "64", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert "D=64" in done.stdout and "RAGGED=True" in done.stdout
    helper, kernel = (done.stdout.index(f"def {n}(") for n in ("_online_step", "attend_kernel"))
    assert helper < kernel


@pytest.mark.parametrize(
    ("form", "word"), [("ttgir", "warp_specialize"), ("ptx", ".target sm_90a")]
)
def test_show_prints_stages_of_compilation(form: str, word: str) -> None:
    done = kernels("show", "attend_hopper", "--form", form, "--capability", "90")
    assert done.returncode == 0, done.stderr
    assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "atend"), "there are summarise, total"),
        (("show", "attend", "--form", "llvm"), ", ".join(FORMS)),
        (("show", "attend_hopper", "--head-dim", "96", "--capability", "90"), "no kernel"),
        (("list", "--capability", "75"), "compute capability 75"),
        (("list", "--dtype", "float64"), "no kernels for float64"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as nothing is compiled."""
    with pytest.raises(SystemExit) as left:
        cli.main(["kernels", *arguments])
    assert left.value.code == cli.BAD_INPUT and said in " ".join(capsys.readouterr().err.split())


def test_head_dims_without_kernels() -> None:
    with pytest.raises(OptionError, match="multiples of 8 to 256"):
        chosen_variant(20, "float16", 90, False)
