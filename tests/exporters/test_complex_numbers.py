"""Complex numbers in export: pairs of real numbers that compute the same, or a named cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqopt.errors import FreqoptError
from freqopt.exporters.complex_numbers import make_real
from freqopt.exporters.program import make_program


class Model(nn.Module):
    """A function of x (2, 5, 6) and a complex table (5, 3), as a module."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        angle = torch.randn(5, 3)
        self.register_buffer("table", torch.polar(torch.rand(5, 3) + 0.5, angle))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.table)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def back(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


def in_block(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        return back(as_complex(x) * t.unsqueeze(0))


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rotary": lambda x, t: back(as_complex(x) * t),
    "no_grad and autocast": in_block,
    "real factor": lambda x, t: back(as_complex(x) * x[..., :3] * 0.5),
    "complex number": lambda x, t: back((0.5 - 2j) * as_complex(x)),
    "conjugate": lambda x, t: back(as_complex(x) * t.conj()),
    "quotient": lambda x, t: back(as_complex(x) / t / 3.0),
    "sum of real and complex": lambda x, t: back(t + x[..., :3]),
    "difference": lambda x, t: back(as_complex(x) - t),
    "negative": lambda x, t: back(-as_complex(x)),
    "polar": lambda x, t: back(torch.polar(x[..., :3].abs(), x[..., 3:])),
    "parts": lambda x, t: (t * as_complex(x)).real + t.imag,
    "joined": lambda x, t: back(torch.complex(x[..., :3], x[..., 3:]) * t),
    "length and angle": lambda x, t: t.abs() * as_complex(x).angle(),
    "exponential": lambda x, t: back(torch.exp(1j * x[..., :3])),
    "shapes": lambda x, t: back(
        (as_complex(x).transpose(-1, -2).unsqueeze(-3) * t.permute(-1, 0))
        .squeeze(-3)
        .reshape(2, -1)
        .view(2, 3, 5)
        .expand(2, 3, 5)
        .flatten(-2, -1)
        .unflatten(-1, (3, 5))
    ),
    "pieces": lambda x, t: back(
        torch.cat([*t.split([1, 2], -1), t.chunk(3, dim=1)[-1], t[:, :1]], dim=-1)[1:4]
    ),
    "gathered": lambda x, t: back(
        torch.stack([t[torch.tensor([2, 0, 1])], t.index_select(-2, torch.tensor([0, 4, 3]))], -1)
    ),
    "precision": lambda x, t: back((as_complex(x.double()) * t.to(torch.complex128)).to(t.dtype)),
    "real of none": lambda x, t: back(x[..., :3].to(torch.complex64) * t),
    "summed": lambda x, t: back(as_complex(x).sum(-2) + t.mean(0)),
    "padded": lambda x, t: back(nn.functional.pad(t, (0, 1, 2, 0))),
    "sequences": lambda x, t: back(nn.utils.rnn.pad_sequence([t, t[:3]], batch_first=True)),
    "chosen": lambda x, t: back(torch.where(x[..., :3] > 0, as_complex(x), t)),
}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_compute_the_same(form: str) -> None:
    model, x = Model(FORMS[form]).eval(), torch.randn(2, 5, 6)
    expected = model(x)
    program = make_program(model, (x,)).exported
    values = [n.meta.get("val") for n in program.graph.nodes]
    assert not any(isinstance(v, Tensor) and v.is_complex() for v in values)
    got = program.module()(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_free_batch_stays_free() -> None:
    model = Model(FORMS["rotary"]).eval()
    shapes = ({0: torch.export.Dim.AUTO},)
    program = make_program(model, (torch.randn(2, 5, 6),), dynamic_shapes=shapes).exported
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (
            lambda x, t: back(torch.linalg.inv(t[:3])),
            "the cause: linalg_inv has no form in real numbers",
        ),
        (lambda x, t: back(t @ t.mT), "the cause: (matmul|mT) has no form in real numbers"),
        (lambda x, t: t * as_complex(x), "output of the model is complex"),
    ],
)
def test_the_cause_is_named(compute: Any, said: str) -> None:
    with pytest.raises(FreqoptError, match=said) as e:
        make_program(Model(compute).eval(), (torch.randn(2, 5, 6),))
    assert "test_complex_numbers.py" in str(e.value) or "output" in said


def test_a_complex_input_is_named() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
            return back(as_complex(x) * freqs)

    with pytest.raises(FreqoptError, match="input freqs is complex"):
        make_program(Takes(), (torch.randn(2, 5, 6), torch.polar(torch.ones(3), torch.ones(3))))


def test_graphs_without_complex_numbers_are_left_alone() -> None:
    graph = torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    before = str(graph.graph)
    assert not make_real(graph) and str(graph.graph) == before
