"""Parts of a model run again from what is held: bit by bit what whole runs give, and fewer runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calibration_models import GRID, TinyVideo, make_sample
from torch import Tensor, nn

from freqopt.calibration.measure.injections import Inject, Injection, one_head
from freqopt.calibration.measure.requests import Dense, Request, SiteThresholds, Split
from freqopt.calibration.runner import Runner, opened
from freqopt.calibration.samples import collect_samples

LAYERS = 4
SITES = [f"blocks.{i}.attn" for i in range(LAYERS)]


class Noisy(TinyVideo):
    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        out = super().forward(video, timestep)
        return {"velocity": out["velocity"] + 0.1 * torch.randn_like(out["velocity"])}


class Overwriting(TinyVideo):
    """The hidden state is one tensor, written into by all blocks."""

    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        x = self.patch(video).flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            x.copy_(block(x))
        return {"velocity": self.head(x)}


class Broken(TinyVideo):
    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        x = self.patch(video).flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return {"velocity": self.head(x)}


class Skipping(nn.Module):
    """Down and up again, with a skip, under autocast in the middle, outputs in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (TinyVideo(layers=1).blocks[0] for _ in range(3))
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch(video).flatten(2).transpose(1, 2)
        skip = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.middle(F.gelu(skip)).float()
        out = self.last(y + skip)
        return out, skip.mean(1)


def calls_of(model: nn.Module) -> Any:
    sample = make_sample(1)
    names = ("video", "timestep") if isinstance(model, TinyVideo) else ("video",)
    return collect_samples(model, [{name: sample[name] for name in names}] * 2)


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind(layers=LAYERS) if issubclass(kind, TinyVideo) else kind()


def requests_at(site: str) -> list[Request]:
    threshold = torch.tensor([0.7, 1.4])
    one = Inject({site: Injection(threshold, one_head(2, 1))})
    return [Split({site: SiteThresholds(threshold)}), one]


def compare(runner: Runner, sites: list[str]) -> list[float]:
    """Runs from every site that are held to be whole ones; the passes that each took."""
    sample, spent = runner.samples.fit[0], []
    replays = runner.replays(sample, Dense())
    for site, request in itertools.product(sites, range(2)):
        before = runner.passes
        part = replays.run(site, requests_at(site)[request])
        spent.append(runner.passes - before)
        whole = runner.run(sample, requests_at(site)[request])
        assert all(map(torch.equal, part.output, whole.output)) and len(part.output)
        assert part.injected.keys() == whole.injected.keys()
        assert all(map(torch.equal, part.injected.values(), whole.injected.values()))
    return spent


def test_parts_are_bit_equal_to_wholes_and_cheaper() -> None:
    model = built(TinyVideo)
    with opened(model, calls_of(model), None, 0) as runner:
        dense = runner.run(runner.samples.fit[0], Dense())
        assert list(dense.shapes) == SITES
        spent = compare(runner, SITES)
        assert spent[1::2] == [1.0, 0.75, 0.5, 0.25]  # the second from each site
        assert sum(spent[2::2]) == pytest.approx(1.5 + 0.75)  # those behind, and going on to them
        held = runner.hold(runner.samples.fit[0])
        assert held is not None
        cuts = held.staged.cuts
        for first, second in itertools.pairwise(SITES):
            held.advance(cuts[second])
            (alive,) = held.values.values()  # the hidden state alone
            assert alive.shape == (1, GRID[0] * GRID[1] * GRID[2], 32) and cuts[first] < held.at


def test_what_is_before_a_site_is_as_the_base_says() -> None:
    model = built(TinyVideo)
    threshold = torch.tensor([0.7, 1.4])
    base = {site: SiteThresholds(threshold) for site in SITES}
    other = {**base, SITES[2]: SiteThresholds(2 * threshold)}
    with opened(model, calls_of(model), None, 0) as runner:
        sample = runner.samples.fit[0]
        whole = runner.run(sample, Split(other)).output
        replays = runner.replays(sample, Split(base))
        assert torch.equal(replays.run(SITES[2], Split(other)).output[0], whole[0])
        dense_before = runner.replays(sample, Dense()).run(SITES[2], Split(other)).output
        assert not torch.equal(dense_before[0], whole[0])
        # an earlier site again: from the start
        first = {**base, SITES[0]: SiteThresholds(2 * threshold)}
        again = replays.run(SITES[0], Split(first)).output
        assert torch.equal(again[0], runner.run(sample, Split(first)).output[0])


def test_skips_and_contexts_are_cut_around() -> None:
    model = built(Skipping)
    with opened(model, calls_of(model), None, 0) as runner:
        sites = list(runner.run(runner.samples.fit[0], Dense()).shapes)
        assert len(sites) == 3
        compare(runner, sites)
        held = runner.hold(runner.samples.fit[0])
        assert held is not None and list(held.staged.cuts) == sites
        assert len(held.staged.places) == 2
        for cut in held.staged.cuts.values():
            names = [getattr(node.target, "__name__", "") for node in held.staged.nodes[:cut]]
            assert names.count("_enter_autocast") == names.count("_exit_autocast")


@pytest.mark.parametrize("kind", [Noisy, Overwriting, Broken])
def test_what_cannot_be_run_in_part_is_run_whole(kind: type[nn.Module]) -> None:
    model = built(kind)
    with opened(model, calls_of(model), None, 0) as runner:
        sites = list(runner.run(runner.samples.fit[0], Dense()).shapes)
        assert len(sites) == LAYERS
        compare(runner, sites)
        assert runner.hold(runner.samples.fit[0]) is None


def test_nothing_has_to_run_before() -> None:
    """As where a checkpoint has all that came before."""
    model = built(TinyVideo)
    with opened(model, calls_of(model), None, 0) as runner:
        sample = runner.samples.fit[0]
        held = runner.hold(sample)
        assert held is not None and list(held.staged.cuts) == SITES
        before = runner.passes
        request = requests_at(SITES[-1])[0]
        part = runner.replays(sample, Dense()).run(SITES[-1], request)
        assert runner.passes - before == 1.0  # to the last site, and on from there
        assert torch.equal(part.output[0], runner.run(sample, request).output[0])
