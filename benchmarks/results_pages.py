"""The pages of docs/results, whole: a few sentences each, and tables from the result files.

`python -m benchmarks.docs` writes them; nobody edits them by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import (
    calibration_page,
    composition_page,
    large_page,
    launches,
    lora,
    models,
    parallel_page,
    paying,
    readme,
    roofline,
    scaling,
)
from benchmarks.orders import GRID
from benchmarks.pages import RESULTS, load, origin, table

FILES = "../../benchmarks/results"


class Page(NamedTuple):
    """A page. files: the results it is made of. body: its lines below the title."""

    name: str
    title: str
    about: str
    files: tuple[str, ...]
    body: Callable[[], Iterator[str]]

    def text(self) -> str:
        """The whole page."""
        commands = dict.fromkeys(each for name in self.files for each in commanded(load(name)))
        sources = [f"- [{name}.json]({FILES}/{name}.json)" for name in self.files]
        lines = [
            f"# {self.title}",
            "",
            f"{self.about}.",
            "",
            "This page is written by `python -m benchmarks.docs`.",
            "Its figures are those of these files,",
            "",
            *sources,
            "",
            "written by",
            "",
            *(f"- `{command}`" for command in commands),
            "",
            *self.body(),
        ]
        return "\n".join(lines).rstrip() + "\n"


def commanded(result: dict[str, Any]) -> list[str]:
    """The commands that wrote a result file, the last one last."""
    where = result["environment"]
    return [*where.get("before", []), where.get("command") or result["command"]]


def attention() -> Iterator[str]:
    """The op on two GPUs."""
    yield "The tensors are queries, keys and values of the zoo's video transformer."
    yield "All heads have one threshold, so that the mean density is the one in the first column."
    yield "*Whole call* is what a caller waits for; in a CUDA graph Python launches nothing."
    yield "A row whose error fails its gate has no time."
    yield "*Told the density*, a call finds the threshold of each head itself."
    yield "Where a second table has several orders, *per head* takes for each head the better of"
    yield "the grid's and all by content, chosen on another seed and timestep."
    for name, title in (
        ("attention", "NVIDIA H200"),
        ("attention_dd5b6b5", "NVIDIA H200, the first generation"),
        ("attention_h100", "NVIDIA H100"),
    ):
        result = load(name)
        yield from ("", f"## {title}", "", origin(result))
        yield ""
        yield from readme.attention(result)
    yield from ("", f"![Error against time on an H200]({FILES}/attention.png)")


def dinov2() -> Iterator[str]:
    """Others' weights on others' film."""
    result = load("dinov2")
    grid = " x ".join(str(n) for n in result["grid"])
    yield f"{result['model']}, on film of {result['film']}:"
    yield f"{grid} = {result['tokens']:,} patches under one softmax, {result['layers']} layers of"
    yield f"{result['heads']} heads of {result['head_dim']}, {result['dtype'].split('.')[-1]}."
    yield "Errors are relative to dense attention on the same tensors; means over layers and heads."
    yield "Every head has the density of its column."
    yield "*Per head* takes the better of the grid's order and all by content, by another clip."
    yield from ("", origin(result))
    for clip in dict.fromkeys(row["clip"] for row in result["rows"]):
        yield from ("", f"## {clip}", "", *readme.dinov2_errors(result, clip))
    if not result["speed"]:
        return
    yield from ("", f"## Time at a relative L2 error of {result['target_l2']:g}", "")
    first = result["speed"][0]
    yield f"{first['heads']} heads of the clip {first['clip']}, mean over layers."
    yield "*One density*: the call finds each head's threshold. *One threshold*: all have the same."
    yield from ("", *readme.dinov2_speed(result))


def on_a_cpu() -> Iterator[str]:
    """The op on a CPU."""
    result = load("cpu")
    yield f"{result['heads']} heads of {result['head_dim']}, {result['tokens']:,} tokens with the"
    yield f"statistics of natural video, {result['dtype'].split('.')[-1]};"
    yield f"{result['threads']} threads for both, which take turns in {result['rounds']} rounds."
    yield from ("", origin(result), "", *readme.cpu(result))


def gradients() -> Iterator[str]:
    """The backward pass."""
    result = load("backward")
    yield from (origin(result), *readme.backward(result))


def overhead() -> Iterator[str]:
    """Each kernel beside its floor."""
    result = load("roofline")
    yield "The floor of a kernel is the larger of two times:"
    yield "of its bytes at the memory's rate, and of its products at the tensor cores' rate."
    yield "Kernels are timed one after the other; in a call some run beside each other."
    yield from ("", origin(result), *roofline.table(result), "")
    yield f"![Kernels and their floors]({FILES}/roofline.png)"
    if orders := roofline.tables_of_orders(result):
        yield from ("", "## An order by content", "", *orders)


def calls() -> Iterator[str]:
    """What is done at each call outside the graph."""
    result = load("calls")
    yield "Counting, keeping what probes measured, and (by blocks, with a plan attached)"
    yield "the grid of the model's call, with a graph that computes nothing: the shortest of 200."
    yield "Passes run once, when a model is compiled."
    rows = [
        ["a call of 40 layers, compiled whole", f"{result['whole_us_40_layers']} µs", "50 µs"],
        ["a call of 40 layers, by blocks", f"{result['by_blocks_us_40_layers']} µs", "50 µs"],
        ["all passes over 60 layers of Wan", f"{result['passes_s_60_layers']} s", "1 s"],
    ]
    yield from ("", origin(result), "", *table(["what", "takes", "may take"], rows))


def lengths() -> Iterator[str]:
    """From thousands of tokens to a million, at one error."""
    result, before = load("scaling"), load("scaling_4418b3f")
    yield "Fields have the statistics of natural video; all grids have the proportions 1:2:2."
    yield "What density an error needs differs between fields of one length by up to 1.7 times."
    yield from ("", origin(result), *scaling.table(result), "")
    yield f"![Time and density against length]({FILES}/scaling.png)"
    rows = [{**row, "order": GRID} for row in before["rows"]]
    yield from ("", "## Shorter and longer, in the grid's order", "")
    yield from (origin(before), *scaling.table({**before, "rows": rows}))


def launching() -> Iterator[str]:
    """Calls whose launches are recorded, beside those found out anew."""
    result = load("launches")
    yield "The second call of a form is recorded, and from then on its launches are repeated"
    yield "([why](../decisions/repeat.md))."
    yield "*GPU alone* is a call's CUDA graph."
    yield from ("", origin(result), "", *launches.tables(result))


def whether_plans_pay() -> Iterator[str]:
    """Plans for sizes at which attention is a small or a large part of the time."""
    result = load("paying")
    yield f"The zoo's model, calibrated for an error of {result['target_error']:g}:"
    yield "at each size several times, on inputs of another seed each."
    yield "A plan is never to be slower than dense, or is to split nothing."
    yield "Where nothing is split both columns run the same kernels, and differ by what launching"
    yield "them takes."
    yield from ("", origin(result), "", *paying.rows(result))


def calibration() -> Iterator[str]:
    """Calibrated budgets against what they are made of, less one thing each."""
    result = load("calibration")
    yield "Calibrated budgets are compared with one threshold for everything,"
    yield "and with budgets from all ingredients but one."
    yield from ("", origin(result), *calibration_page.rows(result), "")
    yield f"![Error against density]({FILES}/calibration.png)"
    denser = load("calibration_denser")
    yield from ("", "## At higher densities", "", origin(denser))
    yield f"{denser['settings']['seeds']} seeds."
    yield from ("", *calibration_page.at_equal_error(denser), "")
    yield from calibration_page.compared(denser)
    yield from ("", "What bounds the PSNR: [a decision](../decisions/video-bound.md).")
    earlier = load("calibration_7dae3f7")
    yield from ("", "## One ingredient left out", "", "Of an earlier commit.")
    yield from ("", origin(earlier), "", *calibration_page.compared(earlier))


def exported() -> Iterator[str]:
    """One node in ONNX Runtime against the op in PyTorch."""
    yield "One node of an exported file, under ONNX Runtime's CUDA provider, on the same tensors as"
    yield "the op in PyTorch: with the operator library, and with the function body."
    yield "*L2* is the library's relative L2 distance from the op in PyTorch."
    yield "The smallest case is bound by launches in PyTorch."
    for name in ("export", "export_564acc8"):
        result = load(name)
        yield from ("", f"## Commit {result['environment']['commit']}", "", origin(result), "")
        head = ["case", "type", "head dim", "tokens", "PyTorch", "library", "ratio", "body", "L2"]
        yield from table(head, [export_row(row) for row in result["rows"]])
    yield ""
    yield "The earlier run, 564acc8, had a mid band, which exported files no longer have,"
    yield "and a kernel for text queries that was not pipelined yet."


def export_row(row: dict[str, Any]) -> list[str]:
    """One case; times in ms."""
    ms = row["ms"]
    return [
        row["name"],
        row["dtype"],
        str(row["head_dim"]),
        f"{row['tokens']:,}",
        f"{ms['pytorch']:.3f} ms",
        f"{ms['library']:.3f} ms",
        f"{ms['library'] / ms['pytorch']:.3f}",
        f"{ms['body']:.1f} ms",
        f"{row['l2']['library']:.1e}",
    ]


def demos() -> Iterator[str]:
    """The video of the demo."""
    yield "The zoo's model is small (8 million parameters) and was trained for minutes."
    yield "It has two heads a layer, so that a call is bound by launches where it is short."
    if load("demo_cpu")["calibration_seconds"] is None:
        yield "On a CPU the plan ships, and the run checks it on the video's own steps."
    for name in ("demo_h200", "demo_cpu"):
        yield from ("", *readme.demo(load(name)))


def beside_rivals() -> Iterator[str]:
    """The op beside what else was installed."""
    result = load("rivals")
    yield "All have the same queries, keys and values, of the zoo's video transformer."
    yield "A rival that is given *our route* is timed without the finding of it."
    yield "Of a rival's orders of tokens the one with less error is shown."
    yield from ("", origin(result))
    for problem in result["problems"]:
        yield from ("", f"## {problem['heads']} heads x {problem['tokens']:,} tokens", "")
        yield from readme.rivals(problem)
    yield from ("", f"![Error against time, all of them]({FILES}/rivals.png)")


REAL = ("real", "real_speech")
"""Files of plans on others' models: over film, and over speech."""


