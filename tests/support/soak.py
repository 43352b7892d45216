"""Hundreds of calls with changing resolutions, plans and interruptions; run by test_soak.py.

    python tests/support/soak.py CALLS [eager]

Prints one line of JSON: how much the process grew between a third of the calls and the last, graphs
that are remembered, wrong outputs, interruptions. A process of its own, as memory is measured. With
PyTorch's `eager` backend in place of ours it tells what compiling alone leaves behind.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from plans import plan_of

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.telling import running

SIZES = ((3, 24, 32), (5, 24, 24), (4, 36, 20), (2, 40, 32))
THRESHOLDS = (0.0, 0.8, 1.6)
SWAP, INTERRUPT = 25, 37
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


def main(calls: int, ours: bool = True) -> None:
    torch.set_num_threads(1)
    model = small_model()
    inputs = [{"video": torch.randn(1, 3, *size), "timestep": torch.rand(1)} for size in SIZES]
    plans = [plan_of(model, inputs[0], threshold) for threshold in THRESHOLDS]
    with torch.no_grad():
        dense = [model(**each) for each in inputs]
    seen: dict[tuple[int, int], torch.Tensor] = {}
    wrong = interrupted = early = 0
    stop = False

    def interrupt(*given: object) -> None:
        if stop:
            raise KeyboardInterrupt

    model.blocks[1].register_forward_pre_hook(interrupt)
    for call in range(calls):
        if call % SWAP == 0:
            torch._dynamo.reset()
            number = call // SWAP % len(plans)
            options = {"plan": plans[number], "inner": "eager", "min_tokens": 0}
            backend: dict[str, Any] = {"backend": freqopt_backend, "options": options}
            compiled = torch.compile(
                model, dynamic=False, **(backend if ours else {"backend": "eager"})
            )
        size = call * 7 % len(inputs)
        stop = call % INTERRUPT == INTERRUPT - 1
        if stop:
            torch._dynamo.reset()  # the hook has to be traced anew, with what it does now
        try:
            with torch.no_grad():
                out = compiled(**inputs[size])
        except BaseException as error:
            if not stop:
                raise
            assert isinstance(error, (KeyboardInterrupt, Exception))
            interrupted += 1
            stop = False
            torch._dynamo.reset()
            continue
        known = seen.setdefault((number, size), out)
        off = float((out - dense[size]).norm() / dense[size].norm())
        exact = number == 0 or not ours
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
    main(int(sys.argv[1]), ours="eager" not in sys.argv)
