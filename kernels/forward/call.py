"""What goes from launch to launch of one call: its tensors, their orders, and what is found.

Queries are the keys' own tokens, and then share their order, or other tokens with their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from freqopt.kernels.launches import Bound
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.split_launches import launches_of
from freqopt.kernels.tiles import Launch, padded_dim


class Order(NamedTuple):
    """An order for each head, or one for all.

    index: int32, the T entries of (batch, head) pair p from entry (p // share) * row on; row is 0
    where all share one.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    row: int
    share: int = 1

    @classmethod
    def shared(cls, index: Tensor) -> Order:
        """One order (T,) for all heads."""
        return cls(index, 0)

    @classmethod
    def per_head(cls, index: Tensor) -> Order:
        """Orders (B, H, T), contiguous."""
        return cls(index, index.shape[-1])


class Summaries(NamedTuple):
    """Ordered keys and values (B, Hkv, J * 64, D) and their summaries, per key head.

    in_place: key and value are the model's own instead, (B, Hkv, N, D) of any strides. key_shift
    (.., D) float32: the mean key, on which low_key is centred; key_var (.., J, D) in the keys'
    type; spread (.., J) float32; h_bar (.., D, D): H-bar before scaling.
    """

    in_place: bool
    key: Tensor
    value: Tensor
    key_shift: Tensor
    key_var: Tensor
    spread: Tensor
    low_key: Tensor
    low_value: Tensor
    h_bar: Tensor


class Route(NamedTuple):
    """Scores' outcome: band of each pair, ascending block lists, lengths, marked mass terms."""

    route: Tensor
    exact_list: Tensor
    counts: Tensor
    mass_term: Tensor


class Fitted(NamedTuple):
    """What the probes give to the attention.

    coefficients: (B, H, 2) float32, c and g; matrix (B, H, D, D) in the queries' type: the
    first-order matrix, g H-bar and the update, values by keys.
    """

    coefficients: Tensor
    matrix: Tensor


class Findings(NamedTuple):
    """What the op returns beside its output; shapes as in `split_attention_op`."""

    density: Tensor
    probe_error: Tensor
    route: Tensor
    coefficients: Tensor
    matrix: Tensor


class Target(NamedTuple):
    """Where a call's results go: out (B, H, Nq, D), and log_sum (B, H, Nq) float32 if wanted."""

    out: Tensor
    log_sum: Tensor | None


class Call(NamedTuple):
    """One call, or heads of it that go together.

    query: (B, H, Nq, D); key, value: (B, Hkv, Nk, D); key_mask: (B, Nk) bool. own: the queries are
    the keys' tokens; layouts and orders are then the same.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    layout: TokenLayout
    order: Order
    query_layout: TokenLayout
    query_order: Order
    own: bool
    scale: float
    launch: Launch

    @property
    def batch(self) -> int:
        """Batch items."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.key.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def dim(self) -> int:
        """Head dim."""
        return self.query.shape[-1]

    @property
    def tokens(self) -> int:
        """Keys without text."""
        return self.layout.tokens

    @property
    def queries(self) -> int:
        """Queries without text."""
        return self.query_layout.tokens

    @property
    def per_head(self) -> tuple[int, int]:
        """(B, H)."""
        return self.batch, self.heads

    @property
    def pairs(self) -> int:
        """(batch item, query head) pairs."""
        return self.batch * self.heads

    @property
    def launches(self) -> dict[str, Bound]:
        """The launches that are declared, by name, with their numbers."""
        return launches_of(self.launch, self.dim)

    @property
    def size(self) -> dict[str, Any]:
        """Constants of a kernel that holds channels."""
        return {"D": self.dim, "DP": padded_dim(self.dim)}

    @property
    def query_side(self) -> dict[str, Any]:
        """Arguments of a kernel that reads queries alone."""
        return {"order_row": self.query_order.row, "order_share": self.query_order.share}

    @property
    def both_sides(self) -> dict[str, Any]:
        """Arguments of a kernel that reads queries and keys: its `order` is the queries'."""
        sides = self.query_side
        if not self.own:
            sides |= {"queries": self.queries, "query_before": self.query_layout.text_before}
        return sides

    @property
    def key_side(self) -> dict[str, Any]:
        """Arguments of a kernel that reads keys alone."""
        return {"order_row": self.order.row}

    @property
    def keys_in_place(self) -> dict[str, Any]:
        """Arguments of a kernel that reads queries, and keys in place, where orders differ."""
        if self.own:
            return {}
        return {"key_order": self.order.index, "key_order_row": self.order.row}