def on_real_models() -> Iterator[str]:
    """Plans on what others made."""
    yield "Each plan is made on other clips than the one it is judged on."
    yield "*Same matches*: patches whose nearest patch in the next frame stays the same."
    yield "*Words changed*: the word error rate of the transcript, against the dense encoder's."
    yield "The noise floor is what another dense attention makes of the same features."
    yield "On a CPU a plan goes by counted products; nothing is timed before it is given out."
    for name in REAL:
        result = load(name)
        model = f"{result['model'][:1].upper()}{result['model'][1:]}"
        yield from ("", f"## {model}", "", f"On {result['data']}.", "", origin(result), "")
        yield from readme.real(result)


def whole_generations() -> Iterator[str]:
    """Clips against dense ones."""
    result = load("generations")
    settings = result["settings"]
    yield f"Clips of {result['tokens']:,} tokens in {settings['steps']} steps, compared one by one."
    yield "*The rest dropped* has the same blocks exact as ours, and nothing else."
    yield "*SSIM at scales* is its mean at full, half and quarter size."
    yield from about_objects(result)
    yield from ("", origin(result), "", *readme.generations(result))


def about_objects(result: dict[str, Any]) -> Iterator[str]:
    """What the columns of objects are, where a file has them."""
    if not readme.counts_objects(result):
        return
    yield "*Objects* are regions of a colour that stands out from the background; one is *kept* if"
    yield "the same frame has a region of that colour in its place, a third of both in common."


