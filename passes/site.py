"""What a pass knows about one attention computation in a graph.

A `Site` says where the attention is, what it attends over, on which grid its video tokens lie, and
whether frequency-split attention may take its place; if not, why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import fx

from freqopt.grid import Grid
from freqopt.passes.reasons import Reason, Why

Extent = int | torch.SymInt
"""A size: a number, or a symbol under dynamic shapes. Compare with `dimensions.same` only."""

Kind = Literal["self", "joint", "text in keys", "cross", "other"]

OURS: tuple[Kind, ...] = ("self", "joint", "text in keys")
"""Kinds of attention that can be split where a grid is known."""


@dataclass(frozen=True)
class Size:
    """A size that is read at run time: dimension `dim` of the output of `node`."""

    node: fx.Node
    dim: int


@dataclass(frozen=True)
class Value:
    """An int that a node of the graph gives, such as one of the graph's inputs."""

    node: fx.Node


@dataclass(frozen=True)
class Rest:
    """What is left of a sequence: the tokens after the grid and all before it.

    Among the tokens that only the keys have: all of these.
    """


@dataclass(frozen=True)
class Total:
    """The sum of several extents, such as the frames of two videos in one sequence."""

    parts: tuple[int | Size | Product, ...]


@dataclass(frozen=True)
class Product:
    """The product of several extents: the tokens of a lattice that stays exact."""

    parts: tuple[int | Size | Value, ...]


Argument = int | Size | Value | Rest | Total | Product
"""How the graph gets an extent: a constant, a size or an int read at run time, what is left of the
sequence, a sum or product of sizes."""


class Sizes(NamedTuple):
    """Heads, key heads, head dim, and numbers of queries and keys."""

    heads: int
    kv_heads: int
    head_dim: int
    queries: Extent
    keys: Extent


@dataclass
class Attention:
    """One attention as an anchor found it; tensors as fx nodes.

    query: (B, H, N, D); key, value: (B, Hkv, M, D); written by hand also (B * H, N, D), and the key
    (.., D, M) if `key_transposed`. scale: factor of the logits, None for D**-0.5. masks_queries:
    queries that the mask hides as keys give zero. objection: why this form of attention can never
    be rewritten, or None. nodes: all that compute it, `node` (the output, which a replacement
    stands in for) last. sizes: of operands that lie in another way, which is never rewritten.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    scale: float | None = None
    objection: Why | None = None
    nodes: tuple[fx.Node, ...] = ()
    key_transposed: bool = False
    masks_queries: bool = False
    sizes: Sizes | None = None


ITSELF = -1
"""Dimension of a `Source` whose argument is no tensor but an int, which is meant itself."""


class Source(NamedTuple):
    """An extent of a grid: dimension `dim` of an argument of the model, in steps of `step`.

    Of an argument that is an int, `dim` is `ITSELF`. Without a name it is `step` itself, whatever
    the model is called with.
    """

    name: str
    dim: int
    step: int


Side = tuple[bool, bool]
"""Whether text lies before a grid, and whether after it."""


@dataclass(frozen=True)
class Known:
    """How the tokens of a site lay when it was calibrated, which part of a graph may not show.

    grid: extents of the video tokens. before, after: tokens of text around them, as many as there
    were; another number is believed where they are on one side only. mask: 0 there was none, 1 a
    mask over keys that was proven to hide text only, 2 the same as a mask over pairs. sources:
    where t, h and w come from, if these are sizes of the model's arguments, or ints among them.
    """

    grid: Grid
    before: int = 0
    after: int = 0
    mask: int = 0
    sources: tuple[Source, ...] = field(default=(), compare=False)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The model's arguments that are ints and that the grid comes from."""
        return tuple(source.name for source in self.sources if source.dim == ITSELF)

    def around(self, tokens: int) -> tuple[int, int] | None:
        """Text before and after in a sequence of so many tokens; None if that cannot be told."""
        rest = tokens - math.prod(self.grid)
        if rest == self.before + self.after:
            return self.before, self.after
        if rest < 0 or (self.before and self.after) or not (self.before or self.after):
            return None
        return (rest, 0) if self.before else (0, rest)

    def around_keys(self, queries: int, keys: int) -> tuple[int, int] | None:
        """As `around`, of the keys. Queries are as many, or the video's where text has none."""
        if queries != keys and queries != math.prod(self.grid):
            return None
        return self.around(keys)


