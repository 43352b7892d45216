"""Sample inputs of a model in one safetensors file, for the command line.

A tensor named ``0/video`` is the keyword argument `video` of the first call, ``1/0`` the first
positional argument of the second. Arguments that are not tensors stand in the file's metadata under
the same kind of name, as JSON. Safe to load from a stranger: nothing is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.samples import Call
from freqopt.errors import InputError

FORM = (
    "name every tensor '<call>/<argument>', such as '0/video', '0/timestep', '1/video'; "
    "a number as argument is a position"
)


def save_samples(path: str | os.PathLike[str], samples: Iterable[Mapping[str, Any] | Call]) -> None:
    """Write calls as `load_samples` reads them.

    Args:
        path: the file, by custom with the suffix .safetensors.
        samples: keyword arguments as dicts, or (args, kwargs) pairs, as for `freqopt.calibrate`.

    Raises:
        InputError: an argument that is neither a tensor nor expressible as JSON.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for index, sample in enumerate(samples):
        args, kwargs = ((), sample) if isinstance(sample, Mapping) else sample
        named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        for name, value in named.items():
            key = f"{index}/{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().contiguous().clone()
                continue
            try:
                metadata[key] = json.dumps(value)
            except TypeError as error:
                raise InputError(
                    f"argument {name!r} of sample {index} is a {type(value).__name__}; tensors and "
                    "what JSON can express are supported"
                ) from error
    save_file(tensors, os.fspath(path), metadata=metadata)


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

    found: dict[int, dict[str, Any]] = {}
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            for key in file.keys():
                index, name = _parts(key, path)
                found.setdefault(index, {})[name] = file.get_tensor(key)
            for key, text in (file.metadata() or {}).items():
                if key == "format":  # written by other tools
                    continue
                index, name = _parts(key, path)
                found.setdefault(index, {})[name] = _value(key, text, path)
    except OSError as error:
        raise InputError(f"cannot read the samples {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from error
    if not found:
        raise InputError(f"{path} holds no samples; {FORM}")
    if sorted(found) != list(range(len(found))):
        raise InputError(f"{path} has calls {sorted(found)}; number them from 0 without gaps")
    return [_call(found[index], index, path) for index in range(len(found))]


def _parts(key: str, path: str | os.PathLike[str]) -> tuple[int, str]:
    index, slash, name = key.partition("/")
    if not (index.isdecimal() and slash and (name.isidentifier() or name.isdecimal())):
        raise InputError(f"{path} has an entry named {key!r}; {FORM}")
    return int(index), name


def _value(key: str, text: str, path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: the metadata of {key!r} is not JSON ({error})") from error


def _call(named: dict[str, Any], index: int, path: str | os.PathLike[str]) -> Call:
    positions = sorted(int(name) for name in named if name.isdecimal())
    if positions != list(range(len(positions))):
        raise InputError(f"{path}: call {index} has positional arguments {positions}, with a gap")
    args = tuple(named[str(i)] for i in positions)
    return args, {name: value for name, value in named.items() if not name.isdecimal()}
