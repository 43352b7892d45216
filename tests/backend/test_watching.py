"""Sums of probe errors over calls of several sizes, and when they are looked at."""

from __future__ import annotations

import torch

from freqopt.telling.watching import MOST_KEPT, ProbeErrors, is_due, next_look


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


def test_what_measured_nothing_is_left_out() -> None:
    errors = ProbeErrors([2, 1])
    nothing = float("nan")
    for call in ([0.3, 0.4, 1.0], [nothing, nothing, 2.0], [0.5, nothing, nothing]):
        errors.add(torch.tensor(call))
    squares = torch.tensor([(0.09 + 0.16 + 0.25) / 3, (1.0 + 4.0) / 2])
    torch.testing.assert_close(errors.means(), squares.sqrt())
    torch.testing.assert_close(errors.worst(), torch.tensor([0.5, 2.0]))


def test_errors_are_kept_as_they_came_and_no_more_than_so_many() -> None:
    errors, added_up = ProbeErrors([1]), ProbeErrors([1], most_kept=1)
    memory = torch.zeros(1)
    for number in range(1000):
        errors.add(torch.full((1,), float(number)))
        memory.fill_(float(number))  # written anew at each call, as by CUDA graphs
        added_up.add(memory)
        assert len(errors._kept) <= MOST_KEPT and not added_up._kept
    assert errors.calls == added_up.calls == 1000
    expected = torch.arange(1000.0).square().mean().sqrt()
    for each in (errors, added_up):
        torch.testing.assert_close(each.means(), expected[None])
        assert each.worst() == 999


def test_errors_with_gradients_keep_no_graph() -> None:
    errors, weight = ProbeErrors([2]), torch.ones(2, requires_grad=True)
    errors.add(weight * 2)
    errors.add(weight * 2)
    errors.add(weight * 2)
    assert all(kept.grad_fn is None for kept in errors._kept)
    assert not errors.means().requires_grad


def test_looks_get_rarer() -> None:
    assert [n for n in range(1, 40) if is_due(n)] == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33]
    assert all(is_due(next_look(n)) for n in range(40))
    assert not any(is_due(m) for n in range(40) for m in range(n + 1, next_look(n)))
