"""Calls of a served model of which checkpoints run parts once more, in the backward pass.

The part is attended as it was, on the grid of the call that it is of; its budgets are found in
`freqopt.selecting`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from freqopt.capture.modules import CALLS
from freqopt.capture.repeated import several
from freqopt.eager.forms import Form
from freqopt.eager.lay import Kind, Lay
from freqopt.errors import InputError
from freqopt.passes.reasons import Why


class Again:
    """One of the calls that a backward pass may come for, all of which agree.

    model: class of the model. forms: of these calls.
    """

    def __init__(self, model: str, forms: Sequence[Form]) -> None:
        self.model, self.forms = model, forms
        self.form = forms[-1]

    def lay(self, kind: Kind) -> Lay | Why | None:
        """How the tokens of a kind of site lay, and why it was dense if it was.

        Raises:
            InputError: not alike in all of the calls.
        """
        # Checkpoints other than PyTorch's are not seen before: what is known now goes for them.
        for lays in ([form.decided for form in self.forms], [form.lays for form in self.forms]):
            known = [lay for each in lays if (lay := each.get(kind)) is not None]
            if known:
                break
        if any(lay != known[0] for lay in known):
            raise InputError(several(self.model, "on several grids"))
        return known[0] if known else None


def in_checkpoint(module: nn.Module | None = None) -> bool:
    """Whether an activation checkpoint is under way; inside a module that is running if given."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if module is not None and code.co_name in CALLS and frame.f_locals.get("self") is module:
            return False
        if code.co_name == "checkpoint" and code.co_filename.endswith("checkpoint.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
