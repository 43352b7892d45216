"""Runs a pipeline on prompts, so that the calls of its models can be recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from freqopt.errors import OptionError

Prompts = str | Sequence[str | Mapping[str, Any]]

LATENT = "latent"
"""What `output_type` of a pipeline leaves out decoding, which no calibration needs."""


def calls_of(prompts: Prompts, run_options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keyword arguments of one run of the pipeline for each prompt.

    prompts: texts, or dicts of the pipeline's own arguments (`prompt_embeds` and the like), which
    go before `run_options`.

    Raises:
        OptionError: something else, or none.
    """
    if not isinstance(prompts, Iterable):
        raise OptionError(f"prompts is a {type(prompts).__name__}; a list of texts is supported")
    given = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    if not given:
        raise OptionError("prompts is empty; pass a few texts like those you will ask for")
    calls = []
    for each in given:
        if not isinstance(each, (str, Mapping)):
            raise OptionError(
                f"a prompt is a {type(each).__name__}; a text, or a dict of the pipeline's "
                "arguments is supported"
            )
        own = {"prompt": each} if isinstance(each, str) else dict(each)
        calls.append({**run_options, **own})
    return calls


def runner_of(
    pipe: Callable[..., Any], calls: Sequence[Mapping[str, Any]], *, seed: int, decode: bool
) -> Callable[[], list[Any]]:
    """What runs a pipeline once for each of some calls, the same every time.

    decode: whether what it generates is wanted; else decoding is left out where that can be asked.
    """
    extra: dict[str, Any] = {}
    parameters = _parameters(pipe)
    if not decode and "output_type" in parameters:
        extra["output_type"] = LATENT

    def run() -> list[Any]:
        torch.manual_seed(seed)
        return [_frames(pipe(**{**extra, **call})) for call in calls]

    return run


def check_calls(pipe: Callable[..., Any], calls: Sequence[Mapping[str, Any]]) -> None:
    """Refuse arguments that a pipeline does not take, before it runs.

    Raises:
        OptionError: which.
    """
    parameters = _parameters(pipe)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for call in calls:
        unknown = [name for name in call if name not in parameters]
        if unknown:
            raise OptionError(
                f"{type(pipe).__name__} takes no argument {unknown[0]!r} (it takes "
                f"{', '.join(name for name in parameters if name != 'self')})"
            )
        wanted = [name for name, p in parameters.items() if _needed(p) and name not in call]
        if wanted:
            raise OptionError(
                f"{type(pipe).__name__} needs an argument {wanted[0]!r}, which neither the prompts "
                "nor run_options have"
            )


def _needed(parameter: inspect.Parameter) -> bool:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameter.default is inspect.Parameter.empty and parameter.kind in named


def _parameters(pipe: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(pipe).parameters
    except (TypeError, ValueError):
        kind = inspect.Parameter.VAR_KEYWORD
        return {"anything": inspect.Parameter("anything", kind)}


def _frames(output: Any) -> Any:
    """What a pipeline generated: the first field of its output."""
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    return output
