"""The plan: every budget of a model, the error they were calibrated to, and the evidence.

A plan is a JSON file that a person can read and that is safe to load from a stranger: it is data
checked field by field, never pickle. Its hash refuses truncated and hand-edited files.
"""

from __future__ import annotations

import difflib
import html
import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from freqopt.capture.modules import base_name
from freqopt.errors import PlanError
from freqopt.files import write_atomically
from freqopt.passes.site import Known, Source
from freqopt.plan.densities import densities_of
from freqopt.plan.file_text import content_hash, write_json
from freqopt.plan.folder import ALONE
from freqopt.plan.identity import (
    SiteShape,
    check_sites,
    class_name_of,
    model_fingerprint,
    modules_in,
    names_in,
    note_difference,
    unwrapped_model,
)
from freqopt.plan.plan_file import content_of, read_plan
from freqopt.plan.records import SitePlan
from freqopt.plan.text import describe
from freqopt.plan.travelling import Travelling

__all__ = ["BALANCED", "CARRY", "Plan", "model_fingerprint"]

CARRY = 8
"""Largest factor, either way, between the lengths that a plan is calibrated at and used at."""

BALANCED = "freqopt_balanced"
"""Attribute of a model whose heads were put in another order: budgets for the order before."""


class Plan(Travelling):
    """All budgets and choices for a model, with the error they were calibrated to.

    Where a PSNR or a density was asked for, `target_error` is the measured error.

    Attributes:
        format: what kind of file this is.
        version: of the file's format.
        split_version: of the definition of the split, see `SPLIT_VERSION`.
        model: which model the plan belongs to.
        component: what the pipeline calls that model, where several were calibrated together.
        grids: extents (t, h, w) that the error was verified at, in tokens.
        device: where it was calibrated.
        versions: of the libraries it was calibrated with.
        seed: of PyTorch's generators.
        target_error: relative L2 error of the model's output that was asked for, without unit.
        measured_error: the same as measured on held-out samples, root mean square over them.
        worst_error: that of the worst of them.
        predicted: whether these errors were not measured but predicted, see `at`.
        target_quantile: share of inputs that `target_error` was asked for; None: for their root
            mean square.
        verified: errors of the held-out samples one by one, and times of the whole model.
        target_psnr: PSNR in dB of what the pipeline generates, if that was asked for.
        measured_psnr: the same as measured, in dB.
        target_density: share of pairs to attend exactly, if that was asked for.
        mean_density: share of pairs attended exactly, weighted by the sites' dense cost.
        timestep_name: the model's argument that selects the timestep bucket.
        timestep_edges: boundaries between the buckets of every site's budgets, ascending, in that
            argument's units; empty for one bucket.
        timestep_range: least and largest timestep of the samples, in the same units; None where
            they had none.
        sites: what is decided about each site, by its name.
        evidence: why the plan is what it is.
    """

    def budget(self, site_name: str, bucket: int = 0) -> Tensor:
        """Budget of a site: (2, H) float32, the heads' thresholds and the chunks of their orders.

        A chunk is 0 where tokens are in the grid's order. A site that the plan leaves dense gets
        zeros, which is dense attention.

        Raises:
            PlanError: the plan has no such site or timestep bucket.
        """
        site = self._site(site_name)
        if site.decision == "dense":
            return torch.zeros(2, site.heads, dtype=torch.float32, device="cpu")
        if not 0 <= bucket < len(site.budgets):
            raise PlanError(
                f"timestep bucket {bucket} does not exist; this plan has {len(site.budgets)}"
            )
        # On the CPU whatever PyTorch's default device: under "meta" there would be no budget.
        kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        chunks = torch.tensor(site.chunks or [0] * site.heads, **kind)
        threshold = torch.tensor(site.budgets[bucket].threshold, **kind)
        return torch.stack([threshold, chunks.repeat_interleave(site.heads // len(chunks))])

    def budgets(self, site_name: str) -> Tensor:
        """Budgets of a site for all timestep buckets, (buckets, 2, H) float32; see `budget`.

        Raises:
            PlanError: the plan has no such site.
        """
        buckets = range(len(self.timestep_edges) + 1)
        return torch.stack([self.budget(site_name, bucket) for bucket in buckets])

    def module_budgets(self, site_name: str) -> Tensor:
        """Budgets (buckets, 2, H) float32 of an attention that serve every call of its module.

        A plan of the whole graph tells the calls apart that a model makes of one module. Where they
        cannot be told apart, the smallest entries over them are those that keep what each was
        verified with: no call is less exact than planned.

        Raises:
            PlanError: the plan has no such site.
        """
        calls = [name for name in self.sites if base_name(name) == base_name(site_name)]
        return torch.stack([self.budgets(name) for name in calls or [site_name]]).amin(0)

    def largest_chunk(self, site_name: str) -> int:
        """The largest of the chunks that a site's tokens are ordered in; 0 for the grid's order.

        Raises:
            PlanError: the plan has no such site.
        """
        return max(self._site(site_name).chunks, default=0)

    def expected_error(self, site_name: str, tokens: int) -> float:
        """Output error to expect where a site attends over another number of tokens.

        Thresholds carry over, as scores are scaled by the number of blocks. At equal thresholds the
        error was seen to fall with the square root of the length
        (docs/decisions/other-lengths.md); below the calibrated length it is taken to grow likewise.

        Raises:
            PlanError: the plan has no such site, or the length is more than CARRY times off.
        """
        known = self._site(site_name).tokens
        if not 1 / CARRY <= tokens / known <= CARRY:
            raise PlanError(
                f"site {site_name!r} attends over {tokens} tokens here and this plan was calibrated"
                f" at {known}: more than a factor of {CARRY} is not supported. Calibrate with "
                "samples of this size"
            )
        return self.measured_error * math.sqrt(known / tokens)

    def at(self, *, target_error: float) -> Plan:
        """A plan for another error, from what was measured for this one, in milliseconds.

        Its errors and densities are predicted (`predicted` is set, and a note says so): budgets are
        allocated anew along the measured curves, scaled to what this plan was verified at.
        `verify` measures.

        Args:
            target_error: relative L2 error of the model's output, in (0, 1), without unit; at most
                four times more or less than this plan's.

        Raises:
            OptionError: a target outside that.
            PlanError: the plan has no curves.
        """
        found: Plan = _calibration("moving").moved(self, target_error)
        return found

    def to_densities(self) -> dict[str, Any]:
        """Density, order and error by layer, head and timestep range, for other kernels.

        Plain dicts, lists, numbers and strings, which are JSON as they are; docs/densities.md has
        the schema. The model's name in it is `component`, or "model".
        """
        return densities_of({self.component or ALONE: self})

    def verify(self, model: nn.Module, samples: Any) -> Plan:
        """The same plan with the error measured on samples, as `freqopt.calibrate` takes them.

        Raises:
            CalibrationError: samples that cannot be used.
            PlanError: the plan is another model's.
        """
        found: Plan = _calibration("moving").verified(self, model, samples)
        return found

    def check_model(self, model: nn.Module | str | Mapping[str, SiteShape]) -> None:
        """Refuse a model that the plan was not made for.

        Of a model itself the sites count: adapters, fused projections, quantised weights and
        wrappers change parameters, and are noted once.

        Args:
            model: the model itself, its `model_fingerprint`, or the sites found in its graph as
                {name: (heads, head_dim)}, which is all that a backend sees. Sites of the plan may
                be missing from a graph (partial graphs), and a graph may have sites that the plan
                does not know; but some must be shared, and those must have the same shape.

        Raises:
            PlanError: saying what differs.
        """
        if isinstance(model, Mapping):
            return check_sites(self, model)
        if isinstance(model, str):
            if model != self.model.fingerprint:
                raise PlanError(
                    f"this plan was calibrated for {self.model.class_name} (fingerprint "
                    f"{self.model.fingerprint}) but the model has fingerprint {model}: parameter "
                    "names or shapes differ. Calibrate this model with freqopt.calibrate()"
                )
            return None
        if model_fingerprint(model) != self.model.fingerprint:
            self.modules(model)
            note_difference(self, model)
        self.check_order(model)
        return None

    def check_order(self, model: nn.Module) -> None:
        """Refuse a model whose heads stand in another order than this plan's rows.

        Raises:
            PlanError: `freqopt.parallel.balance` was given this plan, and returned another.
        """
        before = unwrapped_model(model).__dict__.get(BALANCED)
        if before is not None and before == {n: self.rows(n) for n in before if n in self.sites}:
            raise PlanError(
                f"the heads of {class_name_of(model)} were put in another order by "
                "freqopt.parallel.balance, and this plan is for the order before: its budgets "
                "would go to wrong heads. Use the plan that balance returned (.plan)"
            )

    def rows(self, site_name: str) -> tuple[object, ...]:
        """All that a site's budgets say, head by head.

        Raises:
            PlanError: the plan has no such site.
        """
        site = self._site(site_name)
        return tuple(tuple(b.threshold) for b in site.budgets), tuple(site.chunks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an existing file is replaced only by a complete one.

        Raises:
            FileError: it cannot be written.
        """
        write_atomically(path, f"{self.text()}\n")

    def text(self) -> str:
        """The text of the plan's file, which `parse` reads."""
        content = self.model_dump(mode="json")
        return write_json({"hash": content_hash(content), **content})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: no such file, or one that is truncated, edited by hand, of another version or
                not a plan at all.
        """
        return cls.parse(read_plan(path), origin=str(Path(path)))

    @classmethod
    def parse(cls, text: str, *, origin: str = "plan") -> Plan:
        """A plan from the text of its file; `origin` names it in errors (see `load`)."""
        content = content_of(text, origin)
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the plan"
            raise PlanError(f"{origin}: {where}: {first['msg']}") from error

    def __str__(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        split = sum(site.decision == "split" for site in self.sites.values())
        return (
            f"Plan(for {self.model.class_name}: {split} of {len(self.sites)} sites split, mean "
            f"density {self.mean_density:.1%}, output error {self.measured_error:.3g})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def known(self, site_name: str) -> tuple[Known, ...]:
        """How the tokens of a site lay when it was calibrated.

        Raises:
            PlanError: the plan has no such site.
        """
        layouts = self._site(site_name).layouts
        if not layouts:  # a plan that was written before layouts were
            return tuple(Known(grid) for grid in self.grids)
        return tuple(
            Known(
                each.grid,
                each.before,
                each.after,
                each.mask,
                tuple(Source(*source) for source in each.sources),
            )
            for each in layouts
        )

    def names_of(self, names: Iterable[str]) -> dict[str, str]:
        """Which of the plan's sites each site of a model is, by name, where that is unique."""
        return names_in(self, names)

    def modules(self, model: nn.Module) -> dict[str, str]:
        """Names in `model` of the modules that the plan's sites are in, by the site's name.

        Raises:
            PlanError: some are not there, or the model has more of them than were calibrated.
        """
        return modules_in(self, model)

    def _site(self, name: str) -> SitePlan:
        if name in self.sites:
            return self.sites[name]
        near = difflib.get_close_matches(name, self.sites, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise PlanError(f"this plan has no site {name!r} (it has {len(self.sites)} sites){hint}")


def _calibration(name: str) -> Any:
    """A module of the calibration room, which stands above this one: found when it is called."""
    return importlib.import_module(f"freqopt.calibration.{name}")
