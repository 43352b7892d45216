"""`freqopt calibrate` of a pipeline on prompts: a folder of diffusers', or what is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freqopt.calibration.samples import samples_by_model
from freqopt.cli.arguments import made_by
from freqopt.cli.theirs import users_code
from freqopt.errors import InputError, OptionError
from freqopt.files import read_bounded
from freqopt.front.components import components_of
from freqopt.front.prompts import calls_of, check_calls, runner_of

INDEX = "model_index.json"
"""The file that makes a folder a pipeline of diffusers."""

MOST_PROMPT_BYTES = 2**24


@dataclass(frozen=True)
class Prompted:
    """A pipeline with prompts. models: what denoises. run: runs it on all of them."""

    models: dict[str, nn.Module]
    run: Callable[[], list[Any]]

    def recorded(self) -> dict[str, Any]:
        """The calls of each model in one run."""
        with users_code("the pipeline failed"):
            return dict(samples_by_model(self.models, self.run))


def prompted(
    source: str,
    prompts: Path,
    options: Sequence[str],
    device: torch.device,
    *,
    seed: int,
    decode: bool,
) -> Prompted:
    """The pipeline of a folder or of MODULE:FACTORY, ready to run the prompts of a file.

    prompts: one in a line; empty lines and those that begin with # are left out. options: of the
    pipeline, as "name=value" with the value as JSON or plain text. seed, decode: see `runner_of`.

    Raises:
        OptionError: no prompts, or an option of another form.
        InputError: no pipeline.
    """
    texts = _lines(prompts)
    pipe = load_pipeline(source, device)
    calls = calls_of(texts, dict(_option(option) for option in options))
    check_calls(pipe, calls)
    return Prompted(components_of(pipe), runner_of(pipe, calls, seed=seed, decode=decode))


def is_folder(source: str) -> bool:
    """Whether a folder of a pipeline is meant."""
    return os.path.isfile(Path(source) / INDEX)


def load_pipeline(source: str, device: torch.device) -> Any:
    """A pipeline from a folder that diffusers wrote, or from MODULE:FACTORY, on a device.

    Raises:
        InputError: none is there, or diffusers is not installed.
    """
    if not is_folder(source):
        if os.path.isdir(source):
            raise InputError(f"{source} has no {INDEX}: it is no folder of a diffusers pipeline")
        pipe = made_by(source)
        if isinstance(pipe, nn.Module) or not callable(pipe):
            raise InputError(
                f"{source} gives a {type(pipe).__name__}; --prompts needs a pipeline, which runs "
                "when it is called"
            )
    else:
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise InputError(
                f"{source} is a diffusers pipeline, and diffusers is not installed: "
                "pip install diffusers"
            ) from error
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with users_code(f"{source} cannot be loaded"):
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
    return pipe.to(device) if hasattr(pipe, "to") else pipe


def _lines(path: Path) -> list[str]:
    try:
        lines = read_bounded(path, MOST_PROMPT_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise OptionError(f"cannot read the prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"cannot read the prompts {path}: it is not UTF-8 text") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise OptionError(f"{path} holds no prompts: one in a line is needed")
    return found


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"--run-option {text!r} is not name=value, as in num_inference_steps=8")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def one_of(models: Mapping[str, nn.Module], what: str) -> nn.Module:
    """The only model of a pipeline.

    Raises:
        OptionError: there are several.
    """
    if len(models) > 1:
        raise OptionError(f"{what} is for one model, and the pipeline has {', '.join(models)}")
    return next(iter(models.values()))
