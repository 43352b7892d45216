"""What a launch is declared by, and how it gets its numbers for some tiles and a head dim.

The launches of one call are declared once, in `split_launches` and `order_launches`. PyTorch's
launchers (`freqopt.kernels.forward`) read constants, options and grids of them,
`freqopt.kernels.specialise` walks them, and so do the library for onnxruntime, by a header that its
exporter writes, and TensorRT's chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class KernelLaunch(NamedTuple):
    """One launch.

    grid: an extent for each axis, or "extent/NAME": the extent in parts of the constant NAME.
    constants: numbers, or names of numbers; so warps and stages. of_call: constants that PyTorch
    takes from the call at hand, as exports have them. writes, rewrites: names of what it makes, and
    of what it changes. passed: names of arguments that have another, by argument. when: which calls
    have it, if not all: "density" or "threshold", "probes", or "query_text".
    """

    name: str
    kernel: Any
    grid: str
    constants: Mapping[str, Any]
    warps: int | str = 4
    stages: int | str = 1
    of_call: Mapping[str, Any] = {}
    writes: str = ""
    rewrites: str = ""
    passed: Mapping[str, str] = {}
    when: str = ""


class Bound(NamedTuple):
    """A launch with its numbers.

    axes: an extent and the part of it that a program has, for each axis of the grid. options:
    num_warps and num_stages. fixed: constants but the call's own, and options.
    """

    axes: tuple[tuple[str, int], ...]
    constants: dict[str, Any]
    options: dict[str, int]
    fixed: dict[str, Any]

    def grid(self, **extents: int) -> tuple[int, ...]:
        """Programs of a launch with these extents."""
        return tuple([-(-extents[name] // part) for name, part in self.axes]) or (1,)


def bind(launch: KernelLaunch, numbers: Mapping[str, Any]) -> Bound:
    """A launch with the numbers that it is given by name of."""

    def resolved(value: Any) -> Any:
        return numbers[value] if isinstance(value, str) else value

    constants = {name: resolved(value) for name, value in launch.constants.items()}
    options = {"num_warps": resolved(launch.warps), "num_stages": resolved(launch.stages)}
    axes = []
    for axis in launch.grid.split():
        extent, _, part = axis.partition("/")
        axes.append((extent, constants[part] if part else 1))
    return Bound(tuple(axes), constants, options, {**constants, **options})
