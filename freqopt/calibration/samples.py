"""Samples for calibration: collected, checked, given a timestep, split into fitting and held-out.

A sample is one call of the model. Whatever the user hands over (kwargs, args, or a callable that
runs their own pipeline) becomes a list of `Sample`s here; bad values are named before a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freqopt.calibration.values import parts_of
from freqopt.capture.modules import module_of
from freqopt.capture.signatures import forward_signature, misfit_of, named_arguments
from freqopt.errors import CalibrationError, OptionError
from freqopt.grid import Grid
from freqopt.positions import grids_of_positions

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a model."""

Samples = Iterable[Any] | Callable[[], Any]
"""Kwargs dicts or (args, kwargs) pairs, or a callable that runs the user's own pipeline once."""


class RecordedSamples(list[Call]):
    """Calls of a model: a list of (args, kwargs) that prints short."""

    def __repr__(self) -> str:
        if not self:
            return "no samples"
        args, kwargs = self[0]
        named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        shown = ", ".join(f"{name} {_form(value)}" for name, value in named.items())
        return f"{len(self)} samples, the first: {shown}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def _form(value: Any) -> str:
    """What an argument is, in a few words."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {'x'.join(map(str, value.shape)) or 'scalar'}"
    if isinstance(value, (tuple, list, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)[:24]


MAX_RECORDED = 16
"""Calls kept of a recorded pipeline, evenly spaced over it."""

MAX_BUCKETS = 4
"""Timestep buckets with budgets of their own, where the samples suffice."""

_TIMESTEP_NAMES = ("timestep", "timesteps", "sigma", "sigmas", "t", "time")
_TIMESTEP_WORDS = ("timestep", "sigma")
TIMES = 2
"""Most dimensions of a timestep, which may be one of each token: (B, N)."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of the model; timestep is None if no argument looks like one.

    number: its place among those that the user gave.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    timestep: float | None = None
    number: int = 0


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """Samples to fit on and samples held out for verification; notes say what the plan should.

    timestep_name: the argument timesteps were read from. timestep_edges: boundaries of the buckets.
    """

    fit: list[Sample]
    held_out: list[Sample]
    notes: list[str]
    timestep_name: str | None
    timestep_edges: list[float]

    @property
    def grids(self) -> list[Grid]:
        """The grid whose positions the samples hold, if they all hold those of one and the same.

        Samples of several grids name none: a graph could not tell two with as many tokens apart.
        """
        found = [
            set(grids_of_positions(sample.args, sample.kwargs).values())
            for sample in (*self.fit, *self.held_out)
        ]
        return list(found[0]) if found and all(len(g) == 1 and g == found[0] for g in found) else []

    @property
    def timestep_range(self) -> tuple[float, float] | None:
        """Least and largest timestep of all samples, None where one of them has none."""
        times = [sample.timestep for sample in (*self.fit, *self.held_out)]
        known = [time for time in times if time is not None]
        return (min(known), max(known)) if known and len(known) == len(times) else None

    @property
    def buckets(self) -> int:
        """Number of timestep buckets."""
        return len(self.timestep_edges) + 1

    @property
    def bucket_samples(self) -> list[int]:
        """Fitted samples in each timestep bucket, at least one."""
        found = [self.bucket(sample) for sample in self.fit]
        return [found.count(bucket) for bucket in range(self.buckets)]

    def bucket(self, sample: Sample) -> int:
        """Index of the timestep bucket of a sample."""
        return _bucket(sample, self.timestep_edges)

    def bucket_of_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        """Index of the timestep bucket of a call of the model."""
        named = named_arguments(forward_signature(model), args, kwargs)
        _, value = _timestep(named, self.timestep_name) if self.timestep_name else (None, None)
        return self.bucket(Sample(args, kwargs, value))


