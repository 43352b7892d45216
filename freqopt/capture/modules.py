"""Where modules stand in a model: names by identity, and how the names of two models match.

Wrappers, hooks and the compiler reach a module by many ways. Its name is the one that it has among
`named_modules` of the model, without the parts that only wrap.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from freqopt.errors import InputError
from freqopt.passes.naming import name_around, plain_path

USUAL = ("transformer", "transformer_2", "unet")
"""Names by which pipelines hold what denoises."""

CALLS = ("_call_impl", "_wrapped_call_impl")
"""The functions of `torch.nn.Module` whose frames say that a module is running."""


class OwnOnly:
    """What a module keeps for itself: copies and pickles of the module keep nothing of it."""

    def __init__(self, held: object = None) -> None:
        self.held = held

    def __copy__(self) -> OwnOnly:
        return OwnOnly()

    def __deepcopy__(self, memo: object) -> OwnOnly:
        return OwnOnly()

    def __reduce__(self) -> tuple[type[OwnOnly], tuple[()]]:
        return OwnOnly, ()


def names_of(model: nn.Module) -> dict[int, str]:
    """Names of all modules of a model by their `id`; "" for the model itself."""
    return {id(module): plain_path(name) for name, module in model.named_modules()}


def replaced_forwards(model: nn.Module) -> tuple[str, ...]:
    """Names of modules whose forward was replaced on the instance, as by offloading or caches."""
    return tuple(name for name, m in modules_of(model).items() if "forward" in m.__dict__)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a model by name. Of a wrapper and what it wraps, the wrapped one."""
    return {plain_path(name): module for name, module in model.named_modules()}


