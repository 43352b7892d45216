"""The command line: inspect, calibrate, report, export, run, kernels, demo and doctor.

Errors of freqopt come out as one line and exit status 2; anything else that goes wrong is a
defect and keeps its traceback.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

import freqopt
from freqopt.calibration.samples import MAX_BUCKETS
from freqopt.calibration.team import is_first_process
from freqopt.cli import export as commands
from freqopt.cli.arguments import choose_device, load_model, parse_grid
from freqopt.cli.kernels import kernels_app
from freqopt.cli.pipelines import one_of, prompted
from freqopt.cli.rehearsal import rehearsed_each
from freqopt.errors import FreqoptError, OptionError
from freqopt.plan.folder import check_place
from freqopt.shown import say, shown_lines

logger = logging.getLogger(__name__)

BAD_INPUT = 2
BROKEN = 1
INTERRUPTED = 130

app = typer.Typer(
    name="freqopt",
    help="Rewrite dense attention of video transformers into frequency-split attention.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(commands.export_app)
app.add_typer(kernels_app)
app.command()(commands.run)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="What makes the model: an importable module or a .py file, and a function in it that "
        "returns a torch.nn.Module when called without arguments (or the module itself).",
    ),
]
SamplesFile = Annotated[
    Path,
    typer.Option(
        "--samples",
        help="Inputs as safetensors, with tensors named '<call>/<argument>': '0/video', "
        "'0/timestep', '1/video', ...; other values as JSON in the metadata "
        "(freqopt.calibration.samples_file.save_samples writes such files).",
    ),
]
GridText = Annotated[
    str | None,
    typer.Option(
        "--grid", help="Extents t,h,w of the video tokens, where the graph does not tell them."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cuda or cpu; cuda where there is one by default.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"freqopt {freqopt.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say it, and leave."),
    ] = False,
    trace: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log decisions.")] = False,
) -> None:
    ctx.find_root().obj = {"traceback": trace}
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


ModelOrPipeline = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY|FOLDER",
        help="What makes the model; with --prompts a folder of a diffusers pipeline, or what makes "
        "a pipeline.",
    ),
]


@app.command()
def inspect(
    model: Model,
    samples: SamplesFile,
    no_weights: Annotated[
        bool,
        typer.Option(
            "--no-weights", help="Build it on PyTorch's meta device, for models too large for here."
        ),
    ] = False,
    grid: GridText = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan file: what the backend would do with it.")
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(help="Shorter sites stay dense, as in the backend's option.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Tell which attention of a model could be split, and why not the rest; or what a plan does."""
    from freqopt.calibration.samples_file import load_samples

    where = choose_device("meta" if no_weights else device)
    with where if no_weights else nullcontext():
        module = load_model(model)
    module = module.to(where)
    args, kwargs = load_samples(samples, "cpu" if no_weights else where)[0]
    if no_weights:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(where), (args, kwargs))
    extents = None if grid is None else parse_grid(grid)
    with torch.no_grad():
        found = freqopt.inspect(
            module, *args, grid=extents, plan=plan, min_tokens=min_tokens, **kwargs
        )
    say(json.dumps(found.to_dict(), indent=2) if as_json else found)


