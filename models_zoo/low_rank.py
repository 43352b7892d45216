"""Low-rank adapters of the zoo's model: what fine-tuning and distillation train and keep.

Every linear layer gets two thin matrices beside it (LoRA, arXiv 2106.09685). They are written as
a small file of their own, and merged into the weights for use: a model as before, other values.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear layer whose weight is kept, and a product of two thin matrices that is trained.

    base: (out, in) weight and bias, frozen; down: (rank, in); up: (out, rank), zeros at first, so
    that the layer begins as it was.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        weight = base.weight
        self.down = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.up = nn.Parameter(weight.new_zeros(base.out_features, rank))
        nn.init.normal_(self.down, std=base.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., in); returns (.., out)."""
        kept: Tensor = self.base(x)
        return kept + F.linear(F.linear(x, self.down), self.up)

    def merged(self) -> nn.Linear:
        """The base with the product added to its weight."""
        with torch.no_grad():
            self.base.weight += self.up @ self.down
        return self.base


def adapt(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put an adapter on every linear layer and freeze all else; returns what is left to train.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} of an adapter must be 1 or larger")
    model.requires_grad_(False)
    for parent, name, child in _children(model, nn.Linear):
        setattr(parent, name, LowRank(child, rank))  # type: ignore[arg-type]
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge(model: nn.Module) -> None:
    """Put plain linear layers, with the product added, where adapters are."""
    for parent, name, child in _children(model, LowRank):
        assert isinstance(child, LowRank)
        setattr(parent, name, child.merged())


def _children(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, LowRank) or kind is LowRank
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]


def save_adapter(model: nn.Module, path: Path, **metadata: str) -> None:
    """Write the adapters of a model as bfloat16 safetensors."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{part}": getattr(module, part).detach().to("cpu", torch.bfloat16).contiguous()
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
        for part in ("down", "up")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def add_adapter(model: nn.Module, path: Path) -> dict[str, str]:
    """Merge an adapter from a file into a model without one; returns the file's metadata.

    Raises:
        ValueError: the file is damaged, or its adapter does not fit this model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear), f"{name} is no linear layer"
            with torch.no_grad():
                product = tensors[f"{name}.up"].float() @ tensors[f"{name}.down"].float()
                layer.weight += product.to(layer.weight)
    except (
        SafetensorError,
        AssertionError,
        AttributeError,
        KeyError,
        RuntimeError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(
            f"{path} does not hold an adapter of this model ({type(error).__name__}: {error})"
        ) from error
    return metadata
