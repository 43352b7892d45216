"""What `freqopt.inspect` found: its records, and the text of them."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from freqopt.passes.site import Kind
from freqopt.telling.verdict import HOOKED

FULLGRAPH = (
    "compile with torch.compile(..., fullgraph=True), which refuses to break and says where the "
    "cause is; or change that line"
)


@dataclass(frozen=True)
class InspectedSite:
    """One attention.

    Attributes:
        name: path of the module around it, with #1, #2 for further attention in the same module; it
            is what plans refer to.
        kind: what it attends over: self, joint, text in keys, cross or other.
        heads: number of query heads.
        head_dim: channels of a head.
        query_length: queries, in tokens.
        key_length: keys, in tokens.
        grid: extents (t, h, w) of the video tokens, from the slowest to the fastest axis; None if
            unknown.
        text_before: text tokens before the video.
        text_after: text tokens after it.
        eligible: whether it could be split, whatever its length.
        decision: what the backend would do, "split" or "dense"; without a plan if none was given.
        reason: why it stays dense, or can be split.
        ranks: processes that share its heads out, of which `heads` are here.
    """

    name: str
    kind: Kind
    heads: int
    head_dim: int
    query_length: int
    key_length: int
    grid: tuple[int, int, int] | None
    text_before: int
    text_after: int
    eligible: bool
    decision: str
    reason: str
    ranks: int = 1


@dataclass(frozen=True)
class GraphBreak:
    """A place where torch.compile leaves the graph.

    Attributes:
        reason: torch.compile's own words.
        where: file and line.
        advice: what to do.
    """

    reason: str
    where: str
    advice: str = FULLGRAPH


@dataclass(frozen=True)
class Inspection:
    """All attention of a model that a backend sees, and what it does not see.

    Attributes:
        sites: attention in the graphs, in the order of execution.
        graph_breaks: where torch.compile left a graph.
        graphs: number of graphs the model was captured in; 1 is best.
        unseen: modules whose attention ran outside all graphs, where no backend can do anything
            about it.
        positions: inputs that hold the positions of tokens (such as img_ids), and the grid that
            these are in raster order on.
        imbalance: with a plan, how much longer attention takes on ranks that share the heads than
            it would with equal ones, as they are and after `freqopt.parallel.balance`; None where
            no heads are shared.
    """

    sites: list[InspectedSite]
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    graphs: int = 1
    unseen: list[str] = field(default_factory=list)
    positions: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    imbalance: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        split = sum(site.decision == "split" for site in self.sites)
        return (
            f"Inspection({len(self.sites)} sites, {split} to be split, {self.graphs} graphs, "
            f"{len(self.graph_breaks)} graph breaks)"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        split = sum(site.decision == "split" for site in self.sites)
        eligible = sum(site.eligible for site in self.sites)
        lines = [
            f"{len(self.sites)} attention sites in {self.graphs} graph(s): {eligible} can be "
            f"split, {split} will be",
            *_table(self.sites),
        ]
        if not self.sites:
            lines.append("no attention was found in any graph")
        if any(site.grid is None and not site.eligible for site in self.sites):
            lines += [
                f"{name} holds the positions of a {'x'.join(map(str, grid))} grid, which no graph "
                f"shows: pass grid={grid}"
                for name, grid in self.positions.items()
            ]
        if self.imbalance is not None:
            before, after = self.imbalance
            lines.append(
                f"by the plan, attention takes {before:.2f} times as long as with equal ranks; "
                f"freqopt.parallel.balance would make that {after:.2f}"
            )
        for broken in self.graph_breaks:
            lines += ["", f"graph break at {broken.where}: {broken.reason}", f"  {broken.advice}"]
        if self.unseen:
            grouped = _grouped([(name or "the model itself", ()) for name in self.unseen])
            names = ", ".join(name for name, _ in grouped)
            lines += ["", f"runs outside all graphs, where no backend sees it: {names}"]
            hooked = any(broken.advice == HOOKED for broken in self.graph_breaks)
            lines.append(f"  {HOOKED if hooked else FULLGRAPH}")
        return "\n".join(lines)


def _table(sites: Sequence[InspectedSite]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, (site,) in _grouped([(s.name, (_anonymous(s),)) for s in sites]):
        lengths = str(site.query_length)
        if site.key_length != site.query_length:
            lengths += f" -> {site.key_length}"
        text = " + ".join(
            part
            for part in (
                f"{site.text_before} before" if site.text_before else "",
                f"{site.text_after} after" if site.text_after else "",
            )
            if part
        )
        grid = "x".join(map(str, site.grid)) if site.grid else "-"
        here = str(site.heads) if site.ranks == 1 else f"{site.heads} of {site.ranks} ranks"
        heads = f"{here} x {site.head_dim}" if site.heads else "-"
        rows.append(
            (name, site.kind, heads, lengths, grid, text or "-", site.decision, site.reason)
        )
    if not rows:
        return []
    head = ("site", "kind", "heads", "tokens", "grid", "text", "decision", "reason")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _anonymous(site: InspectedSite) -> InspectedSite:
    return replace(site, name="")


def _grouped(items: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Equal items of numbered names in one: blocks.0.attn, blocks.1.attn as blocks.0-1.attn."""
    groups: dict[Any, list[str]] = {}
    for name, item in items:
        pattern = re.sub(r"\d+", "*", name, count=1)
        groups.setdefault((pattern, item), []).append(name)
    result = []
    for (pattern, item), names in groups.items():
        if len(names) == 1:
            result.append((names[0], item))
            continue
        numbers = sorted({int(m.group()) for n in names if (m := re.search(r"\d+", n))})
        result.append((pattern.replace("*", _ranges(numbers), 1), item))
    return result


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(parts)
