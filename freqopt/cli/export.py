"""`freqopt export onnx|tensorrt|plan|densities` and `freqopt run`, mounted by `freqopt.cli.app`.

Only typer is imported here; everything heavy loads when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from freqopt.cli.arguments import load_model, parse_grid
from freqopt.cli.theirs import users_code
from freqopt.errors import InputError, OptionError
from freqopt.files import check_regular, check_writable, replacing, write_atomically
from freqopt.shown import say

export_app = typer.Typer(
    name="export",
    help="Write a model for ONNX Runtime or TensorRT, or what a plan knows for other kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(metavar="MODULE:FACTORY", help="What makes the model, as for inspect.")
]
Folder = Annotated[Path, typer.Argument(help="The folder to fill.")]
Samples = Annotated[
    Path, typer.Option("--samples", help="Inputs as safetensors; the first call is the example.")
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan from freqopt calibrate.")]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic", help="Free extents of an input, NAME:DIM,DIM as in video:0,2,3,4; repeatable."
    ),
]
Capability = Annotated[
    list[int] | None,
    typer.Option(
        "--capability",
        help="Compile GPU kernels for this compute capability, as 90 for Hopper, GPU or not; "
        "repeatable. By default those of the GPUs here.",
    ),
]
Grid = Annotated[str | None, typer.Option("--grid", help="Extents t,h,w of the video tokens.")]


@export_app.command()
def onnx(
    model: Model,
    folder: Folder,
    samples: Samples,
    plan: PlanFile = None,
    dynamic: Dynamic = None,
    grid: Grid = None,
    opset: Annotated[int, typer.Option(help="18 to 23.")] = 20,
    library: Annotated[
        bool, typer.Option(help="Also build libfreqopt_ort.so, ONNX Runtime's kernels on a GPU.")
    ] = True,
    capability: Capability = None,
) -> None:
    """Write model.onnx, the operator library and a manifest."""
    from freqopt.exporters.onnx.export import export_onnx

    call, options = _call(model, samples), _options(samples, plan, dynamic, grid, capability)
    with users_code("the model failed while it was exported"):
        written = export_onnx(
            *call,
            folder,
            opset=opset,
            library=library,
            **options,
        )
    say(written)


@export_app.command()
def tensorrt(
    model: Model,
    folder: Folder,
    samples: Samples,
    plan: PlanFile = None,
    dynamic: Dynamic = None,
    grid: Grid = None,
    build: Annotated[str, typer.Option(help="auto, never or always: the engine.")] = "auto",
    plugin: Annotated[str, typer.Option(help="cpp, or aot: chains of nodes with PTX.")] = "cpp",
    capability: Capability = None,
) -> None:
    """Write model.trt.onnx, the plugin and build_engine.py; the engine where TensorRT is."""
    from freqopt.exporters.tensorrt.export import export_tensorrt

    call, options = _call(model, samples), _options(samples, plan, dynamic, grid, capability)
    with users_code("the model failed while it was exported"):
        written = export_tensorrt(
            *call,
            folder,
            build=build,
            plugin=plugin,
            **options,
        )
    say(written)


@export_app.command(name="plan")
def exchange(
    artifact: Annotated[Path, typer.Argument(help="A folder written by freqopt export onnx.")],
    plan: Annotated[Path, typer.Option("--plan", help="The plan whose budgets it gets.")],
) -> None:
    """Give an exported folder another plan's budgets, without the model."""
    from freqopt.exporters.exchange import exchange_plan
    from freqopt.plan.plan import Plan

    say(exchange_plan(artifact, Plan.load(plan)))


@export_app.command()
def densities(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, or a folder of them.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; standard output by default.")
    ] = None,
) -> None:
    """Write density, order and error by layer, head and timestep as JSON, for other kernels."""
    from freqopt.plan.file_text import write_json
    from freqopt.plan.plans import read_plans

    text = write_json(read_plans(plan).to_densities())
    if output is None:
        print(text)
        return
    write_atomically(output, f"{text}\n")
    say(f"wrote {output}")


def run(
    artifact: Annotated[Path, typer.Argument(help="An exported folder.")],
    inputs: Annotated[Path, typer.Option("--inputs", help="Tensors by input name, safetensors.")],
    outputs: Annotated[
        Path | None, typer.Option("--outputs", help="Where to write the outputs, safetensors.")
    ] = None,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    library: Annotated[
        bool, typer.Option(help="Use the operator library on a GPU; else the function body runs.")
    ] = True,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Its maker may run programs here: load its operator library, engine and plugin.",
        ),
    ] = False,
) -> None:
    """Check an exported folder, run it once, and tell which nodes ran where.

    The model is data, and so is what lies beside it, but for an operator library, an engine and a
    plugin, which are programs: they run with --trust, or where this machine built the library.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from freqopt.exporters.runner import run_artifact

    if outputs is not None:
        check_writable(outputs)
    try:
        check_regular(inputs)
        tensors = load_file(inputs)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"cannot read {inputs} as safetensors: {error}") from error
    result = run_artifact(artifact, tensors, provider=provider, library=library, trust=trust)
    say(result)
    for name, tensor in result.outputs.items():
        say(f"  {name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    if outputs is not None:
        with replacing(outputs) as partial:
            save_file({k: v.contiguous() for k, v in result.outputs.items()}, partial)
        say(f"wrote {outputs}")


run_command_app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
run_command_app.command(name="run")(run)


def _call(model: str, samples: Path) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    from freqopt.calibration.samples_file import load_samples

    module = load_model(model)
    args, kwargs = load_samples(samples, torch.device("cpu"))[0]
    return module, args, kwargs


def _options(
    samples: Path,
    plan: Path | None,
    dynamic: list[str] | None,
    grid: str | None,
    capabilities: list[int] | None,
) -> dict[str, Any]:
    import torch

    from freqopt.calibration.samples_file import load_samples
    from freqopt.plan.plan import Plan

    shapes = None
    if dynamic:
        args, kwargs = load_samples(samples, torch.device("cpu"))[0]
        if args:
            raise OptionError("--dynamic needs samples whose arguments have names")
        shapes = _dynamic_shapes(dynamic, kwargs)
    return {
        "plan": None if plan is None else Plan.load(plan),
        "dynamic_shapes": shapes,
        "grid": None if grid is None else parse_grid(grid),
        "capabilities": capabilities or None,
    }


def _dynamic_shapes(texts: list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    import torch

    shapes: dict[str, Any] = dict.fromkeys(kwargs)
    for text in texts:
        name, _, dims = text.partition(":")
        parts = dims.split(",")
        if name not in shapes or not all(part.strip().isdecimal() for part in parts):
            raise OptionError(
                f"--dynamic {text!r} is not NAME:DIM,DIM with one of the inputs {', '.join(shapes)}"
            )
        rank = kwargs[name].dim() if isinstance(kwargs[name], torch.Tensor) else 0
        if any(int(part) >= rank for part in parts):
            raise OptionError(
                f"--dynamic {text!r}: {name} of the first sample has {rank} dimensions, so that "
                f"{f'0 to {rank - 1} can be named' if rank else 'none can be free'}"
            )
        shapes[name] = {int(part): torch.export.Dim.AUTO for part in parts}
    return shapes
