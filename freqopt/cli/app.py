"""The command line: inspect, calibrate, report, export, run, kernels, demo and doctor.

Errors of freqopt come out as one line and exit status 2; anything else that goes wrong is a
defect and keeps its traceback.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import freqopt
from freqopt.cli import export
from freqopt.cli.calibrating import calibrate, inspect
from freqopt.cli.demo_command import demo
from freqopt.cli.groups import own_group_ended
from freqopt.cli.kernels import kernels_app
from freqopt.cli.options import BAD_INPUT, BROKEN, INTERRUPTED, AsJson, speaks
from freqopt.errors import FreqoptError
from freqopt.shown import say, shown_lines

__all__ = ["BAD_INPUT", "BROKEN", "INTERRUPTED", "app", "main"]

app = typer.Typer(
    name="freqopt",
    help="Rewrite dense attention of video transformers into frequency-split attention.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(export.export_app)
app.add_typer(kernels_app)
app.command()(export.run)
app.command()(inspect)
app.command()(calibrate)


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
    if not speaks():
        return
    if as_json:
        data = {name: each.model_dump(mode="json") for name, each in plans.items()}
        print(json.dumps(data.get("", data), indent=2))
        return
    target = output or plan.with_suffix(".html")
    for page in report_each(plans, target):
        say(f"wrote {page}")


app.command()(demo)


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
    for stream in (sys.stdout, sys.stderr):  # rich cuts with a sign that a plain terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with own_group_ended():
            app(args=given, prog_name="freqopt", standalone_mode=True)
    except FreqoptError as error:
        if "--traceback" in given:
            raise
        Console(stderr=True, soft_wrap=True).print(
            _printable(f"freqopt: {error}"), style="red", markup=False, highlight=False
        )
        sys.exit(BAD_INPUT)
    sys.exit(0)
