"""Writes the README's measured table from the result files: `python -m benchmarks.readme`.

And that of another GPU in docs/kernels.md. Every figure in the tables comes from a file under
benchmarks/results/ that a benchmark or the demo wrote; `--check` fails where a page says something
else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import RESULTS, markers, rewrite, rewrite_kernels

README = RESULTS.parent.parent / "README.md"
NAME = "measured"
BEGIN, END = markers(NAME)


def demo_rows(result: dict[str, Any]) -> Iterator[str]:
    """The video sampled from the zoo's DiT, dense and rewritten."""
    where = result["environment"]
    grid = " x ".join(str(n) for n in result["grid"])
    yield (
        f"Zoo DiT, {result['settings']['steps']} steps at {grid} = {result['tokens']:,} tokens, "
        f"{result['settings']['dtype']}, {where['device']}, torch {where['torch']}, commit "
        f"{where['commit']} (`{result['command'].split(' --out')[0]}`):"
    )
    yield ""
    yield "| mean density | output error (target) | PSNR to dense | SSIM | dense | split |"
    yield "|---|---|---|---|---|---|"
    yield (
        f"| {100 * result['mean_density']:.1f} % | {result['measured_error']:.4f} "
        f"({result['target_error']:g}) | {result['psnr_db']:.1f} dB | {result['ssim']:.3f} "
        f"| {result['dense_seconds']:.1f} s | {result['split_seconds']:.1f} s |"
    )


def attention_rows(result: dict[str, Any]) -> Iterator[str]:
    """The op alone on tensors of the zoo's DiT, beside dense attention."""
    where = result["environment"]
    for problem in result["problems"]:
        best = min(problem["dense_ms"].values())
        yield (
            f"The op, {problem['heads']} heads x {problem['tokens']:,} tokens, "
            f"{problem['dtype'].removeprefix('torch.')}, {where['device']}, torch "
            f"{where['torch']}, commit {where['commit']}; dense {best:.1f} ms:"
        )
        yield ""
        shares = all("other_share" in row for row in problem["rows"])
        more = (" everything but attention |", "---|") if shares else ("", "")
        yield f"| density | relative L1 | relative L2 | whole call | against dense |{more[0]}"
        yield f"|---|---|---|---|---|{more[1]}"
        for row in problem["rows"]:
            share = f" {100 * row['other_share']:.1f} % |" if shares else ""
            yield (
                f"| {100 * row['density']:.1f} % | {row['l1']:.4f} | {row['l2']:.4f} "
                f"| {row['ms']:.2f} ms | {row['speedup']:.2f}x |{share}"
            )
        yield ""


def backward_rows(result: dict[str, Any]) -> Iterator[str]:
    """Forward and backward together, beside dense attention."""
    where, l2 = result["environment"], result["gradient_l2"]
    yield (
        f"Forward and backward together, {result['heads']} heads x {result['tokens']:,} tokens, "
        f"{where['device']}, torch {where['torch']}, commit {where['commit']}:"
    )
    yield ""
    yield "| density | gradients' relative L2 (query, key, value) | split | dense | against dense |"
    yield "|---|---|---|---|---|"
    yield (
        f"| {100 * result['density']:.1f} % | {l2['query']:.4f}, {l2['key']:.4f}, "
        f"{l2['value']:.4f} | {result['ms']:.1f} ms | {min(result['dense_ms'].values()):.1f} ms "
        f"| {result['speedup']:.2f}x |"
    )


def measured(folder: Path = RESULTS) -> str:
    """Everything between the README's markers."""
    lines: list[str] = []
    attention = folder / "attention.json"
    if attention.exists():
        lines += attention_rows(json.loads(attention.read_text()))
    else:
        lines += [
            "**No GPU figures yet.** The kernels compile for sm_80 and sm_90 and agree with the "
            "definition in Triton's interpreter; they have not been run on a GPU.",
            "",
        ]
    backward = folder / "backward.json"
    if backward.exists():
        lines += [*backward_rows(json.loads(backward.read_text())), ""]
    for path in sorted(folder.glob("demo*.json")):
        lines += [*demo_rows(json.loads(path.read_text())), ""]
    return "\n".join(lines).rstrip()


def other_gpu(*, check: bool) -> bool:
    """The table of the H100 in docs/kernels.md; whether it was there already."""
    return rewrite_kernels(
        "attention_h100", lambda result: [*attention_rows(result)][:-1], check=check
    )


def main() -> None:
    """Write the tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    same = rewrite(README, NAME, measured(), check=check)
    if not (other_gpu(check=check) and same) and check:
        sys.exit("a page differs from benchmarks/results/: run `python -m benchmarks.readme`")


if __name__ == "__main__":
    main()
