"""What is decided about a site, and what became of all sites of a graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Site


@dataclass(frozen=True)
class Timestep:
    """The model's timestep argument and the ascending boundaries of its buckets.

    Bucket i holds the timesteps above exactly i of the `edges`, in the units of the argument.
    """

    name: str
    edges: tuple[float, ...]


@dataclass
class Decision:
    """What becomes of a site; `why` is about either.

    budget: the heads' thresholds, used where density is 0, and the chunks of their orders: (2, H)
    float32, or (buckets, 2, H) by `timestep`; a node of the graph where the module brings its own.
    What stands in the site's place need not have one. largest_chunk: at least the largest of the
    chunks, 0 where all are in the grid's order.
    """

    site: Site
    split: bool
    why: Why
    budget: Tensor | fx.Node | None = None
    density: float = 0.0
    probes: int = 0
    timestep: Timestep | None = None
    largest_chunk: int = 0

    @property
    def reason(self) -> str:
        """`why` as a sentence."""
        return str(self.why)

    def fail(self, error: Exception) -> None:
        """Leave the site dense after all, as putting something in its place failed."""
        self.split = False
        self.why = Reason.FAILED(error=f"{type(error).__name__}: {error}")


@dataclass
class Rewritten:
    """Outcome of a rewrite. seconds: time of each step."""

    decisions: list[Decision] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of sites that were rewritten."""
        return sum(decision.split for decision in self.decisions)
