"""Tells of calls that are dense because torch.compile compiles no more, or nothing of such a call.

At its limit of recompilations, as after adapters of many names and shapes, Dynamo runs what it has
no graph for without a compiler, and asks no backend. PyTorch tells of that once, and not what it
means. Inside a transform of torch.func it runs all so, and tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from freqopt.capture.modes import is_transformed
from freqopt.capture.modules import base_name
from freqopt.errors import SiteError
from freqopt.passes.reasons import Reason
from freqopt.plan.content import PlanContent
from freqopt.telling import running
from freqopt.telling.running import Graph
from freqopt.telling.said import warn


def given_up() -> int:
    """How often Dynamo has reached a limit of recompilations in this process."""
    reasons = torch._dynamo.utils.counters["unimplemented"]
    return sum(n for why, n in reasons.items() if "limit exceeded" in why.partition("\n")[0])


class Limit:
    """Looks at the calls of one model for a limit of recompilations that leaves sites dense.

    A call in which the limit is reached and fewer attentions are split than are planned is told of,
    and so are such calls after it, and those inside a transform. Others are not: step caches skip
    attention. name: of the model.
    """

    def __init__(self, name: str, plan: PlanContent) -> None:
        self.name = name
        self.planned = sum(
            site.decision == "split" and base_name(each) == each
            for each, site in plan.sites.items()
        )
        self.reached = self.told = self.told_of_transforms = False
        self._given_up = 0
        self._before: list[tuple[Graph, int]] = []

    def begin(self) -> None:
        """A call of the model begins."""
        self._given_up = given_up()
        self._before = [(graph, graph.attended) for graph in running.graphs]

    def end(self, *, strict: bool, told: bool = False) -> None:
        """A call of the model is over. told: that sites were dense in it.

        Raises:
            SiteError: under `strict`, if sites were dense in it.
        """
        before, self._before = self._before, []
        if is_transformed() and not told and (strict or not self.told_of_transforms):
            split = _split_since(before)
            if split < self.planned:
                line = (
                    f"{self.name}: {split} of {self.planned} planned sites split in this call: "
                    f"{Reason.TRANSFORMED().seen}; call the model without"
                )
                self._say(line, strict=strict)
                self.told_of_transforms = True
        reached = self.reached or given_up() > self._given_up
        if not reached or (self.told and not strict):
            return
        split = _split_since(before)
        if split >= self.planned:  # what it compiles no more holds none of the attention
            return
        self.reached = True
        line = (
            f"{self.name}: {split} of {self.planned} planned sites split in this call, as "
            "torch.compile has reached torch._dynamo.config.recompile_limit "
            f"({torch._dynamo.config.recompile_limit}) and runs the rest without a compiler. "
            "Where adapters come and go, freqopt.optimize(..., route='eager') compiles nothing, "
            "and pipe.enable_lora_hotswap() keeps graphs; torch.compiler.reset() begins anew"
        )
        self._say(line, strict=strict)
        self.told = True

    def _say(self, line: str, *, strict: bool) -> None:
        if strict:
            raise SiteError(line)
        warn(line)


def _split_since(before: Iterable[tuple[Graph, int]]) -> int:
    """Attentions that were split since graphs had as many."""
    earlier = {id(graph): count for graph, count in before}
    return sum(graph.attended - earlier.get(id(graph), 0) for graph in running.graphs)
