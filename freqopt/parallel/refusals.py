"""Attention that cannot reach the keys of all ranks, as errors that say so, compiled or not."""

from __future__ import annotations

from freqopt.capture.eager import ATTENTION
from freqopt.errors import SiteError
from freqopt.passes.site import Site


def reaches_all_keys(site: Site) -> bool:
    """Whether its keys are those of its own sequence; cross-attention has all of them anyway."""
    return site.kind in ("self", "joint")


def untold(site: Site) -> SiteError:
    """Of a site whose keys may be the sequence's, or not."""
    return SiteError(f"attention at {site.name} may need keys of other ranks, or not: {site.why}")


def computed_otherwise(name: str) -> SiteError:
    """Of a site whose attention another function computes, which nothing can stand in for."""
    return SiteError(
        f"attention at {name} is not computed by {ATTENTION}, so it sees the keys of this rank "
        "only; use PyTorch's (in diffusers: set_attention_backend('native'))"
    )


def of_another_form(name: str) -> SiteError:
    """Of a site that is causal or has dropout."""
    return SiteError(f"attention at {name} is causal or has dropout, which over all keys is not")