@app.command()
def calibrate(
    model: ModelOrPipeline,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Calls of the model, as for inspect.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Or prompts, one in a line: the pipeline is run on them, and recorded."),
    ] = None,
    run_option: Annotated[
        list[str] | None,
        typer.Option(help="Of the pipeline, name=value: num_inference_steps=8. May be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The plan to write (.json), or a folder.")
    ] = Path("plan.json"),
    target_error: Annotated[
        float | None,
        typer.Option(help="Relative L2 error of the model's output against dense (0.03)."),
    ] = None,
    target_psnr: Annotated[
        float | None,
        typer.Option(help="PSNR in dB of what the pipeline makes, instead of an error; --prompts."),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(help="Share of inputs the error is held for, such as 0.9 (default: rms)."),
    ] = None,
    target_density: Annotated[
        float | None, typer.Option(help="Share of pairs to attend exactly, instead of an error.")
    ] = None,
    grid: GridText = None,
    timestep: Annotated[
        str | None, typer.Option(help="Name of the model's timestep argument, if it is unusual.")
    ] = None,
    timestep_buckets: Annotated[
        int, typer.Option(help="Ranges of the timestep with budgets of their own, at most.")
    ] = MAX_BUCKETS,
    order: Annotated[
        str, typer.Option(help="auto: tokens by the grid or by content, as pays; or grid.")
    ] = "auto",
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds of marginals, 0 for none (default: 3 on a GPU for small models)."
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(help="Runs of the model for sensitivities (default: 30 for slow models)."),
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Seed of PyTorch's generators.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be calibrated, and on what.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Find the cheapest budgets that hold an error target, and write them as a plan.

    Ctrl-C keeps what was measured beside the plan, and the same command goes on from there.
    """
    from freqopt.calibration.samples_file import load_samples

    targets = {"error": target_error, "psnr": target_psnr, "density": target_density}
    asked = [f"--target-{name}" for name, value in targets.items() if value is not None]
    if len(asked) > 1:
        raise OptionError(f"{' and '.join(asked)} were both given; pass one of them")
    if (samples is None) == (prompts is None):
        raise OptionError("pass --samples FILE, or --prompts FILE for a pipeline; one of them")
    if target_psnr is not None and prompts is None:
        raise OptionError("--target-psnr judges what a pipeline makes: pass --prompts")
    if not dry_run:
        check_place(output)
    where = choose_device(device)
    extents = None if grid is None else parse_grid(grid)
    models: Any
    calls: Any
    if prompts is not None:
        decode = target_psnr is not None
        found = prompted(model, prompts, run_option or [], where, decode=decode)
        models = found.models
        if decode:
            models, calls = one_of(models, "--target-psnr"), found.run
        else:
            calls = found.recorded()
    else:
        assert samples is not None
        models, calls = load_model(model).to(where), load_samples(samples, where)
    if dry_run:
        if target_psnr is not None:
            calls = found.recorded()
        every = found.models if prompts is not None else models
        say(rehearsed_each(every, calls, extents, timestep, timestep_buckets))
        return
    checkpoint = output.with_name(f"{output.name}.resume")
    try:
        plan = freqopt.calibrate(
            models,
            calls,
            target_error=0.03 if target_error is None else target_error,
            target_psnr=target_psnr,
            quantile=quantile,
            target_density=target_density,
            grid=extents,
            timestep=timestep,
            timestep_buckets=timestep_buckets,
            order=order,
            rounds=rounds,
            passes=passes,
            checkpoint=checkpoint,
            output=output,
            progress=not quiet,
            seed=seed,
        )
    except KeyboardInterrupt:
        kept = "nothing was measured yet"
        if checkpoint.exists():
            kept = f"what was measured is in {checkpoint}; the same command goes on from there"
        say(f"freqopt: interrupted: {kept}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if not is_first_process():
        return
    say(plan)
    say(f"wrote {output}")


@app.command()
def report(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A file of one plan or several, or a folder.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page to write; by default beside the plan."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the page's data as JSON instead, and write none.")
    ] = False,
) -> None:
    """Show what a plan does, and why, as one HTML page; of several plans a page each."""
    from freqopt.plan.plan import Plan
    from freqopt.plan.plans import read_plans
    from freqopt.reporting.report import report_each

    found = read_plans(plan)
    plans = {"": found} if isinstance(found, Plan) else dict(found)
    if as_json:
        data = {name: each.model_dump(mode="json") for name, each in plans.items()}
        print(json.dumps(data.get("", data), indent=2))
        return
    target = output or plan.with_suffix(".html")
    for page in report_each(plans, target):
        say(f"wrote {page}")


@app.command()
def demo(
    device: Device = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Token grid t,h,w; instead of --frames, --height and --width."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 4.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 4.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    target_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of the model's output (0.03).")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Calibrate to this share of pairs attended exactly instead."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the video.")] = None,
    samples: Annotated[int | None, typer.Option(help="Inputs to calibrate on.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed runs; the fastest counts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    inner: Annotated[
        str | None, typer.Option(help="Backend that compiles the rewritten graph.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Its mode (on a GPU reduce-overhead: CUDA graphs).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write into (demo).")] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--shipped-plan",
            help="Make the plan here (default on a GPU), or check the one that ships (on a CPU).",
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A tiny untrained model, to try things out.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Sample a video of the zoo's model, dense and rewritten, and show on one page what differs."""
    from freqopt.demo.demo import run_demo
    from freqopt.demo.settings import default_settings

    if grid is not None:
        if (frames, height, width) != (None, None, None):
            raise OptionError("--grid was given with --frames, --height or --width; pass either")
        from freqopt.models_zoo.video_dit import VideoDiTConfig

        patch = VideoDiTConfig().patch
        frames, height, width = (n * p for n, p in zip(parse_grid(grid), patch, strict=True))
    settings = default_settings(
        device,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        target_error=target_error,
        density=density,
        seed=seed,
        samples=samples,
        repeats=repeats,
        dtype=dtype,
        inner=inner,
        mode=mode,
        out=out,
        calibrate=calibrate,
        random_weights=random_weights,
        progress=not quiet,
    )
    run_demo(settings, Console(quiet=quiet))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tell what works on this machine, and why the rest does not."""
    from freqopt.doctor import examine

    console = Console(quiet=as_json)
    with console.status("looking"):
        findings = examine()
    if as_json:
        print(json.dumps([asdict(found) for found in findings], indent=2))
    style = {"ok": "green", "absent": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "state", "detail"):
        table.add_column(column, overflow="fold")
    group = ""
    for found in findings:
        state = f"[{style[found.state]}]{found.state}[/]"
        heading = found.group if found.group != group else ""
        group = found.group
        table.add_row(f"[bold]{heading}[/]", found.name, state, found.detail.replace("[", "\\["))
    console.print(table)
    if any(found.state == "broken" for found in findings):
        raise typer.Exit(BROKEN)


def _printable(text: str) -> str:
    """Text that standard error's encoding has, with control characters as escapes."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return shown_lines(text).encode(encoding, "backslashreplace").decode(encoding)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="freqopt", standalone_mode=True)
    except FreqoptError as error:
        if "--traceback" in given:
            raise
        Console(stderr=True, soft_wrap=True).print(
            _printable(f"freqopt: {error}"), style="red", markup=False, highlight=False
        )
        sys.exit(BAD_INPUT)
    sys.exit(0)
