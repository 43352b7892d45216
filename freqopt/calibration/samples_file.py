"""Sample inputs of a model in one safetensors file, for the command line.

A tensor named ``0/video`` is the keyword argument `video` of the first call, ``1/0`` the first
positional argument of the second; ``0/image_rotary_emb/1`` is an item of a tuple, a list or a dict.
What is not a tensor stands in the metadata under such a name, as JSON, and so does the form of a
tree, as JSON too. Safe to load from a stranger: nothing is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.samples import Call, RecordedSamples, listed
from freqopt.errors import InputError
from freqopt.files import check_regular, replacing

FORM = (
    "name every tensor '<call>/<argument>', such as '0/video', '0/timestep', '1/video'; "
    "a number as argument is a position, and '0/pair/1' an item of a tuple, list or dict"
)

TREE, COMPLEX = "tree:", "complex:"
"""Prefixes of entries of the metadata: the form of a tree, and the dtype of a complex tensor,
which is kept as pairs of real numbers."""

DEEPEST = 32
"""Levels of a tree, as one from a stranger must not exhaust the stack."""

KINDS: Mapping[str, type[Any]] = {"tuple": tuple, "list": list, "dict": dict}


def save_samples(path: str | os.PathLike[str], samples: Iterable[Mapping[str, Any] | Call]) -> None:
    """Write calls as `load_samples` reads them.

    Args:
        path: the file, by custom with the suffix .safetensors.
        samples: keyword arguments as dicts, or (args, kwargs) pairs, as for `freqopt.calibrate`.
            Tensor subclasses are kept as what they stand for, in ordinary tensors.

    Raises:
        InputError: an argument that is neither a tensor, nor expressible as JSON, nor a tuple,
            list or dict of such.
        CalibrationError: there are no samples, or they are of another form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for index, (args, kwargs) in enumerate(listed(samples)):
        named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        for name, value in named.items():
            for key, leaf in _leaves(f"{index}/{name}", value, f"{name!r} of sample {index}", 0):
                if isinstance(leaf, Tensor):
                    tensors[key] = _plain(leaf, key, metadata)
                else:
                    metadata[key] = json.dumps(leaf)
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error


def _leaves(key: str, value: Any, where: str, depth: int) -> Iterator[tuple[str, Any]]:
    """(key, tensor or JSON value) of an argument, and the forms of the trees above them."""
    if isinstance(value, Tensor) or _is_json(value):
        yield key, value
        return
    if isinstance(value, Mapping):
        kind, items = "dict", dict(value)
    elif isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        items = {str(i): item for i, item in enumerate(value)}
    else:
        raise InputError(
            f"argument {where} holds a {type(value).__name__}; tensors, what JSON can express, and "
            "tuples, lists and dicts of these are supported"
        )
    if depth == DEEPEST:
        raise InputError(f"argument {where} is nested more than {DEEPEST} levels deep")
    for name in items:
        if not isinstance(name, str) or not name or "/" in name:
            raise InputError(f"argument {where} has the key {name!r}; names without / are needed")
    yield TREE + key, {"kind": kind, "items": list(items)}
    for name, item in items.items():
        yield from _leaves(f"{key}/{name}", item, where, depth + 1)


