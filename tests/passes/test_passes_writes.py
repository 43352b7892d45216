"""Masks that are written to, by themselves or through views: what they were made as says nothing.

All ways to make a view and to write are in two graphs, one where masks are over keys and one where
they are over pairs, with an attention for each. None may be split, and the error is that of dense
attention; the same graphs without the writes are split everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import WIDTH, conv3d_tokens, heads, video
from torch import Tensor, fx, nn

from freqopt.backend import freqopt_backend
from freqopt.passes.find import find_sites
from freqopt.passes.masks.memory import is_written, may_share
from freqopt.passes.masks.writes import written_by
from freqopt.passes.spellings.packed import packed_opened

GRID, TEXT = (3, 6, 10), 5
LENGTH = 185

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(2, -1),
    "view_as": lambda x: x.view_as(x),
    "view as bytes": lambda x: x.view(torch.uint8),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(),
    "ravel": lambda x: x.ravel(),
    "unflatten": lambda x: x.unflatten(-1, (5, -1)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "transpose": lambda x: x.transpose(0, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 0, -1),
    "permute": lambda x: x.flatten(1).permute(1, 0),
    "movedim": lambda x: x.movedim(0, -1),
    "mT": lambda x: x.mT,
    "t": lambda x: x.flatten(1).t(),
    "narrow": lambda x: x.narrow(-1, 3, 9),
    "select": lambda x: x.select(-1, 3),
    "getitem": lambda x: x[..., 3:9],
    "index": lambda x: x[1],
    "diagonal": lambda x: x.diagonal(0, 0, -1),
    "as_strided": lambda x: x.as_strided((5,), (1,)),
    "chunk": lambda x: x.chunk(2, -1)[0],
    "split": lambda x: x.split(40, -1)[1],
    "split_with_sizes": lambda x: x.split([40, LENGTH - 40], -1)[1],
    "tensor_split": lambda x: x.tensor_split(3, -1)[0],
    "unbind": lambda x: x.unbind(-1)[3],
    "unfold": lambda x: x.unfold(-1, 3, 3),
    "detach": lambda x: x.detach(),
    "expand": lambda x: x.expand(x.shape),
    "expand_as": lambda x: x.expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x, x.shape),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x)[1],
    "atleast_1d": lambda x: torch.atleast_1d(x),
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(torch.bool),
    "bool": lambda x: x.bool(),
    "type_as": lambda x: x.type_as(x),
    "dropout": lambda x: F.dropout(x, training=False),
    "a view of views": lambda x: x.mT[None].chunk(2, 1)[0].squeeze(0),
}
"""Ways to the memory of a mask (2, 185) or (2, 1, 185, 185)."""


def filled(x: Tensor) -> None:
    x[...] = False


def crossed(x: Tensor) -> None:
    x &= ~x


def excluded(x: Tensor) -> None:
    x ^= x


def multiplied(x: Tensor) -> None:
    x *= False


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": filled,
    "iand": crossed,
    "ixor": excluded,
    "imul": multiplied,
    "fill_": lambda x: x.fill_(False),
    "zero_": lambda x: x.zero_(),
    "masked_fill_": lambda x: x.masked_fill_(x, False),
    "copy_": lambda x: x.copy_(torch.zeros_like(x)),
    "logical_and_": lambda x: x.logical_and_(~x),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([0]), False),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(False)),
    "function": lambda x: torch.fill_(x, False),
    "out": lambda x: torch.logical_and(x, ~x, out=x),
    "foreach": lambda x: torch._foreach_zero_([x]),
    "operator": lambda x: torch.ops.aten.fill_.Scalar(x, False),
}

ALL = {
    **{view: (way, filled) for view, way in VIEWS.items()},
    **{write: (VIEWS["index"], write_) for write, write_ in WRITES.items()},
}
Way = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Any]]


def over_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A mask to write to, and the mask that attention takes."""
    return keys, keys[:, None, None]


