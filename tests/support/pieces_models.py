"""A small video transformer in the ways that it is run: hooks, casts, adapters, wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = (3, 6, 10)
WIDTH, HEADS = 32, 2


class Attention(nn.Module):
    """Self-attention, or attention to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.heads = HEADS

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys = x if context is None else context
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(keys).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v(keys).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.cross(x, text)
        return x + self.mlp(x)


class Video(nn.Module):
    """Patches, blocks of attention to the video and to a text, one output for each token."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4)
        for block in self.blocks:  # sharp enough that a budget makes a difference
            block.attn.q.weight.data *= 4

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text)
        return self.head(x)


class Timed(Video):
    """The same, called at a timestep that it does not mind; a plan may have budgets by it."""

    def forward(self, video: Tensor, text: Tensor, time: Tensor | None = None) -> Tensor:
        return super().forward(video, text)


def make(layers: int = 3) -> Video:
    torch.manual_seed(0)
    return Video(layers).eval()


def make_of_heads(*heads: int) -> Video:
    """As `make`, with as many heads in each layer as is said, as stages of a UNet have."""
    model = make(len(heads))
    for block, count in zip(model.blocks, heads, strict=True):
        block.attn.heads = block.cross.heads = count
    return model


class OverText(Attention):
    """Attention to the video and to a text, which is in the keys only: before or after, or both."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.context = where, nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (self.q(x), self.k(x), self.v(x)))
        others = self.context(context).unflatten(-1, (2, HEADS, -1)).unbind(2)
        order = {"before": (1, 0), "after": (0, 1), "both": (1, 0, 1)}[self.where]
        keys, values = (
            torch.cat([(own, other)[i] for i in order], 1).transpose(1, 2)
            for own, other in zip((k, v), others, strict=True)
        )
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)
        return self.out(out.transpose(1, 2).flatten(2))


class OverTextBlock(Block):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.attn = OverText(where)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x, text)
        return x + self.mlp(x)


def make_over_text(where: str, layers: int = 3) -> Video:
    """As `make`, of a model whose queries are the video's, and whose keys those of a text too."""
    torch.manual_seed(0)
    model = Video(layers)
    model.blocks = nn.ModuleList(OverTextBlock(where) for _ in range(layers))
    for block in model.blocks:
        block.attn.q.weight.data *= 4
    return model.eval()


def inputs(text: int = 12, batch: int = 1) -> dict[str, Tensor]:
    """Two batch items differ. text: its tokens; as many as the video's is a trap."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = GRID
    return {
        "video": torch.randn(batch, 4, t, 2 * h, 2 * w, generator=generator),
        "text": torch.randn(batch, text, WIDTH, generator=generator),
    }


@torch.compiler.disable
def _outside(*_: Any) -> None:
    """Something that the compiler leaves the graph for."""


def breaking_linears(model: nn.Module) -> None:
    """Hooks on every linear layer that break the graph there, as casting and offloading do."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_outside)


def breaking_blocks(model: nn.Module) -> None:
    """Blocks whose forward is replaced on the instance, and breaks the graph, as caches do."""
    for block in model.get_submodule("blocks").children():
        block.forward = _replaced(block.forward)


def _replaced(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        _outside()
        return forward(*args, **kwargs)

    return replaced


def brought_in(model: nn.Module) -> None:
    """Weights of a block are real only while it runs, and on the meta device between calls."""
    for block in model.get_submodule("blocks").children():
        slots = [(module, name) for module in block.modules() for name in module._parameters]
        kept = [module._parameters[name].detach().clone() for module, name in slots]

        @torch.compiler.disable
        def bring(block: nn.Module, *_: Any, slots: Any = slots, kept: Any = kept) -> None:
            for (module, name), weight in zip(slots, kept, strict=True):
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)

        @torch.compiler.disable
        def drop(block: nn.Module, *_: Any, slots: Any = slots, kept: Any = kept) -> None:
            for (module, name), weight in zip(slots, kept, strict=True):
                module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)

        block.register_forward_pre_hook(bring)
        block.register_forward_hook(drop)
        drop(block)


class Adapted(nn.Module):
    """A linear layer with an adapter that is not merged; it changes nothing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> None:
    """Adapters on queries and keys."""
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.q, module.k = Adapted(module.q), Adapted(module.k)


class Wrapped(nn.Module):
    """Something around a model or a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def wrapping_blocks(model: nn.Module) -> None:
    """Each block inside another module."""
    model.blocks = nn.ModuleList(Wrapped(block) for block in model.get_submodule("blocks"))


def wrapping_attention(model: nn.Module) -> None:
    """Each attention inside another module."""
    for block in model.get_submodule("blocks").children():
        block.attn, block.cross = Wrapped(block.attn), Wrapped(block.cross)


def inputs_on(grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """Arguments of a model of `make`, of a video on a grid; the same whenever it is asked for."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(h)
    return {
        "video": torch.randn(1, 4, t, 2 * h, 2 * w, generator=generator),
        "text": torch.randn(1, 12, WIDTH, generator=generator),
    }
