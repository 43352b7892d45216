"""Sums of probe errors over calls of several sizes, and when they are looked at."""

from __future__ import annotations

import torch

from freqopt.telling.watching import ProbeErrors, is_due


def test_errors_of_several_batches_are_joined() -> None:
    errors = ProbeErrors([2, 3])
    calls = [torch.rand(5), torch.rand(2, 5), torch.rand(5)]
    by_site: list[list[torch.Tensor]] = [[], []]
    for call in calls:
        table = call.view(-1, 5)
        by_site[0].append(table[:, :2])
        by_site[1].append(table[:, 2:])
        errors.add(torch.cat([table[:, :2].flatten(), table[:, 2:].flatten()]))
    for i, parts in enumerate(by_site):
        expected = torch.stack([part.square().mean() for part in parts]).mean().sqrt()
        torch.testing.assert_close(errors.means()[i], expected)
        torch.testing.assert_close(errors.worst()[i], torch.stack([p.max() for p in parts]).max())
    errors.clear()
    assert errors.calls == 0 and errors.glance() is None


def test_sums_of_inference_mode_go_on_outside() -> None:
    errors = ProbeErrors([2])
    with torch.inference_mode():
        errors.add(torch.ones(2))
    errors.add(torch.ones(2) * 2)
    torch.testing.assert_close(errors.means(), torch.tensor([2.5]).sqrt())


def test_looks_get_rarer() -> None:
    assert [n for n in range(1, 40) if is_due(n)] == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33]
