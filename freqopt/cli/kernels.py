"""`freqopt kernels list | show | tune`: what runs for a GPU, a type and a head dim, and how fast.

Listing works without a GPU: Triton compiles for any. Tuning measures the one at hand.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from freqopt.errors import OptionError
from freqopt.kernels.variant import CAPABILITIES, DTYPES, Variant

FORMS = ("source", "ttir", "ttgir", "llir", "ptx", "sass")

kernels_app = typer.Typer(
    name="kernels",
    help="The kernels of one call: list them, print what runs, tune them to this GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

HeadDim = Annotated[int, typer.Option(help="A multiple of 8 up to 256.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Capability = Annotated[
    int | None, typer.Option(help="90 for an H100 or H200; by default this GPU's, or 90.")
]
Gpu = Annotated[str | None, typer.Option(help="A GPU's name instead, such as h100 or l40s.")]
Masked = Annotated[bool, typer.Option("--masked", help="With a key mask over the text.")]
Long = Annotated[bool, typer.Option("--long", help="Of sequences of 262,144 tokens or more.")]


GPUS = {
    "a100": 80,
    "a30": 80,
    "a10": 86,
    "a40": 86,
    "a6000": 86,
    "rtx3090": 86,
    "l4": 89,
    "l40": 89,
    "l40s": 89,
    "rtx4090": 89,
    "h100": 90,
    "h200": 90,
    "h20": 90,
    "h800": 90,
    "gh200": 90,
    "b200": 100,
    "gb200": 100,
    "rtx5090": 120,
}
"""Compute capabilities by the names that GPUs are sold under, in small letters."""


def chosen_variant(
    head_dim: int, dtype: str, capability: int | None, masked: bool, gpu: str | None = None
) -> Variant:
    """Check the options of both commands.

    Raises:
        OptionError: something no kernel is compiled for.
    """
    if gpu is not None:
        name = gpu.lower().replace(" ", "").replace("-", "")
        if capability is not None or name not in GPUS:
            raise OptionError(
                f"--gpu {gpu} is unknown, or given with --capability; known: {', '.join(GPUS)}"
            )
        capability = GPUS[name]
    if capability is None:
        capability = _capability_here()
    if capability not in CAPABILITIES:
        supported = ", ".join(map(str, CAPABILITIES))
        raise OptionError(f"no kernels for compute capability {capability}; supported: {supported}")
    if dtype not in DTYPES:
        raise OptionError(f"no kernels for {dtype}; supported: {', '.join(DTYPES)}")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise OptionError(f"no kernels for head dim {head_dim}; supported: multiples of 8 to 256")
    return Variant(capability, dtype, head_dim, masked)


def _capability_here() -> int:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    return 90


def kernels_of(variant: Variant, *, long: bool = False) -> dict[str, Any]:
    """Specialised kernels by name, in the order of a call; long: of one on a long sequence."""
    from freqopt.kernels import specialise

    every = specialise.long_specialisations if long else specialise.specialisations
    found = {given.name: given for given in every(variant)}
    of_hopper = (
        specialise.hopper_preparation,
        specialise.hopper_scores,
        specialise.hopper_specialisation,
    )
    for specialised in of_hopper:
        given = specialised(variant, long=long)
        if given is not None:
            found[given.name] = given
    return found


def source_of(function: Any) -> str:
    """A kernel's source after that of the functions of ours that it calls."""
    return "\n\n".join(_sources(function, set()))


def _sources(function: Any, seen: set[Any]) -> Iterator[str]:
    if function in seen:
        return
    seen.add(function)
    text = textwrap.dedent(inspect.getsource(function.fn))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            used = function.fn.__globals__.get(node.id)
            if getattr(used, "fn", None) is not None and used.__module__.startswith("freqopt."):
                yield from _sources(used, seen)
    yield text


def heading(given: Any, variant: Variant) -> str:
    """The constants and launch options of a specialisation, as comment lines."""
    constants = ", ".join(f"{k}={v}" for k, v in given.chosen().items()) or "none"
    options = ", ".join(f"{k}={v}" for k, v in given.options.items())
    return (
        f"# {given.name}: {given.function.__name__} for sm_{variant.capability}, {variant.dtype}, "
        f"head dim {variant.head_dim}\n# constants: {constants}\n# launch: {options}"
    )