def collect_samples(
    model: nn.Module,
    samples: Samples,
    *,
    timestep: str | None = None,
    buckets: int = MAX_BUCKETS,
) -> SampleSet:
    """Turn what the user passed into samples.

    Args:
        timestep: name of the model's timestep argument, where it has an unusual one.
        buckets: most timestep buckets to make.

    Raises:
        CalibrationError: no samples, one of another form, or one with NaN or infinite values.
    """
    calls = _record(model, samples) if callable(samples) else listed(samples)
    signature = forward_signature(model)
    name: str | None = None
    found: list[Sample] = []
    for index, (args, kwargs) in enumerate(calls):
        misfit = misfit_of(model, args, kwargs)
        if misfit:
            raise CalibrationError(f"sample {index} does not fit the model: {misfit}")
        named = named_arguments(signature, args, kwargs)
        _check_finite(index, named)
        _check_timestep(index, named, timestep)
        label, value = _timestep(named, timestep)
        if timestep is not None and value is None:
            raise CalibrationError(
                f"sample {index} has no number or tensor named {timestep!r}, which was given as "
                f"the timestep; its arguments are {', '.join(named)}"
            )
        name = name or label
        found.append(Sample(args, kwargs, value, index))
    fit, held_out, notes = _hold_out(found)
    return SampleSet(fit, held_out, notes, name, _bucket_edges(fit, held_out, buckets))


def as_call(sample: Any) -> Call:
    """A sample as (args, kwargs).

    Raises:
        CalibrationError: it is neither a dict nor such a pair.
    """
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if (
        isinstance(sample, Sequence)
        and len(sample) == 2
        and isinstance(sample[0], (tuple, list))
        and isinstance(sample[1], Mapping)
    ):
        return tuple(sample[0]), dict(sample[1])
    raise CalibrationError(
        f"a sample is a {type(sample).__name__}; supported are a dict of keyword arguments, or a "
        "pair (args, kwargs) of a tuple and a dict"
    )