def over_pairs(keys: Tensor) -> tuple[Tensor, Tensor]:
    rows = keys[:, None, None].repeat(1, 1, LENGTH, 1)
    pairs = rows & rows.transpose(2, 3)
    return pairs, pairs


def repeated(keys: Tensor) -> tuple[Tensor, Tensor]:
    rows = keys[:, None, None].repeat(1, 1, LENGTH, 1)
    return rows, rows


def converted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Written to once it was copied."""
    pairs = over_pairs(keys)[0].clone()
    return pairs, pairs


class Many(nn.Module):
    """An attention for each of some ways to write into its mask."""

    def __init__(self, make: Callable[[Tensor], tuple[Tensor, Tensor]], ways: dict[str, Way]):
        super().__init__()
        self.make, self.ways = make, ways
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, frames: Tensor, text: Tensor, kept: Tensor) -> dict[str, Tensor]:
        x = torch.cat([conv3d_tokens(frames, self.weight), text], 1)
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        found = {}
        for name, (way, write) in self.ways.items():
            seen = torch.ones(2, LENGTH - TEXT, dtype=torch.bool)
            memory, mask = self.make(torch.cat([seen, kept], 1))
            write(way(memory))
            found[name] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return found


def compiled(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, Tensor], list[bool]]:
    """The output at threshold 0, and whether each site was found fit to be split."""
    found: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with packed_opened(gm):
            found.extend(site.eligible for site in find_sites(gm))
        options = {"threshold": 0.0, "min_tokens": 1, "inner": "eager"}
        return freqopt_backend(gm, example_inputs, options=options)

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, fullgraph=True)(*inputs), found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.tensor([[True, True, True, False, False], [True, False, True, False, True]])
    return video(GRID, 2), torch.randn(2, TEXT, WIDTH), kept


def differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Outputs that are not the same; where a row sees nothing both have NaN or zeros."""
    return [
        name
        for name in want
        if not torch.allclose(got[name].nan_to_num(), want[name].nan_to_num(), 1e-4, 1e-5)
    ]


