"""Do 8-bit products in the exact blocks earn their place: `python -m benchmarks.low_precision`.

Times the Hopper kernel against the same with int8 keys, and with e4m3 values as well
(`low_precision_kernel`), on the trained DiT's tensors, and compares whole calls **at equal error**:
what rounding adds to the error, bfloat16 may give back as density. `--docs` only rewrites the table
in docs/kernels.md from the result file. What each rounding costs: `low_precision_error`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import GRIDS, launch_of, part_times, relative_errors, threshold_for
from benchmarks.common import environment, milliseconds, write
from benchmarks.pages import rewrite_kernels
from benchmarks.tensors import Attention, zoo_attention
from freqopt.calibration_cost import fit_line
from freqopt.grid import token_order
from freqopt.kernels.layout import Sequence as Layout

DENSITIES = (0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.30, 1.0)
LOW = {"int8": False, "int8 + e4m3": True}
"""8-bit kernels by name: keys alone, or keys and values."""

GATE = 0.03
"""Largest relative L2 distance of an 8-bit kernel's output from the bfloat16 kernel's."""


class Quantised:
    """8-bit keys and values of one call, and its attention kernel.

    The largest distances from the means, which the steps follow from, are found by PyTorch and not
    timed: the kernel that summarises keys and values could find them.
    """

    def __init__(self, a: Attention, summaries: Any) -> None:
        _, heads, tokens, dim = a.query.shape
        self.a, self.summaries = a, summaries
        self.blocks = summaries.low_key.shape[2]
        keys = summaries.key[:, :, :tokens].float() - summaries.key_shift[:, :, None]
        self.key_step = (keys.abs().amax((2, 3)) / 127).contiguous()
        values = summaries.value[:, :, :tokens].float()
        self.value_shift = values.mean(2).contiguous()
        largest = (values - self.value_shift[:, :, None]).abs().amax((2, 3))
        self.value_step = (largest / 448).contiguous()
        rows = self.blocks * 64
        self.key = torch.empty(1, heads, rows, dim, device="cuda", dtype=torch.int8)
        self.value = torch.empty(1, heads, rows, dim, device="cuda", dtype=torch.float8_e4m3fn)

    def quantise(self, with_values: bool) -> None:
        """Fill `key`, and `value` too."""
        from benchmarks.low_precision_kernel import quantise_kernel

        heads, dim = self.key.shape[1], self.key.shape[3]
        quantise_kernel[(-(-self.blocks // 4), heads)](
            self.summaries.key, self.summaries.value, self.summaries.key_shift, self.key_step,
            self.value_shift, self.value_step, self.key, self.value, self.blocks,
            D=dim, GROUP=4, WITH_VALUES=with_values, num_warps=4,
        )  # fmt: skip

    def attend(self, route: Any, coefficients: Tensor, out: Tensor, with_values: bool) -> None:
        """The call's attention with 8-bit exact blocks, into `out`."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from benchmarks.low_precision_kernel import KEYS8, VALUES8, attend8_kernel
        from freqopt.kernels.hopper import STAGES, _descriptor

        query, made = self.a.query, self.summaries
        _, heads, tokens, dim = query.shape
        tiles = route.mass_term.shape[2]
        value = _descriptor(made.value)
        if with_values:
            value = TensorDescriptor.from_tensor(
                self.value.view(-1, 64), [dim, 64], VALUES8.value
            )  # fmt: skip
        attend8_kernel[(tiles, heads)](
            query, token_order(self.a.grid, query.device),
            TensorDescriptor.from_tensor(self.key.view(-1, dim), [64, dim], KEYS8.value), value,
            *map(_descriptor, (made.low_key, made.low_value, made.low_order)),
            self.key_step, self.value_shift, self.value_step, route.mass_term, coefficients,
            route.exact_list, route.counts, out, *query.stride()[:3], *out.stride()[:3],
            heads, heads // made.low_key.shape[1], tokens, tiles, self.blocks, dim**-0.5,
            D=dim, WITH_VALUES=with_values, STAGES=STAGES[dim], num_warps=4,
        )  # fmt: skip


def head_errors(out: Tensor, truth: Tensor) -> list[float]:
    """Relative L2 error of each head of (1, H, N, D)."""
    off = (out.float() - truth.float()).square().sum((0, 2, 3))
    return [float(x) for x in (off / truth.float().square().sum((0, 2, 3))).sqrt()]


