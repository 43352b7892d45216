"""A model of Wan's size on several GPUs: `torchrun --nproc-per-node 4 -m benchmarks.parallel`.

Weights are random, so densities are set: heads of a plan whose densities spread tenfold around a
mean. A step dense and split under Ulysses, with heads balanced, with all keys on every rank, and
split on one GPU.
Times are by rank, and so is the share of them that collectives take. Nothing is compared with
figures of other runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import freqopt
from benchmarks import parallel_page
from benchmarks.common import environment, write
from benchmarks.plans import uncalibrated
from benchmarks.profiles import profiled
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget, SiteLayout, SitePlan

SIZES = {
    "14b": {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "num_layers": 40,
    },
    "1b": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "num_layers": 30,
    },
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "rope_max_seq_len": 32,
    },
}
SPREAD = 10.0
"""Ratio of the largest to the smallest density of a site's heads."""

ALONE = "split, one GPU"
"""The step of a rank that has all tokens and all heads to itself."""

GRID = (21, 45, 80)
"""Tokens of 81 frames of 720 x 1280."""

ROWS = ("dense", "split", "balanced", "all-keys", "one-gpu")


def model_of(size: str, layers: int | None, device: torch.device) -> nn.Module:
    """Wan's transformer with random weights, the same on all ranks."""
    from diffusers import WanTransformer3DModel

    config = {**SIZES[size], **({} if layers is None else {"num_layers": layers})}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model: nn.Module = WanTransformer3DModel(**config).to(dtype)
    return model.eval()


def call_of(model: nn.Module, grid: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of one call, the same on all ranks."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    t, h, w = grid

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    return {
        "hidden_states": noise(1, config.in_channels, t, 2 * h, 2 * w),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": noise(1, 64, config.text_dim),
        "return_dict": False,
    }


def spread_densities(heads: int, mean: float, turn: int) -> list[float]:
    """Densities of heads, SPREAD apart from end to end, in another order for every site."""
    raw = [SPREAD ** (head / max(heads - 1, 1)) for head in range(heads)]
    factor = mean * heads / sum(raw)
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(turn)).tolist()
    return [min(factor * raw[i], 1.0) for i in order]