@pytest.mark.parametrize("make", [over_keys, over_pairs, repeated, converted])
def test_no_write_is_missed(make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model, given = Many(make, ALL).eval(), inputs()
    with torch.no_grad():
        want = model(*given)
        plain = Many(make, {"plain": (VIEWS["itself"], lambda x: None)}).eval()
        plain.load_state_dict(model.state_dict())
        changed = differing(dict.fromkeys(want, plain(*given)["plain"]), want)
    assert changed == list(ALL)  # every write counts
    got, eligible = compiled(model, *given)
    assert [name for name, split in zip(ALL, eligible, strict=True) if split] == []
    assert differing(got, want) == []


@pytest.mark.parametrize("make", [over_keys, over_pairs, repeated, converted])
def test_views_alone_change_nothing(make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    ways: dict[str, Way] = {name: (way, lambda x: None) for name, way in VIEWS.items()}
    model, given = Many(make, ways).eval(), inputs()
    got, eligible = compiled(model, *given)
    assert [name for name, split in zip(ways, eligible, strict=True) if not split] == []
    with torch.no_grad():
        assert differing(got, model(*given)) == []


class Everything(nn.Module):
    """All the views, and operations that make new memory, of a float tensor (4, 6)."""

    def forward(self, x: Tensor, y: Tensor) -> list[Any]:
        made: list[Any] = [x.positive(), x.real, x.to(torch.float32), x.float(), x.type_as(y)]
        made += [x.expand(4, 6), x.repeat(1, 1), x.tile(1, 1), x.roll(0, 0), x.flip(0)]
        made += [F.pad(x, (0, 0)), F.pad(x, (1, 0)), x.clone(), x.contiguous(), x.half().half()]
        made += [
            torch.cat([x]),
            torch.stack([x]),
            x.cumsum(0),
            x.softmax(-1),
            x.tril(3),
            x.triu(-4),
        ]
        made += [x.index_select(0, torch.arange(4)), x.gather(0, torch.zeros(1, 6).long())]
        made += [x.sum(), x.amax(0), x.mean(1), x.any(0), x + 0, x * 1, x.abs(), x.clamp(-9.0)]
        made += [
            x @ y.T,
            torch.mm(x, y.t()),
            F.linear(x, y),
            F.layer_norm(x, (6,)),
            x.where(x > 0, y),
        ]
        made += [
            x.masked_fill(x > 0, 0.0),
            torch.zeros_like(x),
            x.new_ones(3),
        ]
        made += [
            F.dropout(x, 0.0),
            x.nan_to_num(),
            torch.einsum("ij->ji", x),
            x.as_strided((2,), (1,)),
        ]
        made += [*torch.meshgrid(x[0], y[:, 0], indexing="ij"), *torch.broadcast_tensors(x, y[:1])]
        made += [
            *x.chunk(2),
            *x.unbind(1),
            x.mT,
            x.swapaxes(0, 1),
            x.view(-1),
            x.ravel(),
            x[[0, 1]],
        ]
        return made


def test_what_shares_memory_is_known_to() -> None:
    """Compared with where the tensors of a running graph really lie."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    torch.compile(Everything(), backend=keep, fullgraph=True)(x, y)
    (gm,) = graphs
    places: dict[fx.Node, set[int]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            parts = made if isinstance(made, (tuple, list)) else [made]
            tensors = [part for part in parts if isinstance(part, Tensor)]
            places[n] = {part.untyped_storage().data_ptr() for part in tensors}
            return made

    Watch(gm).run(x, y)
    pairs = [(n, s) for n in gm.graph.nodes if n.op != "output" for s in n.all_input_nodes]
    shared = [(node, source) for node, source in pairs if places[node] & places[source]]
    assert [pair for pair in shared if not may_share(*pair)] == []
    assert len(shared) > 25
    own = {node.name.rstrip("_0123456789") for node, source in pairs if not may_share(node, source)}
    assert {"repeat", "clone", "cat", "stack", "add", "sum", "softmax", "linear", "where"} <= own


def test_flags_and_schemas_tell_what_is_written() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    call = graph.call_function
    assert written_by(call(F.relu, (x, True))) == [x]
    assert written_by(call(F.relu, (x,), {"inplace": True})) == [x]
    assert written_by(call(F.relu, (x,))) == []
    assert written_by(call(F.dropout, (x, 0.5, False, True))) == [x]
    assert written_by(call(torch.add, (x, x), {"out": y})) == [y]
    assert written_by(call(torch.sort, (x,), {"out": (y, x)})) == [y, x]
    assert written_by(call(torch._foreach_add_, ([x, y], 1.0))) == [x, y]
    assert written_by(call(torch.ops.aten.add_.Tensor, (x, y))) == [x]
    assert written_by(call(torch.ops.aten.add.out, (x, x), {"out": y})) == [y]
    assert written_by(graph.call_method("__iand__", (x, y))) == [x]
    assert written_by(graph.call_method("__and__", (x, y))) == []
    assert written_by(call(operator.and_, (x, y))) == written_by(call(operator.invert, (x,))) == []


def test_an_operation_that_nobody_knows_may_write() -> None:
    """A body that is entered does what it does; any other higher-order operator, who knows."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not is_written(x)
    graph.call_function(torch.ops.higher_order.cond, (True, None, None, (x,)))
    assert is_written(x)


def by_rows_of_a_view(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Ones written into a part of what is then cleared as a whole."""
    seen = torch.zeros(2, LENGTH, dtype=torch.bool)
    part = seen[:, : LENGTH - TEXT]
    part[:, :] = True
    seen[:, 4] = False
    return keys, torch.cat([part, keys[:, LENGTH - TEXT :]], 1)[:, None, None]


def in_another_order(keys: Tensor) -> tuple[Tensor, Tensor]:
    """As many entries as the keys in a column, but not in their order."""
    order = torch.arange(LENGTH).flip(0)
    return keys, keys[:, None, None, :] & keys[:, order][:, None, :, None]


def below_in_another_order(keys: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(LENGTH)[torch.arange(LENGTH).flip(0)]
    return keys, (index < LENGTH - TEXT)[None, None, None]


def written_copy_as_column(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A reshape that has to copy, as its entries are one row seen twice."""
    rows = keys.new_ones(1, LENGTH).expand(2, LENGTH)
    column = rows.reshape(-1)
    column[7:9] = False
    return keys, rows[:, None, None, :] & column.view(2, 1, LENGTH, 1)


@pytest.mark.parametrize(
    "make", [by_rows_of_a_view, in_another_order, below_in_another_order, written_copy_as_column]
)
def test_masks_that_only_look_alike(make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model, given = Many(make, {"one": (VIEWS["itself"], lambda x: None)}).eval(), inputs()
    got, eligible = compiled(model, *given)
    assert eligible == [False]
    with torch.no_grad():
        assert differing(got, model(*given)) == []


class ByHand(nn.Module):
    """Attention written out, around which something is written in place."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        x = conv3d_tokens(frames, self.weight)
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        return {"out": self.attend(q, k, v)}


def scores_set(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores[..., 5:50] = -100.0
    return scores.softmax(-1) @ v


def scores_set_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores.mT[..., 5:50, :] = -100.0
    return scores.softmax(-1) @ v


def query_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    q[..., :3] = 5.0
    return scores.softmax(-1) @ v


def scaled_query_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = q * 0.3
    q[..., :3] = 5.0
    return (scaled @ k.mT).softmax(-1) @ v


def key_overwritten_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    k.flatten(2).zero_()
    k.mT.fill_(2.0)
    return scores.softmax(-1) @ v


def values_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.3).exp()
    mixed = weights @ v
    v[..., 1] = 7.0
    return mixed / weights.sum(-1, keepdim=True)


OVERWRITTEN = [
    scores_set,
    scores_set_through_a_view,
    query_overwritten,
    scaled_query_overwritten,
    key_overwritten_through_a_view,
    values_overwritten,
]


def rotated_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q[..., ::2] = q[..., ::2] * 0.5 + 0.1
    k[..., 1:] -= 0.2
    return (q @ k.mT).softmax(-1) @ v


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q *= 0.3
    return (q @ k.mul_(0.5).mT).softmax(-1) @ v


def written_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (0.3 * q @ k.mT).softmax(-1) @ v
    q.fill_(1.0)
    v[..., 0] = 2.0
    return out + q * v


@pytest.mark.parametrize(
    "attend", [*OVERWRITTEN, rotated_before, scaled_in_place, written_afterwards]
)
def test_attention_by_hand_reads_what_was_there(attend: Any) -> None:
    """What is overwritten between the first and the last step keeps attention dense."""
    torch.manual_seed(0)
    model, frames = ByHand(attend).eval(), video(GRID)
    got, eligible = compiled(model, frames)
    assert eligible == [attend not in OVERWRITTEN]
    with torch.no_grad():
        assert differing(got, model(frames)) == []


class Packed(nn.Module):
    """`nn.MultiheadAttention` with a padding mask of numbers, that is written to at last."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, frames: Tensor, text: Tensor, kept: Tensor) -> dict[str, Tensor]:
        x = torch.cat([conv3d_tokens(frames, self.weight), text], 1)
        hidden = ~torch.cat([torch.ones(2, LENGTH - TEXT, dtype=torch.bool), kept], 1)
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, -torch.inf)
        if self.written:
            mask[:, 3] = -torch.inf
        return {"out": self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]}


@pytest.mark.parametrize("written", [False, True])
def test_a_padding_mask_of_numbers(written: bool) -> None:
    torch.manual_seed(0)
    model, given = Packed(written), inputs()
    got, eligible = compiled(model, *given)
    assert eligible == [not written]
    with torch.no_grad():
        assert differing(got, model(*given)) == []


def test_a_function_around_what_is_not_pythons_writes_into_nothing() -> None:
    """As `Tensor.__pow__` is, whose arguments have no names that could be asked for."""
    graph = fx.Graph()
    node = graph.call_function(Tensor.__pow__, (graph.placeholder("x"), 2))
    assert not written_by(node)
