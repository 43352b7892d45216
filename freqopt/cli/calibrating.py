"""`freqopt inspect` and `freqopt calibrate`, mounted by `freqopt.cli.app`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils import _pytree as pytree

import freqopt
from freqopt.calibration.asked import checked
from freqopt.calibration.samples import MAX_BUCKETS
from freqopt.cli.arguments import choose_device, load_model, parse_grid
from freqopt.cli.options import (
    INTERRUPTED,
    AsJson,
    Device,
    GridText,
    Model,
    Quiet,
    SamplesFile,
    speaks,
)
from freqopt.cli.pipelines import one_of, prompted
from freqopt.cli.rehearsal import rehearsed_each
from freqopt.cli.theirs import users_code
from freqopt.errors import OptionError
from freqopt.shown import say

ModelOrPipeline = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY|FOLDER",
        help="What makes the model; with --prompts a folder of a diffusers pipeline, or what makes "
        "a pipeline.",
    ),
]


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
    with torch.no_grad(), users_code("the model failed on the first sample"):
        found = freqopt.inspect(
            module, *args, grid=extents, plan=plan, min_tokens=min_tokens, **kwargs
        )
    if speaks():
        say(json.dumps(found.to_dict(), indent=2) if as_json else found)


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
    clock: Annotated[
        str,
        typer.Option(
            help="How the model will run, for what it costs on a GPU: eager (auto), compiled or "
            "graphs; the whole model is timed so, dense and split."
        ),
    ] = "auto",
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds of marginals, 0 for none (default: 3 on a GPU for small models)."
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(help="Runs of the model for sensitivities (default: 26 for slow models)."),
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

    if (samples is None) == (prompts is None):
        raise OptionError("pass --samples FILE, or --prompts FILE for a pipeline; one of them")
    if target_psnr is not None and prompts is None:
        raise OptionError("--target-psnr judges what a pipeline makes: pass --prompts")
    checkpoint = output.with_name(f"{output.name}.resume") if output.name else Path("plan.resume")
    extents = None if grid is None else parse_grid(grid)
    files = {} if dry_run else {"output": output, "checkpoint": checkpoint}
    asked = checked(
        {
            "target_error": target_error,
            "target_psnr": target_psnr,
            "quantile": quantile,
            "target_density": target_density,
            "grid": extents,
            "timestep": timestep,
            "timestep_buckets": timestep_buckets,
            "order": order,
            "clock": clock,
            "rounds": rounds,
            "passes": passes,
            "seed": seed,
            **files,
        }
    )
    where = choose_device(device)
    models: Any
    calls: Any
    if prompts is not None:
        decode = target_psnr is not None
        found = prompted(model, prompts, run_option or [], where, seed=seed, decode=decode)
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
        with users_code("the model failed on the first sample"):
            told = rehearsed_each(every, calls, extents, timestep, timestep_buckets)
        say(told)
        return
    try:
        with users_code("the model failed while it was calibrated"):
            plan = freqopt.calibrate(models, calls, progress=not quiet, **asked)
    except KeyboardInterrupt:
        kept = "nothing was measured yet"
        if checkpoint.exists():
            kept = f"what was measured is in {checkpoint}; the same command goes on from there"
        say(f"freqopt: interrupted: {kept}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if not speaks():
        return
    say(plan)
    say(f"wrote {output}")
