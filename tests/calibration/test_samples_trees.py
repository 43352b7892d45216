"""Samples files with trees, tensor subclasses and complex numbers; values of odd tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import freqopt
from freqopt.calibration.samples_file import TREE, load_samples, save_samples
from freqopt.calibration.values import parts_of, plain_values
from freqopt.errors import CalibrationError, FileError, InputError


class Int8(Tensor):
    """Quantised weights in the way of torchao's: they know linear, and what moving needs."""

    data8: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> Any:
        return cls(inner["data8"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return func(args[0], args[1].data8 * args[1].scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("detach", "alias", "clone"):
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"Int8: {func}")


class Named(Tensor):
    """A subclass that only adds a name to memory of its own."""


def quantised() -> tuple[Int8, Tensor]:
    data, scale = torch.randint(-9, 9, (6, 4), dtype=torch.int8), torch.rand(6, 1) + 0.5
    return Int8(data, scale), data * scale


def journey(path: Path, *samples: Any) -> list[Any]:
    save_samples(path, samples)
    return load_samples(path)


def same(a: Any, b: Any) -> bool:
    """Equal trees: kinds, dtypes, values."""
    if isinstance(a, Tensor):
        return type(b) is Tensor and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@pytest.mark.smoke
def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    angle = torch.randn(5, 4)
    given = {
        "rotary": (angle.cos(), angle.sin()),
        "videos": [torch.randn(2, 3), torch.randn(3, 3).bfloat16()],
        "extra": {"ids": torch.arange(3), "deep": ({"x": torch.ones(1)}, None, [True, 2.5])},
        "shapes": [[(1, 14, 12)], [(1, 7, 9)]],
        "empty": (),
        "scale": 0.5,
        "sizes": [1, 2],
    }
    (args, kwargs), second = journey(tmp_path / "s", given, ((angle, (angle,)), {}))
    assert args == () and list(kwargs) != [] and same(given, {k: kwargs[k] for k in given})
    assert same((angle, (angle,)), second[0])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_complex_tables(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(7, 3, 2).to(torch.float32)
    given = torch.view_as_complex(table).to(dtype)
    ((_, kwargs),) = journey(tmp_path / "s", {"freqs": given, "pair": [given.conj()]})
    assert kwargs["freqs"].dtype == dtype
    assert torch.equal(torch.view_as_real(kwargs["freqs"]), torch.view_as_real(given))
    turned = torch.view_as_real(given.conj().resolve_conj())
    assert torch.equal(torch.view_as_real(kwargs["pair"][0]), turned)


def test_subclasses_are_kept_as_what_they_stand_for(tmp_path: Path) -> None:
    weight, values = quantised()
    ids = torch.arange(4.0).as_subclass(Named)
    ((_, kwargs),) = journey(tmp_path / "s", {"w": weight, "ids": ids})
    torch.testing.assert_close(kwargs["w"], values)
    assert same(torch.arange(4.0), kwargs["ids"])
    torch.testing.assert_close(plain_values(weight), values)
    assert [part.dtype for part in parts_of(weight)] == [torch.int8, torch.float32]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "holds a object"),
        ((torch.ones(1), {1: 2, "x": torch.ones(1)}), "key 1"),
        ({"a/b": torch.ones(1)}, "'a/b'"),
        ([{torch.float32}], "holds a set"),
    ],
)
def test_what_cannot_be_kept_is_said(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        save_samples(tmp_path / "s", [{"x": value}])


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"0/x/0": 1}, {}, "belongs to nothing"),
        ({}, {"tree:0/x": '{"kind": "set", "items": []}'}, "no tree"),
        ({}, {"tree:0/x": '{"kind": "tuple", "items": ["0"]}'}, "no tensor or value"),
        ({}, {"tree:0/x": "[1"}, "not JSON"),
        ({"0/x": 1}, {"complex:0/x": '"complex64"'}, "pairs"),
    ],
)
def test_a_strangers_tree_is_checked(
    tmp_path: Path, tensors: dict[str, int], metadata: dict[str, str], said: str
) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.ones(1) for name in tensors}, tmp_path / "s", metadata=metadata)
    with pytest.raises(InputError, match=said):
        load_samples(tmp_path / "s")


def test_a_bottomless_tree_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    key, metadata = "0/x", {}
    for _ in range(200):
        metadata[TREE + key] = json.dumps({"kind": "list", "items": ["0"]})
        key += "/0"
    save_file({key: torch.ones(1)}, tmp_path / "s", metadata=metadata)
    with pytest.raises(InputError, match="levels deep"):
        load_samples(tmp_path / "s")


def test_the_old_place_still_serves_scripts(tmp_path: Path) -> None:
    from freqopt.samples_file import load_samples as old

    freqopt.save_samples(tmp_path / "s", [{"x": torch.ones(2)}])
    assert repr(old(tmp_path / "s")) == "1 samples, the first: x float32 2"


class Rotated(nn.Linear):
    """A layer that is given a table as well."""

    def forward(self, input: Tensor, freqs: Tensor) -> Tensor:
        return super().forward(input)


def test_a_checkpoint_knows_quantised_weights() -> None:
    from freqopt.calibration.checkpoint import identity_of
    from freqopt.calibration.samples import collect_samples

    def identity(weight: Int8) -> str:
        model = Rotated(4, 6)
        model.weight = torch.nn.Parameter(weight, requires_grad=False)
        torch.nn.init.zeros_(model.bias)
        table = torch.view_as_complex(torch.ones(3, 2))
        return identity_of(
            model, collect_samples(model, [{"input": torch.ones(4), "freqs": table}])
        )

    weight, _ = quantised()
    other = Int8(weight.data8.clone(), weight.scale * 2)
    assert identity(weight) == identity(Int8(weight.data8.clone(), weight.scale.clone()))
    assert identity(weight) != identity(other)


@pytest.mark.parametrize("given", [[], [3], [{}, 3], "calls", None, [((1,),)]])
def test_what_are_no_samples_is_not_saved(given: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="sample"):
        freqopt.save_samples(tmp_path / "calls.safetensors", given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [3, None, type("Pipe", (), {"transformer": nn.Linear(2, 2)})()])
def test_only_a_module_is_recorded(model: Any) -> None:
    with pytest.raises(InputError, match="recording takes"), freqopt.recording(model):
        pass


def test_items_of_one_name_do_not_take_for_ever(tmp_path: Path) -> None:
    """Each level of them would be read twice as often as the one above it."""
    path, key, forms = tmp_path / "samples", "0/x", {}
    for _ in range(30):
        forms[TREE + key] = json.dumps({"kind": "list", "items": ["a", "a"]})
        key += "/a"
    save_file({key: torch.ones(1)}, path, metadata=forms)
    with pytest.raises(InputError, match="holds an item twice"):
        load_samples(path)


def test_tensors_without_values_are_no_samples(tmp_path: Path) -> None:
    calls = [{"x": torch.ones(2, device="meta")}] * 2
    with pytest.raises(InputError, match="on meta"):
        save_samples(tmp_path / "samples", calls)
    with pytest.raises(CalibrationError, match="'x' is on meta"):
        freqopt.calibrate(Takes(), calls)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(FileError, match="No space left"):
        save_samples(tmp_path / "samples", [{"x": torch.ones(2)}])
    assert not list(tmp_path.iterdir())


class Takes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x