def measure(a: Attention, densities: Sequence[float]) -> dict[str, Any]:
    """Errors and times of the three kernels at each density, and times of what they share."""
    from freqopt.kernels import triton_split as split
    from freqopt.kernels.triton_probe import fit_probes, probe_space

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        truth = F.scaled_dot_product_attention(a.query, a.key, a.value)
    sequence, launch, scale = Layout(a.grid, 0, 0), launch_of(a), a.query.shape[-1] ** -0.5
    options: dict[str, Any] = {"scale": scale, "launch": launch}
    summaries = split.summarise(a.key, a.value, sequence, launch)
    low = Quantised(a, summaries)
    quantise_ms = {}
    for name, with_values in LOW.items():
        low.quantise(with_values)
        quantise_ms[name] = milliseconds(lambda w=with_values: low.quantise(w))
    rows = []
    parts: dict[str, float] = {}
    for density in densities:
        threshold = threshold_for(a, density)
        budget = torch.full((2, a.query.shape[1]), threshold, device=a.query.device)
        route = split.make_route(a.query, summaries, budget, sequence, **options)
        space = probe_space(a.query, summaries.low_key.shape[2], 64)
        fit_probes(a.query, a.key, a.value, None, summaries, route, sequence, space, **options)
        coefficients = space.coefficients
        out = torch.empty_like(a.query.transpose(1, 2)).transpose(1, 2)
        runs: dict[str, Callable[[], None]] = {
            "bf16": lambda r=route, c=coefficients, o=out: split.attend(
                a.query, a.key, a.value, None, summaries, r, c, o, sequence, **options
            )
        }
        for name, w in LOW.items():
            runs[name] = lambda r=route, c=coefficients, o=out, w=w: low.attend(r, c, o, w)
        each = route.counts.float().mean(2)[0] / low.blocks
        row: dict[str, Any] = {"density": float(each.mean()), "head_density": each.tolist()}
        plain: Tensor | None = None
        for name, run in runs.items():
            out.fill_(math.nan)
            run()
            plain = out.clone() if plain is None else plain
            _, noise = relative_errors(out, plain)
            if not noise <= GATE:
                raise SystemExit(
                    f"{name} at density {density} is {noise:.3g} off; no time reported"
                )
            l1, l2 = relative_errors(out, truth)
            row[name] = {
                "l1": l1, "l2": l2, "noise_l2": noise, "head_l2": head_errors(out, truth),
                "ms": milliseconds(run),
            }  # fmt: skip
        rows.append(row)
        print(
            f"density {row['density']:.3f}  "
            + "  ".join(
                f"{n}: L1 {row[n]['l1']:.4f} L2 {row[n]['l2']:.4f} {row[n]['ms']:.3f} ms"
                for n in runs
            ),
            flush=True,
        )
        if not parts:
            parts = {k: v for k, v in part_times(a, threshold)[0].items() if k != "attend"}
    return {"rest_ms": sum(parts.values()), "quantise_ms": quantise_ms, "rows": rows}


def density_at(curve: Sequence[tuple[float, float]], error: float) -> float:
    """Density at which a curve of (density, error), densities rising, has an error.

    Straight on logarithmic axes, between points and past the ends.
    """
    points = [(math.log(d), math.log(e)) for d, e in curve]
    at = next((i for i, p in enumerate(points[1:-1], 1) if p[1] <= math.log(error)), -1)
    (d0, e0), (d1, e1) = points[at - 1], points[at]
    return math.exp(d0 + (math.log(error) - e0) * (d1 - d0) / (e1 - e0))


def compare(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole calls at equal error, for each density below 1 and each 8-bit kernel.

    Times are those of the line through a kernel's measured times, which single measurements are up
    to a tenth off. gain_same, gain_l1, gain_l2: share of the bfloat16 call's time that 8 bits save
    at equal density, at equal L1 and at equal L2 error, negative where they lose.
    """
    rows = sorted(measured["rows"], key=lambda row: row["density"])
    lines = {n: fit_line([(r["density"], r[n]["ms"]) for r in rows]) for n in ("bf16", *LOW)}
    rows = [row for row in rows if row["density"] < 0.99]

    def whole(name: str, density: float) -> float:
        base, slope = lines[name]
        return measured["rest_ms"] + measured["quantise_ms"].get(name, 0.0) + base + slope * density

    found = []
    for row in rows:
        for name in LOW:
            ms = whole(name, row["density"])
            entry = {"density": row["density"], "kernel": name, "ms": ms}
            same = whole("bf16", row["density"])
            entry |= {"bf16_ms": same, "gain_same": 1 - ms / same}
            for norm in ("l1", "l2"):
                curve = [(r["density"], r["bf16"][norm]) for r in rows]
                equal = density_at(curve, row[name][norm])
                entry[f"bf16_density_{norm}"] = equal
                entry[f"gain_{norm}"] = 1 - ms / whole("bf16", equal)
            found.append(entry)
    return found


def table(result: dict[str, Any]) -> list[str]:
    """The documentation's table."""
    lines = []
    for problem in result["problems"]:
        where = result["environment"]
        lines += [
            f"{problem['heads']} heads x {problem['tokens']:,} tokens, {where['device']}, torch "
            f"{where['torch']}, Triton {where['triton']}, commit {where['commit']}; quantising "
            + ", ".join(f"{n}: {ms:.2f} ms" for n, ms in problem["quantise_ms"].items()) + ":",
            "",
            "| density | kernel | relative L1, L2 | attention kernel | whole call saved at equal "
            "density | at equal L1 | at equal L2 |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        gains = {(g["density"], g["kernel"]): g for g in problem["equal_error"]}
        for row in sorted(problem["rows"], key=lambda r: r["density"]):
            for name in ("bf16", *LOW):
                one, gain = row[name], gains.get((row["density"], name))
                kept = [f"{100 * gain[f'gain_{n}']:+.1f} %" for n in ("same", "l1", "l2")] if gain \
                    else ["", "", ""]  # fmt: skip
                lines.append(
                    f"| {100 * row['density']:.1f} % | {name} | {one['l1']:.4f}, {one['l2']:.4f} "
                    f"| {one['ms']:.2f} ms | {' | '.join(kept)} |"
                )
    return lines


rewrite_docs = partial(rewrite_kernels, "low_precision", table)
"""Put the result file's table into docs/kernels.md; with `check` only say if it is there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["32K"], choices=GRIDS)
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument(
        "--docs", action="store_true", help="only rewrite the documentation's table"
    )
    arguments = parser.parse_args()
    if arguments.docs:
        rewrite_docs(check=False)
        return
    problems = []
    for size in arguments.sizes:
        a = zoo_attention(GRIDS[size])
        measured = measure(a, arguments.densities)
        _, heads, tokens, dim = a.query.shape
        shape = {"tokens": tokens, "grid": a.grid, "heads": heads, "head_dim": dim}
        problems.append({**shape, **measured, "equal_error": compare(measured)})
    result = {"environment": environment(), "problems": problems}
    print("\n".join(table(result)))
    print(f"wrote {write('low_precision', result, arguments.out)}")


if __name__ == "__main__":
    main()