@kernels_app.command(name="list")
def list_kernels(
    head_dim: HeadDim = 128,
    dtype: Dtype = "bfloat16",
    capability: Capability = None,
    gpu: Gpu = None,
    masked: Masked = False,
    long: Long = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """Compile every kernel of a call and say what each needs."""
    from freqopt.kernels.specialise import compile_specialised

    variant = chosen_variant(head_dim, dtype, capability, masked, gpu)
    table = Table("kernel", "function", "warps", "shared memory", "constants")
    listed = []
    for name, given in kernels_of(variant, long=long).items():
        made = compile_specialised(given, variant)
        constants = " ".join(f"{k}={v}" for k, v in given.chosen().items())
        warps, shared = str(made.metadata.num_warps), f"{made.metadata.shared:,} B"
        table.add_row(name, given.function.__name__, warps, shared, constants)
        listed.append(
            {
                "kernel": name,
                "function": given.function.__name__,
                "warps": made.metadata.num_warps,
                "shared_bytes": made.metadata.shared,
                "constants": {k: str(v) for k, v in given.chosen().items()},
            }
        )
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    Console().print(table)


@kernels_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A kernel's name, as `freqopt kernels list` has it.")],
    form: Annotated[str, typer.Option(help=f"One of {', '.join(FORMS)}.")] = "source",
    head_dim: HeadDim = 128,
    dtype: Dtype = "bfloat16",
    capability: Capability = None,
    gpu: Gpu = None,
    masked: Masked = False,
    long: Long = False,
) -> None:
    """Print what runs: the source with its constants, or any stage of its compilation."""
    from freqopt.kernels.specialise import compile_specialised

    variant = chosen_variant(head_dim, dtype, capability, masked, gpu)
    if form not in FORMS:
        raise OptionError(f"no form {form!r}; there are {', '.join(FORMS)}")
    found = kernels_of(variant, long=long)
    if name not in found:
        raise OptionError(f"no kernel {name!r} in this variant; there are {', '.join(found)}")
    given = found[name]
    print(heading(given, variant), end="\n\n")
    if form == "source":
        print(source_of(given.function))
        return
    stages = compile_specialised(given, variant).asm
    if form not in stages and form != "sass":
        raise OptionError(f"{name} has no {form}: Gluon is lowered from ttgir; ask for that")
    print(stages[form])


def problem_of(head_dim: int, dtype: str, heads: int, grid: str) -> Any:
    """Check the options of `tune`.

    Raises:
        OptionError: something there are no kernels for, or no NVIDIA GPU.
    """
    import torch

    from freqopt.kernels.autotune import Problem

    variant = chosen_variant(head_dim, dtype, None, False)
    extents = [int(part) if part.strip().isdigit() else 0 for part in grid.split(",")]
    if len(extents) != 3 or min(extents) < 1:
        raise OptionError(f"grid {grid!r} is not three positive extents, like 21,30,52")
    if heads < 1:
        raise OptionError(f"heads is {heads}; at least 1 is supported")
    if not torch.cuda.is_available():
        raise OptionError("this measures kernels, so it needs an NVIDIA GPU and none is visible")
    t, h, w = extents
    device = torch.device("cuda", torch.cuda.current_device())
    return Problem((t, h, w), heads, variant.head_dim, getattr(torch, dtype), device)


@kernels_app.command()
def tune(
    head_dim: HeadDim = 128,
    dtype: Dtype = "bfloat16",
    heads: Annotated[int, typer.Option(help="Heads of one call, over the batch.")] = 24,
    grid: Annotated[str, typer.Option(help="Extents t,h,w of the video tokens.")] = "21,30,52",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure tile shapes on this GPU and keep what is faster; calls take it from then on.

    Takes about a minute. Each part is kept as soon as it is measured, so an interrupted run loses
    one part at most.
    """
    from triton.testing import do_bench

    from freqopt.kernels import tuned
    from freqopt.kernels.autotune import choose, parts_of
    from freqopt.progress import open_progress

    problem = problem_of(head_dim, dtype, heads, grid)
    start = (problem.device, problem.dtype, problem.head_dim)
    launch, path = tuned.launch_on(*start, problem.tokens), tuned.file_of(problem.device)
    table = Table("part", "before", "now", "choice", "tried", "do not run", "wrong")
    with open_progress(not quiet) as bars:
        for part in parts_of(problem, launch):
            with bars.phase(part.name, len(part.candidates)) as step:
                found = choose(part, launch, lambda f: do_bench(f, return_mode="median"), step)
            tuned.keep_choice(*start, tuned.bucket_of(problem.tokens), found.fields)
            choice = " ".join(f"{k}={v}" for k, v in found.fields.items()) or "as it was"
            table.add_row(
                part.name,
                f"{found.shipped_ms:.3f} ms",
                f"{found.ms:.3f} ms",
                choice,
                str(found.tried),
                str(found.failed),
                str(found.wrong),
            )
    Console().print(table)
    print(
        f"kept in {path}, for {dtype}, head dim {head_dim}, {tuned.bucket_of(problem.tokens)} "
        "tokens"
    )
