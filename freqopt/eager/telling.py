"""What a model that is served in eager mode tells: counts, probe errors and densities by site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from freqopt.decisions import check_length
from freqopt.grid import Grid
from freqopt.options import Options
from freqopt.passes.reasons import Reason, Why
from freqopt.telling import running
from freqopt.telling.attached import note_part
from freqopt.telling.outside import tell_outside
from freqopt.telling.running import Graph
from freqopt.telling.verdict import Compiled, Outcome

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


class Split(NamedTuple):
    """A call of an attention that was split.

    site: the plan's name of it. budget: (2, H). density, error: (B, H), as the op measured them.
    """

    site: str
    budget: Tensor
    density: Tensor
    error: Tensor


class Told:
    """Of one model. density: by site, the sum of mean densities and the number of calls.

    grids: that attention was on, each with the length that the plan has for it.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, strict: bool) -> None:
        self.model, self.plan = model, plan
        self.compiled = Compiled(Options(strict=strict))
        for site in plan.sites:  # until one is met
            self.dense(site, Reason.NOT_CALLED())
        self.grids: set[tuple[int, Grid]] = set()
        self.graphs: dict[tuple[str, ...], Graph] = {}
        self.density: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        note_part(model, self.compiled)

    def dense(self, site: str, why: Why) -> None:
        """A planned attention could not be split in a call."""
        self.compiled.outcomes[site] = Outcome(False, why, False)

    def missed(self, sites: Mapping[str, Why]) -> None:
        """A call of the model is over, in which these were not split, each time or some times."""
        for site, why in sites.items():
            self.dense(site, why)
        self.compiled.missed.update(sites)

    def grid(self, site: str, grid: Grid, keys: int) -> None:
        """A planned attention lies on a grid; what is new is held against the plan.

        keys: tokens. Other numbers of tokens around a grid are taken to be no difference.

        Raises:
            PlanError: a length too far from that of the plan.
        """
        key = (self.plan.sites[site].tokens, grid)
        if key in self.grids:
            return
        known = next(iter(self.plan.known(site)), None)
        if known is not None and grid[:2] != (1, 1):
            keys = math.prod(grid) + known.before + known.after
        check_length(self.plan, site, keys)
        self.compiled.grids.add(grid)
        tell_outside(self.model, self.plan, [grid])
        self.grids.add(key)

    def split(self, calls: Sequence[Split]) -> None:
        """A call of the model is over, in which these were split."""
        here = [call for call in calls if call.error.device == calls[0].error.device]
        key = tuple(call.site for call in here)
        for site in key:
            self.compiled.outcomes[site] = Outcome(True, Reason.BY_MODULE(), False)
        heads = tuple(call.error.shape[1] for call in here)
        graph = self.graphs.get(key)
        if graph is None or graph.heads != heads:
            count = range(len(here))
            graph = self.graphs[key] = Graph(
                decisions=tuple((site, True, str(Reason.BY_MODULE())) for site in key),
                measured=tuple(count),
                heads=heads,
                budgets=tuple(count),
            )
            running.remember(graph)
            running.gone_with(self, graph)
        errors = torch.cat([call.error.flatten() for call in here])
        graph.note([call.budget for call in here], errors)
        with torch.no_grad():
            means = torch.stack([call.density.mean() for call in here])
            known = self.density.get(key)
            total, calls_so_far = (torch.zeros_like(means), 0) if known is None else known
            self.density[key] = (total + means, calls_so_far + 1)

    def densities(self) -> dict[str, float]:
        """Mean share of pairs attended exactly, by site; waits for the device."""
        sums: dict[str, tuple[float, int]] = {}
        for sites, (total, count) in self.density.items():
            for site, value in zip(sites, total.tolist(), strict=True):
                before, calls = sums.get(site, (0.0, 0))
                sums[site] = before + value, calls + count
        return {site: value / count for site, (value, count) in sums.items()}

    def forget(self) -> None:
        """Take its counts off those of `freqopt.counters`."""
        mine = list(map(id, self.graphs.values()))
        running.graphs[:] = [graph for graph in running.graphs if id(graph) not in mine]