def _is_json(value: Any) -> bool:
    """Whether a value is the same after a journey through JSON; tuples would come back as lists."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(item) for k, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(tensor: Tensor, key: str, metadata: dict[str, str]) -> Tensor:
    """A tensor of its own memory, on the CPU, of an ordinary class and a real dtype."""
    from freqopt.calibration.values import plain_values

    if tensor.is_meta:
        raise InputError(f"argument {key} is a tensor on meta, which has no values")
    plain = plain_values(tensor).cpu()
    if plain.layout != torch.strided:
        kind = str(plain.layout).removeprefix("torch.")
        raise InputError(
            f"argument {key} is a tensor of layout {kind}; files hold dense ones: pass what "
            ".to_dense() gives, if the model takes that"
        )
    if plain.is_complex():
        metadata[COMPLEX + key] = json.dumps(str(plain.dtype).removeprefix("torch."))
        plain = torch.view_as_real(plain.resolve_conj())
    return plain.contiguous().clone()


def load_samples(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> list[Call]:
    """Read calls, in the order of their numbers.

    Args:
        path: a safetensors file in the form described above.
        device: where the tensors are put.

    Returns:
        (args, kwargs) of each call, as `freqopt.calibrate` takes them.

    Raises:
        InputError: no such file, one that is damaged, or names of another form.
    """
    from safetensors import SafetensorError, safe_open

    leaves: dict[str, Any] = {}
    trees: dict[str, Any] = {}
    try:
        check_regular(path)
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            for key in file.keys():
                leaves[key] = _tensor(file.get_tensor(key), metadata.get(COMPLEX + key), key, path)
            for key, text in metadata.items():
                if key.startswith(TREE):
                    trees[key.removeprefix(TREE)] = _value(key, text, path)
                elif key != "format" and not key.startswith(COMPLEX):  # "format": of other tools
                    if key in leaves:
                        raise InputError(f"{path} has {key!r} twice, as a tensor and as a value")
                    leaves[key] = _value(key, text, path)
    except OSError as error:
        raise InputError(f"cannot read the samples {path}: {error.strerror or error}") from error
    except InputError:
        raise
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from error
    found = _calls(leaves, trees, path)
    if not found:
        raise InputError(f"{path} holds no samples; {FORM}")
    if sorted(found) != list(range(len(found))):
        raise InputError(f"{path} has calls {sorted(found)}; number them from 0 without gaps")
    return RecordedSamples(_call(found[index], index, path) for index in range(len(found)))


def _calls(
    leaves: dict[str, Any], trees: dict[str, Any], path: str | os.PathLike[str]
) -> dict[int, dict[str, Any]]:
    """Arguments by call and name, trees put together."""
    found: dict[int, dict[str, Any]] = {}
    used: set[str] = set()
    for key in [*leaves, *trees]:
        index, name, inner = _parts(key, path)
        if not inner:
            value = _grown(key, leaves, trees, used, path, 0)
            found.setdefault(index, {})[name] = value
    lost = [key for key in [*leaves, *trees] if key not in used]
    if lost:
        raise InputError(f"{path} has an entry named {lost[0]!r} that belongs to nothing; {FORM}")
    return found


def _grown(
    key: str,
    leaves: dict[str, Any],
    trees: dict[str, Any],
    used: set[str],
    path: str | os.PathLike[str],
    depth: int,
) -> Any:
    """The value of a key: a leaf, or a tree of those below it."""
    used.add(key)
    if key in leaves:
        return leaves[key]
    form = trees.get(key)
    names = form.get("items") if isinstance(form, dict) else None
    kind = KINDS.get(str(form.get("kind"))) if isinstance(form, dict) else None
    if kind is None or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path}: there is no tensor or value, and no tree, named {key!r}")
    if depth == DEEPEST:
        raise InputError(f"{path}: {key!r} is nested more than {DEEPEST} levels deep")
    if len(set(names)) < len(names):  # what is below them would be read twice at every level
        raise InputError(f"{path}: {key!r} holds an item twice")
    items = {n: _grown(f"{key}/{n}", leaves, trees, used, path, depth + 1) for n in names}
    return items if kind is dict else kind(items.values())


def _tensor(stored: Tensor, dtype: str | None, key: str, path: str | os.PathLike[str]) -> Tensor:
    """A tensor as it was before `_plain`."""
    if dtype is None:
        return stored
    if stored.dim() == 0 or stored.shape[-1] != 2 or not stored.is_floating_point():
        raise InputError(f"{path}: {key!r} is called complex and is not pairs of real numbers")
    found = torch.view_as_complex(stored.contiguous())
    if str(found.dtype).removeprefix("torch.") != _value(key, dtype, path):
        raise InputError(f"{path}: {key!r} is called {dtype} and is {found.dtype}")
    return found


def _parts(key: str, path: str | os.PathLike[str]) -> tuple[int, str, str]:
    """Call, argument, and the way inside the argument."""
    index, slash, rest = key.partition("/")
    name, _, inner = rest.partition("/")
    if not (_is_number(index) and slash and (name.isidentifier() or _is_number(name))):
        raise InputError(f"{path} has an entry named {key!r}; {FORM}")
    return int(index), name, inner


def _is_number(text: str) -> bool:
    """Whether a text is a number as `str` writes it: 00 would be another name of 0."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and str(int(text)) == text


def _value(key: str, text: str, path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the metadata of {key!r} is not JSON ({error})") from error


def _call(named: dict[str, Any], index: int, path: str | os.PathLike[str]) -> Call:
    positions = sorted(int(name) for name in named if name.isdecimal())
    if positions != list(range(len(positions))):
        raise InputError(f"{path}: call {index} has positional arguments {positions}, with a gap")
    args = tuple(named[str(i)] for i in positions)
    return args, {name: value for name, value in named.items() if not name.isdecimal()}
