"""Whether modules are where they were in a model, or in it at all.

Blocks and attention may be replaced while a model is served. What is in their place has no budgets
and is never met, so that nothing else tells.
"""

from __future__ import annotations

from torch import nn


class Places:
    """Where some modules of a model are."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._paths = {id(module): name for name, module in root.named_modules()}

    def is_gone(self, module: nn.Module) -> bool:
        """Whether the model has a module no more, under whatever name."""
        path = self._paths.get(id(module))
        if path is not None and self._at(path) is module:
            return False
        found = (name for name, each in self.root.named_modules() if each is module)
        path = next(found, None)  # it may have been moved, or wrapped
        if path is not None:
            self._paths[id(module)] = path
        return path is None

    def _at(self, path: str) -> nn.Module | None:
        """The module of a name."""
        module: nn.Module | None = self.root
        for key in path.split(".") if path else ():
            module = None if module is None else module._modules.get(key)
        return module
