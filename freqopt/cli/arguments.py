"""What words on the command line mean: devices, grids, models by their factory's name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from freqopt.capture.modules import modules_in
from freqopt.cli.theirs import users_code
from freqopt.errors import InputError, OptionError


def choose_device(name: str | None) -> torch.device:
    """The device of that name, by default the first GPU where there is one.

    Raises:
        OptionError: no such kind of device, or none here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(
            f"device {name!r} is unknown; supported: cpu, cuda, cuda:0, ..."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {name!r}: there is no CUDA here; `freqopt doctor` says why")
    return device


def parse_grid(text: str) -> tuple[int, int, int]:
    """(t, h, w) from "t,h,w" or "txhxw".

    Raises:
        OptionError: anything else.
    """
    parts = text.replace("x", ",").split(",")
    short = all(part.strip().isdecimal() and len(part.strip()) < 10 for part in parts)
    if len(parts) != 3 or not short or not all(map(int, parts)):
        raise OptionError(f"grid {text!r}: three positive numbers t,h,w are needed, as in 21,30,52")
    t, h, w = (int(part) for part in parts)
    return t, h, w


def load_model(text: str) -> nn.Module:
    """The model that "module:factory" names, in evaluation mode; see `Model`.

    Raises:
        OptionError: a text of another form, or no such module or name.
        InputError: what it names is not, and does not return, a torch.nn.Module.
    """
    found = made_by(text)
    if not isinstance(found, nn.Module):
        raise InputError(f"{text} gives a {type(found).__name__}; a torch.nn.Module is needed")
    return found.eval()


def made_by(text: str) -> Any:
    """What "module:factory" names, called if it is a factory.

    Raises:
        OptionError: a text of another form, or no such module or name.
        InputError: the factory failed.
    """
    name, colon, attribute = text.rpartition(":")
    if not colon or not name or not attribute:
        raise OptionError(f"{text!r} is not MODULE:FACTORY, as in my_models:make or models.py:make")
    module = _import(name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise OptionError(f"{name} has no {part!r}{hint}")
        found = getattr(found, part)
    pipeline = not isinstance(found, type) and modules_in(found)
    if callable(found) and not isinstance(found, nn.Module) and not pipeline:
        with users_code(f"{text} failed"):
            found = found()
    return found


def _import(name: str) -> ModuleType:
    """A module by its dotted name, from here too, or by the path of its file."""
    if name.endswith(".py"):
        path = Path(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not os.path.isfile(path) or spec is None or spec.loader is None:
            raise OptionError(f"there is no file {name}")
        _importable(str(path.absolute().parent))
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # what it defines can then be found by name
        with users_code(f"{name} cannot be imported"):
            spec.loader.exec_module(module)
        return module
    here = os.getcwd()
    _importable(here)
    with users_code(f"{name} cannot be imported"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise OptionError(
                f"there is no module {error.name!r} here ({here}) or installed; a path ending in "
                ".py is supported too"
            ) from error


def _importable(folder: str) -> None:
    """Have modules of a folder found, as Python has those beside a script."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
