"""Injections: dense attention with the split's error at some heads, amplified, with a sign each.

One head alone tells what its error does to the model's output. Many at once, with random signs,
tell that of all of them from the products of a few outputs; see `search.signed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import head_chunks, head_energy, head_error
from freqopt.calibration.measure.requests import Request, Visit
from freqopt.calibration.team import Heads
from freqopt.config import DEFAULT_PROBES

INJECTED, MOST_AMPLIFIED = 0.2, 8.0
"""Relative error of a site's output that injected errors are amplified to, and how much at most.
One head's own error would drown in the rounding of a bfloat16 model."""


class Injection(NamedTuple):
    """What is put into a site. threshold, signs: (H,); 0: the head stays dense."""

    threshold: Tensor
    signs: Tensor


@dataclass(frozen=True)
class Inject(Request):
    """Dense attention with errors at some sites, other sites dense.

    All heads of a site with a sign put the same error into its output, where amplifying allows it,
    and together `level` times its norm.
    """

    sites: Mapping[str, Injection]
    level: float = INJECTED
    probes: int = DEFAULT_PROBES
    lenient = True

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        call, result, heads = visit.call, visit.result, visit.heads
        dense = call.dense()
        if visit.site not in self.sites:
            return dense
        threshold, signs_of_all = self.sites[visit.site]

        def split() -> Tensor:
            return call.split(heads.own(threshold), self.probes)[0]

        out = split() if heads.share is None else _split_by_all(heads, split)
        error, _ = head_error(out, dense)
        signs = heads.own(signs_of_all).to(error.device)
        relative = error / heads.sum(head_energy(dense).sum()).clamp(min=1e-30)
        wanted = self.level / float(signs_of_all.abs().sum()) ** 0.5
        factor = (wanted / relative.sqrt().clamp(min=1e-30)).clamp(max=MOST_AMPLIFIED)
        if signs_of_all.abs().sum() == 1:
            factor = factor.clamp(min=1.0)  # of one head alone as much as there is
        for part in head_chunks(out):
            truth, times = dense[:, part].float(), (factor * signs)[part][None, :, None, None]
            moved = truth + times * (out[:, part].float() - truth)
            out[:, part] = moved.to(out.dtype)
        put_in = relative * (factor * signs).square()
        parts = [put_in] if heads.share is None else heads.team.all(put_in.cpu())
        result.injected[visit.site] = heads.joined(parts).cpu()
        return out


def _split_by_all(heads: Heads, split: Callable[[], Tensor]) -> Tensor:
    """What a split gives here; where it fails on another process, it fails here too."""
    kept: list[Tensor] = []
    heads.team.together(lambda: kept.append(split()))
    return kept[0]


def one_head(heads: int, head: int) -> Tensor:
    """Signs (H,) of one head alone."""
    signs = torch.zeros(heads, dtype=torch.float32, device="cpu")
    signs[head] = 1.0
    return signs