@dataclass(frozen=True)
class Share:
    """Which of a model's heads a site has, where several processes share them out.

    group: name of the process group. ranks: its size. heads: of the model, 0 where that cannot be
    told. numbers: which of them this process has, in the order that it has them.
    """

    group: str
    ranks: int
    heads: int = 0
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mark:
    """What a module brings along, see `freqopt.regional`.

    budget: node (2, H). known: how its tokens lay, one for each layout that was calibrated.
    largest_chunk: of all layers.
    """

    budget: fx.Node
    known: tuple[Known, ...]
    largest_chunk: int

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids that its tokens lay on."""
        return tuple(dict.fromkeys(known.grid for known in self.known))


@dataclass(frozen=True)
class Believed:
    """A mask that is taken to be as calibration saw it, which its values tell at every call.

    mask: as the model made it. kind: as in `Known`.
    """

    mask: fx.Node
    kind: int


@dataclass
class Site:
    """One attention computation.

    name: path of the module it is in, such as "blocks.3.attn1", with "#1", "#2" for further ones in
    the same module, and "@1", "@2" in further calls of the module. kind: "self" (video, or one kind
    of token, alone), "joint" (text and video), "text in keys" (video queries, keys of text and
    video), "cross", "other". query_length, key_length: tokens. grid: extents of the video tokens
    from the slowest to the fastest in memory, usually (t, h, w), None if unknown. text_before,
    text_after: tokens around them, in the keys at least. why: `Reason.FITS` if it could be split,
    whatever its length; else why not. pad_before_arguments, pad_after_arguments: tokens that only
    the keys have, in whose places the op gets queries of zeros. query_arguments: (t, h, w, text
    before, text after) of queries that are other tokens than the keys. mark: the budget that its
    module brings along. share: which of the model's heads these are, where processes share them.
    pieces: start and length of the pieces that its sequence is put together of, in that order,
    where tokens of one kind have others between them. sources: as those of `Known`. believed: a
    mask of which the graph does not show enough. kept: 1 at calls where it is as believed, else 0.
    """

    name: str
    kind: Kind
    heads: int
    kv_heads: int
    head_dim: int
    query_length: Extent
    key_length: Extent
    grid: tuple[Extent, Extent, Extent] | None
    text_before: Extent
    text_after: Extent
    why: Why
    dtype: torch.dtype
    device: torch.device
    attention: Attention
    scale: float = 1.0
    grid_arguments: tuple[Argument, ...] = ()
    text_before_arguments: tuple[Argument, ...] = ()
    text_after_arguments: tuple[Argument, ...] = ()
    pad_before_arguments: tuple[Argument, ...] = ()
    pad_after_arguments: tuple[Argument, ...] = ()
    query_arguments: tuple[Argument, ...] = ()
    mark: Mark | None = None
    sources: tuple[Source, ...] = ()
    share: Share | None = None
    pieces: tuple[tuple[int, int], ...] = ()
    believed: Believed | None = None
    kept: Value | None = None

    @property
    def all_heads(self) -> int:
        """Heads that the model has here, those of other processes among them."""
        return self.heads if self.share is None or not self.share.heads else self.share.heads

    @property
    def read_at_call(self) -> list[fx.Node]:
        """What is read at every call for its grid: 0 where the call tells none."""
        parts = [
            p for a in self.grid_arguments for p in (a.parts if isinstance(a, Product) else (a,))
        ]
        kept = () if self.kept is None else (self.kept,)
        return [part.node for part in (*kept, *parts) if isinstance(part, Value)]

    @property
    def at_call(self) -> bool:
        """Whether its grid is read at every call, so that no size is known to be of it."""
        return bool(self.read_at_call)

    @property
    def eligible(self) -> bool:
        """Whether it could be split, whatever its length."""
        return self.why.reason in (Reason.FITS, Reason.FITS_BY_CONTENT)

    @property
    def reason(self) -> str:
        """`why` as a sentence."""
        return str(self.why)

    @property
    def node(self) -> fx.Node:
        """The node whose value is the attention's output."""
        return self.attention.node