def plan_of(
    model: nn.Module, call: dict[str, Any], grid: Sequence[int], mean: float, dense: bool
) -> tuple[Plan, Tensor]:
    """A plan whose thresholds give each head its density on this call, and the call's output.

    Each rank finds the thresholds of some of the sites. dense: attention stays dense meanwhile;
    else it is split by the mean density.
    """
    from freqopt.capture.eager import answered

    sites: dict[str, SitePlan] = {}
    tokens = grid[0] * grid[1] * grid[2]

    def answer(name: str, given: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
        query, key, value = (options.get(n) for n in ("query", "key", "value"))
        if query is None:
            query, key, value = given[:3]
        if not name.endswith("attn1"):
            return None
        heads, dim = query.shape[1], query.shape[3]
        thresholds, reached = [0.0] * heads, [1.0] * heads
        if len(sites) % dist.get_world_size() == dist.get_rank():
            wanted = spread_densities(heads, mean, len(sites))
            thresholds, reached = thresholds_of((query, key, value), grid, wanted)
        sites[name] = SitePlan(
            heads=heads,
            head_dim=dim,
            tokens=tokens,
            decision="split",
            reason="",
            budgets=[Budget(threshold=thresholds)],
            density=reached,
            layouts=[SiteLayout(grid=tuple(grid))],
        )
        if dense:
            return None
        out: Tensor = freqopt.split_attention(query, key, value, grid=tuple(grid), density=mean)
        return out

    output: Tensor = answered(model, (), call, answer)[0]
    found = all_ranks(sites)
    sites = {name: found[at % len(found)][name] for at, name in enumerate(sites)}
    t, h, w = grid
    return uncalibrated(model, (t, h, w), sites, mean_density=mean), output


def thresholds_of(
    given: tuple[Tensor, Tensor, Tensor], grid: Sequence[int], densities: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Thresholds of heads (1, H, N, D) for their densities, by halving, and what they reach."""
    wanted = torch.tensor(densities, device=given[0].device)
    low, high = torch.full_like(wanted, -14.0), torch.full_like(wanted, 14.0)
    reached = torch.ones_like(wanted)
    for _ in range(12):
        middle = (low + high) / 2
        stats = freqopt.split_attention(
            *given, grid=tuple(grid), threshold=2.0**middle, probes=0, return_stats=True
        )[1]
        reached = stats.density.reshape(-1)
        above = reached > wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (2.0**high).tolist(), reached.tolist()


class Step(NamedTuple):
    """A warm step of one rank: milliseconds, and the parts that collectives and attention take."""

    ms: float
    collectives: float
    attention: float


class Clock:
    """Times steps of the model, and the collectives and the attention in them."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def step(self, run: Callable[[], Tensor]) -> Step:
        """The median of some warm steps."""
        times = []
        for _ in range(self.repeats):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append(1e3 * (time.perf_counter() - start))
        return Step(statistics.median(times), *self._shares(run))

    def _shares(self, run: Callable[[], Tensor]) -> tuple[float, float]:
        parts = profiled(run, self.device, self._wait)
        of_all = parts.collectives / parts.whole, parts.attention / parts.whole
        return min(of_all[0], 0.999), min(of_all[1], 0.999)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


@contextmanager
def blocks_compiled(
    model: nn.Module, plan: Plan | None, inner: str
) -> Iterator[Callable[..., Any]]:
    """The model with its blocks compiled: split by a plan, or dense."""
    torch._dynamo.reset()
    options = {"inner": inner, "strict": True}
    try:
        if plan is None:
            model.compile_repeated_blocks(backend=inner)  # type: ignore[operator]
            yield model
        else:
            with freqopt.attach(model, plan):
                model.compile_repeated_blocks(backend="freqopt", options=options)  # type: ignore[operator]
                yield model
    finally:
        for module in model.modules():
            module._compiled_call_impl = None


def all_ranks(value: Any) -> list[Any]:
    """What every rank has."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def relative_l2(out: Tensor, reference: Tensor) -> float:
    """Relative error of an output."""
    return float((out.float() - reference.float()).norm() / reference.float().norm())


class Bench:
    """One configuration: models made anew for every row, as sharing out cannot be undone."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.size, self.grid = "tiny" if args.tiny else args.size, tuple(args.grid)
        self.inner, self.clock = "eager" if args.tiny else "inductor", Clock(device, args.repeats)
        self.count = dist.get_world_size()
        self.rows: list[dict[str, Any]] = []
        self.outputs: dict[str, Tensor] = {}
        self.imbalance: dict[str, float] = {}
        model = self.model()
        self.config: Any = model.config
        self.call = call_of(model, self.grid, device)
        self.small = call_of(model, (self.count, 4, 4), device)
        dense = "dense" in args.rows
        self.plan, output = plan_of(model, self.call, self.grid, args.density, dense)
        self.dense = output if dense else None

    def model(self) -> nn.Module:
        """The model with all of its weights and tokens here."""
        return model_of(self.size, self.args.layers, self.device)

    def share_out(self, model: nn.Module, **degrees: int) -> None:
        """diffusers' `enable_parallelism`, and a small call, in which its hooks are set up."""
        from diffusers import ContextParallelConfig

        model.enable_parallelism(config=ContextParallelConfig(**degrees))  # type: ignore[operator]
        if "ulysses_degree" in degrees:
            model(**self.small)

    def row(self, name: str, run: Callable[..., Any]) -> None:
        """Add a row: times and collectives by rank; errors against dense and split on one GPU.

        What is there is written each time: large models take minutes.
        """

        def step() -> Tensor:
            found: Tensor = run(**self.call)[0]
            return found

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.outputs[name] = step()
        found = [Step(*each) for each in all_ranks(tuple(self.clock.step(step)))]
        self.rows.append(
            {
                "name": name,
                "ms": [each.ms for each in found],
                "collectives": [each.collectives for each in found],
                "attention": [each.attention for each in found],
                "gib": all_ranks(torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0),
            }
        )
        for row in self.rows:
            own, alone = self.outputs[row["name"]], self.outputs.get(ALONE)
            row["error"] = None if self.dense is None else relative_l2(own, self.dense)
            row["error_of_one_gpu"] = None if alone is None else relative_l2(own, alone)
        if dist.get_rank() == 0:
            self.write()
            print(json.dumps(self.rows[-1]), flush=True)

    def ulysses(self, name: str, model: nn.Module, plan: Plan | None) -> None:
        """A row under Ulysses."""
        self.share_out(model, ulysses_degree=self.count)
        with blocks_compiled(model, plan, self.inner) as run:
            self.row(f"{name}, Ulysses", run)

    def measure(self) -> None:
        """All rows that are wanted; the same on every rank."""
        wanted = self.args.rows
        if self.config.num_attention_heads % self.count:
            wanted = [row for row in wanted if row in ("all-keys", "one-gpu")]
        if "dense" in wanted:
            self.ulysses("dense", self.model(), None)
        if "split" in wanted:
            self.ulysses("split", self.model(), self.plan)
        if "balanced" in wanted:
            model = self.model()
            balanced = freqopt.parallel.balance(model, self.plan, self.count, self.small)
            self.imbalance = {"before": balanced.before, "after": balanced.after}
            self.ulysses("balanced", model, balanced.plan)
        if "all-keys" in wanted:
            model = self.model()
            self.share_out(model, ring_degree=self.count)
            method, inner = self.args.method, self.inner
            torch._dynamo.reset()
            with freqopt.parallel.over_all_keys(model, self.plan, method=method, inner=inner):
                self.row("split, all keys", model)
        if "one-gpu" in wanted:
            with blocks_compiled(self.model(), self.plan, self.inner) as run:
                self.row(ALONE, run)

    def write(self) -> None:
        """The file of results and its plot, of the rows so far."""
        result = {
            "environment": environment(),
            "ranks": self.count,
            "size": self.size,
            "layers": self.config.num_layers,
            "heads": self.config.num_attention_heads,
            "grid": list(self.grid),
            "density": self.args.density,
            "spread": SPREAD,
            "imbalance": self.imbalance,
            "rows": self.rows,
        }
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        length = "" if self.args.tiny or self.grid == GRID else f"_{tokens}"
        path = write(f"parallel_{self.count}{length}", result, self.args.out)
        parallel_page.plot(result, path.with_suffix(".png"))


def main(given: Sequence[str] | None = None) -> None:
    """Measure; the first rank writes one file of results, and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="14b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--grid", type=int, nargs=3, default=GRID)
    parser.add_argument("--density", type=float, default=0.1, help="mean over heads")
    parser.add_argument("--method", choices=("gather", "ring"), default="gather")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPUs")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args(given)
    if args.tiny:
        args.grid, args.density, args.repeats = (3, 6, 10), 0.5, 1
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    with torch.no_grad():
        Bench(args, device).measure()


if __name__ == "__main__":
    main()