def blocks_around(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Names of the blocks that hold modules: members of lists, the outermost ones.

    All of them, where several share a module or it has another name besides.
    """
    own, modules = names_of(model), modules_of(model)
    wanted = {id(modules[name]) for name in names}
    every = {
        plain_path(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    found: dict[str, None] = {}
    for name, module in every.items():
        if id(module) not in wanted:
            continue
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            around = every.get(".".join(parts[: length - 1]))
            if isinstance(around, (nn.ModuleList, nn.Sequential)):
                found[own[id(every[".".join(parts[:length])])]] = None
                break
    return tuple(found)


def running() -> Iterator[nn.Module]:
    """Modules whose call is under way in this thread, the innermost first, each once."""
    frame, last = sys._getframe(1), None
    while frame is not None:
        if frame.f_code.co_name in CALLS:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                module = unwrapped_module(module)
                if module is not last:
                    yield module
                    last = module
        frame = frame.f_back  # type: ignore[assignment]


def forwards_under_way() -> Iterator[nn.Module]:
    """Modules whose `forward` runs in this thread, however it was called, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                yield unwrapped_module(module)
        frame = frame.f_back  # type: ignore[assignment]


def unwrapped_module(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the module itself."""
    inner = module.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module


def base_name(name: str) -> str:
    """The name of a site without the number of the call of its module: "attn#1" of "attn#1@2"."""
    return re.sub(r"@\d+$", "", name)


def module_of_site(name: str) -> tuple[str, int]:
    """Name of the module of a site, and which of its attentions the site is, from 0."""
    path, _, nth = base_name(name).partition("#")
    return ("" if path == "model" else path), int(nth or 0)


def match_names(
    names: Iterable[str], planned: Iterable[str], others: Collection[str] | None = None
) -> dict[str, str]:
    """Which name of a plan each name of a model is, where that is unique.

    The same name first, then one that ends in it (a wrapper around either model), then one whose
    parts are among the other's in order (a wrapper around each block), then one that begins with it
    (a wrapper around each attention). The calls of one module are one name, unless the plan tells
    them apart.

    others: further names of the model that was calibrated, which are none of the plan's; without
    them nothing is taken for an attention inside a wrapper.
    """
    wanted = list(planned)
    known = set(wanted)
    found: dict[str, str] = {}
    rest: dict[str, list[str]] = {}
    for name in names:
        base = base_name(name)
        if name in known or base in known:
            found[name] = name if name in known else base
        else:
            rest.setdefault(base, []).append(name)
    free = known - set(found.values())
    by_end: dict[str, list[str]] = {}
    for name in wanted:
        if name in free:
            by_end.setdefault(name.rpartition(".")[2], []).append(name)
    for fits in (_ends, _within):
        pairs = [
            (base, plan)
            for base in rest
            for plan in by_end.get(base.rpartition(".")[2], ())
            if fits(base.split("."), plan.split("."))
        ]
        unique = {b: p for b, p in pairs if _once(pairs, 0, b) and _once(pairs, 1, p)}
        for base, plan in unique.items():
            found.update(dict.fromkeys(rest.pop(base), plan))
            by_end[plan.rpartition(".")[2]].remove(plan)
    left = {plan for plans in by_end.values() for plan in plans} if others is not None else set()
    around = [
        (base, outer)
        for base in rest
        if base not in (others or ()) and (outer := name_around(base, left))
    ]
    for base, outer in around:
        if _once(around, 1, outer):
            found.update(dict.fromkeys(rest[base], outer))
    return found


class PlannedCallers:
    """Tells which of the modules that are running is the model that a plan is for.

    planned: names of the modules of the plan's sites.
    """

    is_noted = False

    def __init__(self, planned: Iterable[str]) -> None:
        self.planned = set(planned)
        self._fits: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def among(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The innermost that has them all, by their very names rather than by the ends of them."""
        found = None
        for module in modules:
            fit = self._fits.get(module)
            if fit is None:
                fit = self._fits[module] = self._fit(module)
            if fit == 2:
                return module
            if fit and found is None:
                found = module
        return found

    def _fit(self, module: nn.Module) -> int:
        names = modules_of(module)
        if self.planned <= names.keys():
            return 2
        return int(self.planned <= set(match_names(names, self.planned).values()))


def _once(pairs: list[tuple[str, str]], side: int, name: str) -> bool:
    return sum(pair[side] == name for pair in pairs) == 1


def _ends(first: list[str], second: list[str]) -> bool:
    short, long = sorted((first, second), key=len)
    return long[len(long) - len(short) :] == short


def _within(first: list[str], second: list[str]) -> bool:
    short, long = sorted((first, second), key=len)
    parts = iter(long)
    return all(part in parts for part in short)


def missing_sites(planned: Iterable[str], found: Mapping[str, str]) -> list[str]:
    """Names of a plan that no name of a model was matched with."""
    met = set(found.values())
    return [name for name in planned if name not in met]


def class_of(model: object) -> type:
    """A model's class; of one whose weights are shared out (`fully_shard`), that from before.

    There a class of torch.distributed and the model's own are the bases of a new one.
    """
    classes = type(model).__mro__
    theirs = [
        i for i, each in enumerate(classes) if each.__module__.startswith("torch.distributed")
    ]
    if not theirs or not issubclass(classes[theirs[-1] + 1], nn.Module):
        return classes[0]
    own = classes[theirs[-1] + 1]
    return classes[0] if own is nn.Module else own


def module_of(model: Any, what: str) -> nn.Module:
    """The module itself, out of torch.compile's wrapper.

    Raises:
        InputError: not a module; of a pipeline, which of its modules `what` wants.
    """
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.Module):
        return inner
    kind = type(model).__name__
    held = modules_in(model)
    if not held:
        raise InputError(f"model is a {kind}; {what} takes a torch.nn.Module")
    likely = [name for name in USUAL if name in held] or list(held)
    listed = ", ".join(f"{name} ({type(module).__name__})" for name, module in held.items())
    each = "; each needs a plan of its own" if len(likely) > 1 else ""
    raise InputError(
        f"model is a {kind}, which holds {listed}; {what} takes the module that denoises: pass "
        f"{' or '.join(f'pipe.{name}' for name in likely[:2])}{each}"
    )


def modules_in(holder: Any) -> dict[str, nn.Module]:
    """Modules that an object holds, by name."""
    parts = getattr(holder, "components", None)
    if not isinstance(parts, Mapping):
        parts = getattr(holder, "__dict__", {})
    return {str(name): part for name, part in parts.items() if isinstance(part, nn.Module)}
