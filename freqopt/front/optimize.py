"""`freqopt.optimize`: a pipeline in, its denoisers' attention replaced, and a handle out."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from freqopt.calibration.asked import checked
from freqopt.calibration.calibrate import calibrate
from freqopt.calibration.estimate import runs_of
from freqopt.calibration.samples import Samples, samples_by_model
from freqopt.calibration.search.sensitivity import MAX_PROBED_HEADS, MAX_PROBED_SITES
from freqopt.errors import OptionError
from freqopt.front.components import ALONE, components_of
from freqopt.front.handle import Component, Handle, check_unattached, make_free
from freqopt.front.plans import Given, plans_for
from freqopt.front.prompts import Prompts, calls_of, check_calls, runner_of
from freqopt.front.routes import way_of
from freqopt.front.state import ROUTES, Choice, choose_route, state_of
from freqopt.options import parse_options
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans
from freqopt.progress import in_words
from freqopt.telling.said import tell


def optimize(
    pipe_or_model: Any,
    plan: Given | None = None,
    *,
    prompts: Prompts | None = None,
    samples: Samples | Mapping[str, Samples] | None = None,
    target_error: float | None = None,
    target_psnr: float | None = None,
    target_density: float | None = None,
    route: Literal["auto", "compile", "regional", "eager"] = "auto",
    components: Sequence[str] | None = None,
    run_options: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Handle:
    """Replace the attention of a pipeline, or a model, by frequency-split attention.

    With a plan this takes no time. Without one it is calibrated first: the pipeline runs the
    prompts once, all components are recorded in that run, and each is measured. What will be done,
    and how long it takes, is said beforehand.

    Args:
        pipe_or_model: a pipeline of diffusers, whose `transformer`, `transformer_2` or `unet` are
            taken; anything else that holds modules (see `components`); modules by name; or one
            module.
        plan: a plan, plans by component, a file of these, a folder that `save_pretrained` wrote, or
            a repository of the Hugging Face Hub. None: calibrate.
        prompts: what to calibrate on: texts, or dicts of arguments of the pipeline.
        samples: or else samples as `freqopt.calibrate` takes them: a callable that runs the
            pipeline, calls of the model, or these by component.
        target_error, target_psnr, target_density: what to calibrate for, one of them, as
            `freqopt.calibrate` says; by default an output error of 0.03.
        route: how attention is replaced. "compile": the whole model is compiled; "regional": its
            blocks are; "eager": no compiler, calls are answered as they come; "auto": by what is on
            the model (hooks, caches, adapters, several GPUs), see `print(handle)` for the reason.
        components: names of the modules that denoise, where they are not the usual ones.
        run_options: arguments of the pipeline for all prompts, such as num_inference_steps.
        calibration: more options of `freqopt.calibrate`, such as passes or checkpoint.
        inner, mode: the backend that compiles, and its mode, for routes that compile.
        strict: raise where planned attention cannot be split.
        seed: seeds PyTorch's generators before the pipeline runs, and calibration.

    Returns:
        The handle: print it, save its plans, disable it.

    Raises:
        OptionError: arguments that do not go together, before anything runs.
        InputError: nothing that denoises was found.
        PlanError: a plan that is another model's or component's.
        CalibrationError: see `freqopt.calibrate`.

    After an error all models are as they were before.
    """
    found = components_of(pipe_or_model, components)
    _check_route(route, inner, mode, strict)
    make_free(found)
    if len({id(model) for model in found.values()}) < len(found):
        raise OptionError(f"components {list(found)} are one module; name it once")
    targets = {
        "target_error": target_error,
        "target_psnr": target_psnr,
        "target_density": target_density,
    }
    for name, given in (("calibration", calibration), ("run_options", run_options)):
        if not isinstance(given, (Mapping, type(None))):
            raise OptionError(f"{name} is a {type(given).__name__}; a dict is supported")
    options = dict(calibration or {})
    if plan is not None:
        _check_plan_alone(prompts, samples, targets, options, run_options)
        plans = plans_for(found, plan)
    else:
        if route != "compile":
            check_unattached(found)
        job = _job(pipe_or_model, found, prompts, samples, targets, options, run_options, seed)
        plans = _calibrated(found, job)
    parts = []
    for name, model in found.items():
        choice = _choice(route, model, plans[name])
        backend = {"inner": inner, "mode": mode}
        way = way_of(choice.route, model, plans[name], backend, strict=strict)
        parts.append(Component(name, model, plans[name], choice, way, strict))
    handle = Handle(parts, pipe_or_model)
    handle.enable()
    for part in parts:
        tell(
            f"{part.name} ({type(part.model).__name__}): route {part.choice.route}, as "
            f"{part.choice.why}; {len(part.planned)} of {len(part.plan.sites)} sites to be split"
        )
    return handle


@dataclass(frozen=True)
class _Job:
    """A calibration that was checked. run: runs the pipeline, where there is one."""

    samples: Samples | Mapping[str, Samples]
    options: dict[str, Any]
    times: int
    record: bool


def _job(
    pipe: Any,
    found: Mapping[str, nn.Module],
    prompts: Prompts | None,
    samples: Samples | Mapping[str, Samples] | None,
    targets: Mapping[str, float | None],
    options: Mapping[str, Any],
    run_options: Mapping[str, Any] | None,
    seed: int,
) -> _Job:
    """Check all that a calibration is given.

    Raises:
        OptionError: what does not go together.
    """
    if (prompts is None) == (samples is None):
        raise OptionError(
            "pass a plan, or else prompts=[...] or samples=... to calibrate on"
            if prompts is None
            else "prompts and samples were both given; pass one of them"
        )
    asked = {name: value for name, value in targets.items() if value is not None}
    known = inspect.signature(calibrate).parameters
    taken = {"model", "samples", *targets}
    wrong = [name for name in options if name not in known or name in taken]
    if wrong:
        raise OptionError(
            f"calibration has {wrong[0]!r}; it takes the options of freqopt.calibrate, without "
            "model, samples and targets"
        )
    given = checked({"seed": seed, **options, **asked})
    if "target_psnr" in asked and len(found) > 1:
        raise OptionError("target_psnr is for one component; pass components=[one] or target_error")
    if prompts is None:
        if run_options:
            raise OptionError("run_options are for prompts, and samples were given")
        assert samples is not None
        if isinstance(samples, Mapping) and set(samples) != set(found):
            raise OptionError(
                f"samples are for {', '.join(map(str, samples))} and the components are "
                f"{', '.join(found)}: pass samples by these names"
            )
        return _Job(samples, given, 0, record="target_psnr" not in asked and callable(samples))
    if isinstance(pipe, (nn.Module, Mapping)) or not callable(pipe):
        raise OptionError(
            f"prompts were given with a {type(pipe).__name__}, which is no pipeline: pass the "
            "pipeline, or samples=lambda: pipe(...)"
        )
    calls = calls_of(prompts, run_options or {})
    check_calls(pipe, calls)
    psnr = "target_psnr" in asked
    return _Job(runner_of(pipe, calls, seed=seed, decode=psnr), given, len(calls), record=not psnr)


def _calibrated(found: Mapping[str, nn.Module], job: _Job) -> dict[str, Plan]:
    """A plan of each component, made now."""
    names = ", ".join(f"{name} ({type(model).__name__})" for name, model in found.items())
    runs = f"runs the pipeline on {job.times} prompt(s)" if job.times else "takes the samples"
    tell(
        f"calibrating {names}: {runs}, then measures and verifies on the calls of each; the time "
        "left is shown while it measures"
    )
    samples: Any = job.samples
    if job.record:
        with _counted(found) as counts:
            start = time.monotonic()
            samples = samples_by_model(found, samples)
            took = time.monotonic() - start
        kept = {name: len(list(calls)) for name, calls in samples.items()}
        listed = ", ".join(f"{n} of {counts[name]} calls of {name}" for name, n in kept.items())
        whole = _estimate(found, kept, took / max(sum(counts.values()), 1), job.options)
        tell(f"recorded {listed} in {in_words(took)}; measuring takes about {in_words(whole)}")
    if len(found) == 1:
        name, model = next(iter(found.items()))
        own = samples[name] if isinstance(samples, Mapping) else samples
        plan = calibrate(model, own, **job.options)
        return {name: plan if name == ALONE else plan.model_copy(update={"component": name})}
    plans: Plans = calibrate(dict(found), samples, **job.options)
    return dict(plans)


@contextmanager
def _counted(models: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Count the calls of models in the body."""
    counts = dict.fromkeys(models, 0)

    def count_of(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    handles = [model.register_forward_pre_hook(count_of(n)) for n, model in models.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _estimate(
    models: Mapping[str, nn.Module],
    kept: Mapping[str, int],
    of_a_run: float,
    options: Mapping[str, Any],
) -> float:
    """Seconds that calibration takes, for models of many heads; the bar knows it better later."""
    total = 0.0
    for name, model in models.items():
        weight = next(model.parameters(), None)
        runs = runs_of(
            fitted=(kept[name] + 1) // 2,
            held_out=kept[name] // 2,
            sites=MAX_PROBED_SITES,
            heads=MAX_PROBED_HEADS + 1,
            content=options.get("order", "auto") != "grid",
            rounds=options.get("rounds"),
            passes=options.get("passes"),
            seconds_of_run=of_a_run,
            on_gpu=weight is not None and weight.is_cuda,
        )
        total += runs.seconds(of_a_run)
    return total


def _choice(route: str, model: nn.Module, plan: Plan) -> Choice:
    plan.check_model(model)
    if route != "auto":
        return Choice(route, "it was asked for")  # type: ignore[arg-type]
    return choose_route(state_of(model, plan))


def _check_route(route: str, inner: Any, mode: str | None, strict: bool) -> None:
    if route not in ("auto", *ROUTES):
        raise OptionError(f"route {route!r} is none; supported: auto, {', '.join(ROUTES)}")
    parse_options({"inner": inner, "mode": mode, "strict": strict})


def _check_plan_alone(
    prompts: object,
    samples: object,
    targets: Mapping[str, object],
    options: Mapping[str, Any],
    run_options: object,
) -> None:
    """Refuse what is for calibration where there is a plan."""
    given = {"prompts": prompts, "samples": samples, **targets, "run_options": run_options}
    given["calibration"] = options or None
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise OptionError(
            f"plan and {extra[0]} were both given; a plan is calibrated already, and plan.at(...) "
            "moves it to another target"
        )