@contextlib.contextmanager
def recording(model: nn.Module, *, most: int = MAX_RECORDED) -> Iterator[list[Call]]:
    """Record the calls of a model while something else runs it.

    ``with recording(pipe.transformer) as samples: pipe(prompt)`` leaves samples for `calibrate`.

    Args:
        model: the very object that is called, compiled or not.
        most: calls to keep, at least 2, evenly spaced over those seen. Never more than twice as
            many are in memory at a time.

    Returns:
        A list of (args, kwargs), tensors copied, that is filled when the block ends.

    Raises:
        OptionError: fewer than two calls to keep.
        InputError: not a module, such as a pipeline; which of its modules is wanted.
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 2:
        raise OptionError(f"most {most!r} must be a number of calls, 2 or more")
    module_of(model, "recording")
    kept: list[Call] = RecordedSamples()
    seen, stride = 0, 1

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen, stride
        if seen % stride == 0:
            kept.append(pytree.tree_map(_keep, (args, kwargs)))
            if len(kept) == 2 * most:
                del kept[1::2]
                stride *= 2
        seen += 1

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()
        if len(kept) > most:
            last = len(kept) - 1
            kept[:] = [kept[round(i * last / (most - 1))] for i in range(most)]


def samples_by_model(
    models: Mapping[str, nn.Module], samples: Samples | Mapping[str, Samples]
) -> dict[str, Samples]:
    """Samples of each of several models; a pipeline is run once, and the calls of all recorded.

    Raises:
        CalibrationError: a model without samples, samples without a model, or one list for all.
    """
    if isinstance(samples, Mapping):
        if set(samples) != set(models):
            raise CalibrationError(
                f"there are samples for {sorted(samples)} and models {sorted(models)}; every model "
                "needs samples of its own name"
            )
        return dict(samples)
    if not callable(samples):
        raise CalibrationError(
            "one list of samples was given for several models; pass a dict of lists by the models' "
            "names, or a callable that runs the pipeline"
        )
    with torch.no_grad(), contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(recording(model)) for name, model in models.items()}
        returned = samples()
    unused = [name for name, recorded in calls.items() if not recorded]
    if unused:
        raise CalibrationError(_not_called(", ".join(unused), returned))
    return dict(calls)


def _record(model: nn.Module, pipeline: Callable[[], Any]) -> list[Call]:
    with torch.no_grad(), recording(model) as calls:
        returned = pipeline()
    if not calls:
        raise CalibrationError(f"there are no samples; {_not_called('the model', returned)}")
    return calls


def _not_called(what: str, returned: object) -> str:
    """Why a callable has called no model."""
    if inspect.isgenerator(returned) or inspect.iscoroutine(returned):
        return (
            f"the callable returned a {type(returned).__name__}, of which nothing has run yet, "
            f"without calling {what}: have it run all of it, as in list(...)"
        )
    return (
        f"the callable finished without calling {what}: it must run the very object that is being "
        "calibrated, over all denoising steps"
    )


def listed(samples: Iterable[Any]) -> list[Call]:
    """Samples as (args, kwargs).

    Raises:
        CalibrationError: there are none, or they are of another form.
    """
    if isinstance(samples, (str, bytes, os.PathLike)):
        raise CalibrationError(
            f"samples is {samples!r}; of a file pass freqopt.load_samples({samples!r})"
        )
    if isinstance(samples, Tensor) or not isinstance(samples, Iterable):
        raise CalibrationError(
            f"samples is a {type(samples).__name__}; pass a list of calls of the model, or a "
            "callable that runs your pipeline"
        )
    calls = [as_call(sample) for sample in samples]
    if not calls:
        raise CalibrationError(
            "there are no samples; pass at least two, such as the inputs of a few denoising steps"
        )
    return calls


def _keep(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_finite(index: int, named: Mapping[str, Any]) -> None:
    for name, argument in named.items():
        for value in pytree.tree_leaves(argument):
            if not isinstance(value, Tensor):
                continue
            if value.dim() > 1 and not len(value):
                raise CalibrationError(
                    f"sample {index}: {name!r} is {tuple(value.shape)}, an empty batch; calibration"
                    " needs inputs of one or more"
                )
            if value.is_meta:
                raise CalibrationError(f"sample {index}: {name!r} is on meta, without values")
            parts = [p for p in parts_of(value) if p.is_floating_point() or p.is_complex()]
            bad = sum(int((~torch.isfinite(part)).sum()) for part in parts)
            if bad:
                raise CalibrationError(
                    f"sample {index}: {name!r} has {bad} NaN or infinite values of "
                    f"{value.numel()}; calibration needs finite inputs, so find where they "
                    "come from or leave this sample out"
                )


def _timestep(named: Mapping[str, Any], given: str | None) -> tuple[str, float] | tuple[None, None]:
    """Name and value of the timestep: the argument given, one of a usual name, one like it."""
    usual = [name for name in _TIMESTEP_NAMES if name in named]
    like = [name for name in named if any(word in name.lower() for word in _TIMESTEP_WORDS)]
    for name in [*usual, *like] if given is None else [given]:
        value = named.get(name)
        if isinstance(value, Tensor) and value.numel() and value.dim() <= TIMES:
            return name, float(value.detach().double().mean())
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return name, float(value)
    return None, None


def _check_timestep(index: int, named: Mapping[str, Any], given: str | None) -> None:
    value = named.get(given or "")
    if isinstance(value, Tensor) and (value.dim() > TIMES or not value.numel()):
        raise CalibrationError(
            f"sample {index}: {given!r} was given as the timestep and is {tuple(value.shape)}: one "
            "number, one for each input (B), or one for each token (B, N) is needed; name another "
            "argument, or none"
        )


def _hold_out(samples: list[Sample]) -> tuple[list[Sample], list[Sample], list[str]]:
    """Of every four samples, in order of the timestep, keep the middle two for verification.

    An odd one at the end is fitted. Errors differ between timesteps by more than between inputs,
    and a verification run costs a fraction of a measuring one, so half of the samples is not too
    many. Neither half then has the later timestep of every two, which counts as errors grow towards
    one end.
    """
    if len(samples) == 1:
        note = (
            "only one sample was given, so the error was verified on the sample it was fitted to; "
            "pass two or more"
        )
        return samples, samples, [note]
    timed = all(sample.timestep is not None for sample in samples)
    order = sorted(samples, key=lambda s: s.timestep or 0.0) if timed else list(samples)
    paired = len(order) - len(order) % 2
    held_out = [index for index in range(paired) if index % 4 in (1, 2)]
    fit = [sample for index, sample in enumerate(order) if index not in held_out]
    return fit, [order[index] for index in held_out], []


def _bucket(sample: Sample, edges: Sequence[float]) -> int:
    return 0 if sample.timestep is None else sum(sample.timestep > edge for edge in edges)


def _bucket_edges(fit: list[Sample], held_out: list[Sample], most: int) -> list[float]:
    """Edges that share the distinct timesteps out evenly among as many buckets as the samples fill.

    At most `most`, and every bucket has samples to fit and samples held out.
    """
    times = {sample.timestep for sample in (*fit, *held_out)}
    steps = sorted(time for time in times if time is not None)
    if None in times:
        return []
    for buckets in range(min(most, len(steps)), 1, -1):
        cuts = [len(steps) * i // buckets for i in range(1, buckets)]
        edges = [0.5 * (steps[cut - 1] + steps[cut]) for cut in cuts]
        if all(len({_bucket(s, edges) for s in part}) == buckets for part in (fit, held_out)):
            return edges
    return []