def few_steps() -> Iterator[str]:
    """Clips of the distilled model against its dense ones."""
    result = load("generations_distilled")
    yield "The zoo's model, distilled to four steps by an adapter of low rank,"
    yield f"makes clips of {result['tokens']:,} tokens, compared with its own dense ones."
    yield "*Own plan* is calibrated on its steps, of other clips, for the density of the row."
    yield from about_objects(result)
    yield from ("", origin(result), "", *readme.generations(result))
    yield from (f"\nNo plan at {why}." for why in result["without_plan"])


def found() -> Iterator[str]:
    """What is found in the graphs of public models."""
    result = load("models")
    libraries = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    yield "Configurations are small and weights random"
    yield "([tests/support/model_cases.py](../../tests/support/model_cases.py))."
    yield "Each model is compiled once with every site split at threshold 0,"
    yield "which must equal dense attention at each site and at the output."
    yield ""
    yield origin(result)
    yield f"{libraries}."
    yield ""
    yield "- **split**: attentions that can be split, of all in the graphs."
    yield "- **grid from**: `graph`, read off the model's own operations; or `grid=`, packed before"
    yield "  the model, so that it has to be given in the options or comes with the plan."
    yield "- **rest**: why the other attentions stay dense."
    yield ""
    yield from models.table(result["rows"])


PARALLEL = tuple(
    name
    for name in ("parallel_2", "parallel_4", "parallel_4_262144")
    if (RESULTS / f"{name}.json").exists()
)
"""Results of so many GPUs, as far as they are there."""


