"""Step caches of diffusers, which reuse what blocks computed in the step before.

They know steps by what a pipeline says around its calls of the model. A call that is made to look
at the model has no step before it, and fails in them; and it is to show all attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_step_caches(model: nn.Module) -> Iterator[None]:
    """Take the step caches of a model off while the body runs; what they held is forgotten."""
    with ExitStack() as undo:
        for module in list[Any](model.modules()):
            config = getattr(module, "_cache_config", None)
            if config is not None and getattr(module, "is_cache_enabled", False) is True:
                module.disable_cache()
                undo.callback(module.enable_cache, config)
        yield
