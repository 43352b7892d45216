"""Hundreds of calls with changing resolutions, plans and interruptions; run by test_soak.py.

    python tests/support/soak.py CALLS compiled|uncompiled|pytorch

Prints one line of JSON: how much the process grew between a third of the calls and the last, graphs
that are remembered, wrong outputs, interruptions. A process of its own, as memory is measured. The
model is compiled with our backend, served without a compiler, or, to tell what compiling alone
leaves behind, compiled with PyTorch's `eager` backend.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from plans import plan_of
from torch import nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan
from freqopt.telling import running

SIZES = ((3, 24, 32), (5, 24, 24), (4, 36, 20), (2, 40, 32))
THRESHOLDS = (0.0, 0.8, 1.6)
SWAP, INTERRUPT = {"compiled": 25, "pytorch": 25, "uncompiled": 5}, 37
"""Calls between another plan and the next, and between interruptions."""


def resident() -> int:
    """Bytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def small_model() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, layers=2, heads=2, mlp_width=32, rope_axes=(4, 6, 6))
    model = VideoDiT(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class Compiled:
    """A model compiled with our backend, or with PyTorch's own that changes nothing."""

    def __init__(self, model: nn.Module, *, ours: bool) -> None:
        self.model, self.ours = model, ours

    def swap(self, plan: Plan) -> None:
        """Call with another plan from now on."""
        torch._dynamo.reset()
        options = {"plan": plan, "inner": "eager", "min_tokens": 0}
        how: dict[str, Any] = {"backend": "eager"}
        if self.ours:
            how = {"backend": freqopt_backend, "options": options}
        self.call = torch.compile(self.model, dynamic=False, **how)

    def anew(self) -> None:
        """Have hooks traced anew, with what they do now."""
        torch._dynamo.reset()


class Uncompiled:
    """A model that `freqopt.optimize` serves by the route eager."""

    def __init__(self, model: nn.Module) -> None:
        self.call, self.handle = model, None

    def swap(self, plan: Plan) -> None:
        """See `Compiled`."""
        if self.handle is not None:
            self.handle.disable()
        self.handle = freqopt.optimize(self.call, plan, route="eager", strict=True)

    def anew(self) -> None:
        """See `Compiled`."""


def main(calls: int, way: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    model = small_model()
    inputs = [{"video": torch.randn(1, 3, *size), "timestep": torch.rand(1)} for size in SIZES]
    plans = [plan_of(model, inputs[0], threshold) for threshold in THRESHOLDS]
    with torch.no_grad():
        dense = [model(**each) for each in inputs]
    run = Uncompiled(model) if way == "uncompiled" else Compiled(model, ours=way == "compiled")
    seen: dict[tuple[int, int], torch.Tensor] = {}
    wrong = interrupted = early = number = 0
    stop = False

    def interrupt(*given: object) -> None:
        if stop:
            raise KeyboardInterrupt

    model.blocks[1].register_forward_pre_hook(interrupt)
    for call in range(calls):
        if call % SWAP[way] == 0:
            number = call // SWAP[way] % len(plans)
            run.swap(plans[number])
        size = call * 7 % len(inputs)
        stop = call % INTERRUPT == INTERRUPT - 1
        if stop:
            run.anew()
        try:
            with torch.no_grad():
                out = run.call(**inputs[size])
        except BaseException as error:
            if not stop:
                raise
            assert isinstance(error, (KeyboardInterrupt, Exception))
            interrupted += 1
            stop = False
            run.anew()
            continue
        known = seen.setdefault((number, size), out)
        off = float((out - dense[size]).norm() / dense[size].norm())
        exact = number == 0 or way == "pytorch"
        wrong += not torch.equal(known, out) or (off > 1e-4 if exact else not 1e-5 < off < 0.5)
        if call == calls // 3:
            gc.collect()
            early = resident()
    gc.collect()
    found = {
        "grown": resident() - early,
        "graphs": len(running.graphs),
        "wrong": wrong,
        "interrupted": interrupted,
        "split": freqopt.counters().split,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