def on_several_gpus() -> Iterator[str]:
    """A model on several GPUs."""
    yield from parallel_page.page([load(name) for name in PARALLEL])
    for name in PARALLEL:
        yield from ("", f"![Steps by rank]({FILES}/{name}.png)")


PAGES = (
    Page(
        "attention",
        "The op",
        "What the op costs, beside dense attention, and how far its output is from it",
        ("attention", "attention_dd5b6b5", "attention_h100"),
        attention,
    ),
    Page(
        "backward",
        "Gradients",
        "What the backward pass costs, and how far gradients are from dense attention's",
        ("backward",),
        gradients,
    ),
    Page(
        "overhead",
        "What everything but attention costs",
        "Each kernel of one call beside the time that it needs at least",
        ("roofline",),
        overhead,
    ),
    Page(
        "launches",
        "What launching costs",
        "A call of the op launched kernel by kernel, and repeated",
        ("launches",),
        launching,
    ),
    Page(
        "paying",
        "Whether plans pay",
        "A calibrated model against the dense one, both compiled, at several sizes",
        ("paying",),
        whether_plans_pay,
    ),
    Page(
        "calls",
        "Around the graph",
        "What a compiled model costs at each call beside its graph",
        ("calls",),
        calls,
    ),
    Page(
        "lengths",
        "How time grows with the length",
        "Time, density and memory at one error",
        ("scaling", "scaling_4418b3f"),
        lengths,
    ),
    Page(
        "calibration",
        "Calibration",
        "What budgets per head and timestep are worth",
        ("calibration", "calibration_denser", "calibration_7dae3f7"),
        calibration,
    ),
    Page(
        "export",
        "Exported operators",
        "The op inside ONNX Runtime against the op in PyTorch",
        ("export", "export_564acc8"),
        exported,
    ),
    Page(
        "demo",
        "The demo",
        "A video sampled from the zoo's model, dense and rewritten",
        ("demo_h200", "demo_cpu"),
        demos,
    ),
    Page(
        "dinov2",
        "Others' weights",
        "Orders of tokens on DINOv2 over real film",
        ("dinov2",),
        dinov2,
    ),
    Page("cpu", "On a CPU", "The op beside dense attention on a CPU", ("cpu",), on_a_cpu),
    Page(
        "rivals",
        "Beside others",
        "The op and what else attends sparsely or fast, in one run",
        ("rivals",),
        beside_rivals,
    ),
    Page(
        "real",
        "On what others made",
        "Plans judged by what a model's features are for",
        REAL,
        on_real_models,
    ),
    Page(
        "generations",
        "Whole generations",
        "Clips against the dense ones, by number of dense steps",
        ("generations",),
        whole_generations,
    ),
    Page(
        "large",
        "A large model",
        "A transformer of Wan 2.1 14B's size: steps, calibration, memory",
        ("large",),
        large_page.page,
    ),
    Page(
        "parallel",
        "Several GPUs",
        "A model of 14 B on several GPUs: time by rank, and what collectives take",
        PARALLEL,
        on_several_gpus,
    ),
    Page("few-steps", "Four steps", "Of a distilled model", ("generations_distilled",), few_steps),
    Page(
        "training",
        "Training through the split",
        "Losses and gradients of an adapter, beside dense training's",
        ("lora",),
        lora.page,
    ),
    Page(
        "composition",
        "Together with other ways",
        "What caches, eight-bit layers and CUDA graphs add",
        ("composition",),
        composition_page.page,
    ),
    Page("models", "Models", "What is found in the graphs of public models", ("models",), found),
)


OPTIONAL = {"dinov2", "cpu", "rivals", *REAL, *PARALLEL}
OPTIONAL |= {"generations", "generations_distilled", "lora", "composition", "large"}
"""Results that a checkout need not have: packages or machines of their own are needed for them."""


def present(folder: Path = RESULTS) -> list[Page]:
    """Pages whose results are there; only those of `OPTIONAL` may be left out."""
    return [
        page
        for page in PAGES
        if not OPTIONAL.issuperset(page.files)
        or (bool(page.files) and all((folder / f"{name}.json").exists() for name in page.files))
    ]


def index() -> str:
    """The folder's first page."""
    rows = [[f"[{page.title}]({page.name}.md)", page.about] for page in present()]
    lines = [
        "# Results",
        "",
        "Every page here is written whole by `python -m benchmarks.docs`, from the files under",
        f"[benchmarks/results]({FILES}/).",
        "Each file names device, versions and commit.",
        "",
        *table(["page", "what"], rows),
    ]
    return "\n".join(lines) + "\n"
