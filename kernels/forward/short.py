"""The forward pass of heads that go together, all their tiles at once."""

from __future__ import annotations

import torch
from torch import Tensor

from freqopt.kernels.forward.attention import attend, store_text
from freqopt.kernels.forward.call import Call, Findings, Target
from freqopt.kernels.forward.probe import fit_probes, probe_space, unfitted
from freqopt.kernels.forward.routing import limits_of, make_route, probe_rows, route_probes
from freqopt.kernels.forward.summaries import summarise
from freqopt.kernels.layout import Settings
from freqopt.kernels.overlap import forked, pays


def split_heads(call: Call, threshold: Tensor, settings: Settings, target: Target) -> Findings:
    """Attend into `target`; threshold: (H,), used where there is no density."""
    density, device = settings.density, call.query.device
    probes = min(settings.probes, call.queries)
    summaries = summarise(call)
    blocks = summaries.low_key.shape[2]
    if not probes:
        route = make_route(call, summaries, threshold, density)
        fitted = unfitted(call, summaries)
        error = torch.full(call.per_head, torch.nan, device=device, dtype=torch.float32)
    else:
        space = probe_space(call, blocks, probes)
        fitted, error = space.fitted, space.error
        # A density's threshold is known when everything is scored: nothing is left to overlap.
        if density == 0.0 and pays(call.pairs, call.tokens):
            limits = limits_of(call, threshold)
            rows = probe_rows(call, blocks, probes)
            with forked(device) as beside:
                with beside:
                    own = route_probes(call, summaries, limits, rows)
                    fit_probes(call, summaries, own, space, by_probe=True)
                route = make_route(call, summaries, threshold, limits=limits)
        else:
            route = make_route(call, summaries, threshold, density)
            fit_probes(call, summaries, route, space)
    attend(call, summaries, route, fitted, target)
    store_text(call, target)
    return Findings(reached_density(route.counts, blocks), error, route.route, *fitted)


def reached_density(counts: Tensor, blocks: int) -> Tensor:
    """Share (B, H) of pairs served exactly, of list lengths (B, H, tiles)."""
    return counts.float().mean(2) / blocks
