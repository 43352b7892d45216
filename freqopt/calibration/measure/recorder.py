"""Recorders: they stand where a site's attention was, and do what the run's request says.

A private torch.compile backend puts them there, by the same passes as the real one. They pass on
either the dense or a split result; nothing outlives the call but sums per head, so a model
calibrates in the memory that it runs in.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.readings import Layouts
from freqopt.calibration.measure.replay import Staged, Tape
from freqopt.calibration.measure.requests import Dense, Request, Result, Visit
from freqopt.calibration.team import Heads, Team
from freqopt.capture.call_grids import CallGrids
from freqopt.decisions import why_not
from freqopt.errors import CalibrationError
from freqopt.grid import Grid
from freqopt.kernels.device import uncast
from freqopt.passes.axes.dimensions import same
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids, Model
from freqopt.passes.manager import rewrite
from freqopt.passes.naming import Names
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.operands import pads_queries
from freqopt.passes.rewrite.rewrite import replace_site
from freqopt.passes.site import Known, Site

logger = logging.getLogger(__name__)


@dataclass
class Desk:
    """Between a runner and the recorders in its model: the run under way.

    dense_sites: attention that cannot be split at all, with the reason. layouts: of the others'
    tokens. team: who shares the heads of the sites met so far. tape: what is wanted of the graph of
    the next call.
    """

    request: Request = field(default_factory=Dense)
    bucket: int = 0
    result: Result = field(default_factory=Result)
    dense_sites: dict[str, str] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=Layouts)
    team: Team = field(default_factory=Team)
    tape: Tape | None = None

    def clear(self) -> None:
        """Forget what recorders have said so far in this run, and of which sites there are."""
        vars(self.result).update(vars(Result()))
        self.dense_sites.clear()
        self.layouts.clear()


class Recorder:
    """Stands where a site's attention was; called with its tensors while the model runs."""

    def __init__(
        self, desk: Desk, site: str, mask: int | None = None, found: Site | None = None
    ) -> None:
        """mask: as in `Known`; None where its layout is not to be noted. found: the site.

        Of what was found the heads are known that are here, and where its grid comes from.
        """
        self.desk, self.site, self.mask = desk, site, mask
        self.heads = Heads(None if found is None else found.share)
        self.sources = () if found is None else found.sources
        self.__name__ = self.__qualname__ = "freqopt_calibration_recorder"

    def masked(self, mask: int) -> Recorder:
        """The same where a call has another mask than that which it was made for."""
        if self.mask in (None, mask):
            return self
        other = copy.copy(self)
        other.mask = mask
        return other

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        grid: Grid,
        text_before: int,
        text_after: int,
        scale: float,
    ) -> Tensor:
        """Attention of (B, H, N, D) tensors, dense or split as the request says."""
        call = AttentionCall(query, key, value, key_mask, grid, text_before, text_after, scale)
        request, result = self.desk.request, self.desk.result
        if not math.prod(grid):  # this call's data tell none
            return call.dense()
        visit = Visit(self.site, self.desk.bucket, call, result, self.heads)
        result.shapes.setdefault(self.site, visit.shape)
        if self.mask is not None:
            t, h, w = grid[0], grid[1], grid[2]
            layout = Known((t, h, w), text_before, text_after, self.mask, self.sources)
            self.desk.layouts.note(self.site, layout)
        try:
            with uncast(query.device):  # errors are measured in float32
                return request.attend(visit)
        except Exception as error:
            if not request.lenient:
                raise
            reason = result.failures[self.site] = f"{type(error).__name__}: {error}"
            logger.warning("%s stays dense, measuring it failed: %s", self.site, reason)
        return call.dense()


def mask_of(site: Site) -> int | None:
    """The mask of a site that may be split, as in `Known`; None where no `Known` says how it lies.

    That is where its tokens are put in another order, and where keys without queries are some of
    the text, or more than that.
    """
    if site.pieces or (pads_queries(site) and not _pads_all_text(site)):
        return None
    return 0 if site.attention.mask is None else 1 + site.attention.masks_queries


def _pads_all_text(site: Site) -> bool:
    """Whether the queries are those of the video alone."""
    video = math.prod(site.grid or ())
    text = site.text_before + site.text_after
    return same(site.query_length, video) and same(site.key_length, video + text)


def measured(sites: Sequence[Site]) -> list[Decision]:
    """Measure each site that can be split, and of which all heads are known."""
    problems = [why_not(site) or _untold(site) for site in sites]
    return [
        Decision(site, problem is None, problem or Reason.MEASURED())
        for site, problem in zip(sites, problems, strict=True)
    ]


def _untold(site: Site) -> Why | None:
    if site.share is None:
        return None
    planned = site.heads * site.share.ranks
    if site.share.heads == planned:
        return None  # else not known, or shared by the ranks of several groups
    return Reason.HEADS_UNTOLD(heads=site.heads, planned=planned)


def team_of(sites: Sequence[Site]) -> Team:
    """The processes that share the heads of sites.

    Raises:
        CalibrationError: not all of them are shared by the same.
    """
    shares = [site.share for site in sites]
    groups = dict.fromkeys(None if share is None else share.group for share in shares)
    if len(groups) > 1:
        raise CalibrationError(
            f"the heads of some sites are shared by other processes than those of others "
            f"({', '.join(str(name) for name in groups)}): calibrate on one process, the plan "
            "serves any number"
        )
    return Team(next(iter(groups), None))


def _site_of(node: torch.fx.Node) -> str | None:
    """The site that a node records."""
    return node.target.site if isinstance(node.target, Recorder) else None


def recording_backend(
    desk: Desk, grids: Grids, names: Names | None = None
) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """A torch.compile backend with a recorder for each site that can be split; it runs eagerly."""

    def put(gm: torch.fx.GraphModule, decision: Decision) -> None:
        site = decision.site
        replace_site(gm, site, Recorder(desk, site.name, mask_of(site), site))

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        calls = CallGrids(gm, example_inputs)
        gm = calls.gm
        with_told = replace(grids, told=tuple(calls.told), believed=True, order_of=calls.order_of)
        decisions = rewrite(gm, measured, put, with_told, model=Model(names)).decisions
        for decision in decisions:
            if not decision.split:
                desk.dense_sites[decision.site.name] = decision.reason
        desk.team = team_of([decision.site for decision in decisions if decision.split])
        calls.settle()
        staged = Staged(gm, _site_of)
        return calls.reading(lambda *arguments: staged(desk.tape, *arguments))

    return backend
