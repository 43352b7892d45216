"""The kernels that measuring a call takes, compiled together before the first is launched.

As they come, those of an order, of its scores, its tiles, of the timed op, they would be waited for
one after the other, while the other cores have nothing to do: half a minute on an H200's host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.curves import Sampled, acting_orders
from freqopt.calibration.measure.heads import groups
from freqopt.calibration.measure.ladder import EVERY_RUNG, THRESHOLDS
from freqopt.calibration.measure.orders import key_order
from freqopt.kernels.compiling import compile_first
from freqopt.kernels.layout import Inputs, Settings


def compile_ahead(call: AttentionCall, orders: Sequence[int], sampled: int, probes: int) -> None:
    """Compile what a call's curves and its times launch, unless that was done for its form.

    call: on a GPU. orders, sampled, probes: as in `measure_curves`.
    """
    from freqopt.kernels.forward.split import split_forward
    from freqopt.kernels.repeat import form_of

    device = call.query.device
    chunks = tuple(dict.fromkeys(acting_orders(call, orders)))
    limits = torch.zeros(call.query.shape[1], device=device, dtype=torch.float32)
    inputs = Inputs(call.query, call.key, call.value, limits, call.key_mask, call.layout)
    layout = tuple(call.grid), call.text_before, call.text_after
    form = "curves", form_of(inputs.tensors), layout, chunks, sampled, probes

    def run() -> None:
        of_size = {
            heads.stop - heads.start: made
            for heads, made in groups(call, len(chunks), THRESHOLDS[:1], probes)
        }
        for chunk in chunks:
            order = key_order(call, chunk) if chunk else None
            for made in of_size.values():
                part = Sampled(made(order), chunk, sampled, 0.0, EVERY_RUNG[:1])
                if part.rest:
                    part.measure_rest()
        for chunk, fitted in (*((chunk, probes) for chunk in chunks), (0, 0)):
            of_keys = torch.full(call.key.shape[1:2], chunk, device=device, dtype=torch.int32)
            own = inputs._replace(chunks=of_keys if chunk else None)
            split_forward(own, Settings(call.scale, 0.0, fitted, chunk))

    with torch.cuda.device(device):
        compile_first(form, run)
