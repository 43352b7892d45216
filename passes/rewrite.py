"""Replaces a site's attention in its graph: by the op, or by any callable of the same form.

New nodes go right before the attention they replace, never after its operands: rotary positions are
often written in place, between the operand and the attention. Each carries an example value, so that
compile caches keep working.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from freqopt.passes.graph_values import example, same, shape_of
from freqopt.passes.site import Site, SizeSource


def replace_site(
    gm: fx.GraphModule, site: Site, target: Callable[..., Any], extra_args: tuple[Any, ...] = ()
) -> fx.Node:
    """Put a call of `target` in a site's place.

    Called as target(query, key, value, key_mask, grid, text_before, text_after, scale, *extra_args)
    on (B, H, N, D) and (B, Hkv, N, D) tensors; key_mask is (B, N) bool or None; it returns
    (B, H, N, D). `gm` is the whole graph; sites inside its subgraphs are replaced there.

    Returns:
        The call's node.
    """
    return _Rewriter(site).replace(target, extra_args, output=None)


def insert_split(
    gm: fx.GraphModule,
    site: Site,
    budget: Tensor | None,
    *,
    density: float,
    mid_band: bool,
    probes: int,
) -> fx.Node:
    """Put `freqopt::split_attention` in a site's place.

    Args:
        budget: (2, H) float32 thresholds of the exact and of the mid band; None with a density.
        density: share of pairs attended exactly, resolved on the device; 0 to use the budget.

    Returns:
        The node of the op's output.
    """
    from freqopt.kernels.op import split_attention_op

    rewriter = _Rewriter(site)
    given = budget if budget is not None else torch.zeros(2, site.heads)
    constant = rewriter.constant(f"freqopt_budget_{site.name}", given.to(site.device))
    op = torch.ops.freqopt.split_attention.default
    assert split_attention_op is not None
    return rewriter.replace(op, (constant, density, mid_band, probes), output=0)


class _Rewriter:
    """Builds the nodes of one replacement, in front of the attention's own node."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.graph = site.graph.graph
        self.stack = {
            k: site.node.meta[k] for k in ("nn_module_stack", "stack_trace", "source_fn_stack")
            if k in site.node.meta
        }  # fmt: skip
        self.value_key = "example_value" if "example_value" in site.node.meta else "val"

    def replace(
        self, target: Callable[..., Any], extra: tuple[Any, ...], *, output: int | None
    ) -> fx.Node:
        site, node = self.site, self.site.node
        with self.graph.inserting_before(node):
            query, key, value = (
                self._operand(n, i) for i, n in enumerate((
                    site.match.query, site.match.key, site.match.value))
            )  # fmt: skip
            mask = self._key_mask()
            grid = [self._size(s) for s in site.grid_sources]
            before = self._size(site.text_before_source)
            after = self._text_after(query, grid, before)
            scale = float(site.match.scale if site.match.scale is not None else 1.0)
            if output is None:
                arguments = (query, key, value, mask, tuple(grid), before, after, scale, *extra)
            else:
                budget, *constants = extra
                arguments = (
                    query,
                    key,
                    value,
                    budget,
                    mask,
                    grid,
                    before,
                    after,
                    scale,
                    *constants,
                )
            call = self._call(target, arguments, self._result_of(target, arguments, query))
            result = call
            if output is not None:
                result = self._call(operator.getitem, (call, output))
            result = self._shaped(result)
        node.replace_all_uses_with(result)
        self._erase(node)
        site.graph.recompile()
        return call

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A buffer of the graph module, read right before the attention."""
        clean = "".join(c if c.isalnum() else "_" for c in name)
        module = self.site.graph
        taken = 0
        while hasattr(module, clean if not taken else f"{clean}_{taken}"):
            taken += 1
        clean = clean if not taken else f"{clean}_{taken}"
        module.register_buffer(clean, value, persistent=False)
        with self.graph.inserting_before(self.site.node):
            node = self.graph.get_attr(clean)
        node.meta[self.value_key] = self._fake(value)
        return node

    def _fake(self, value: Tensor) -> Tensor:
        own = example(self.site.node)
        mode = getattr(own, "fake_mode", None)
        return mode.from_tensor(value, static_shapes=True) if mode is not None else value

    def _call(self, target: Any, arguments: tuple[Any, ...], value: Any = None) -> fx.Node:
        node = self.graph.call_function(target, arguments)
        node.meta.update(self.stack)
        if value is None:
            unpacked = fx.node.map_arg(arguments, example)
            own = example(self.site.node)
            mode = getattr(own, "fake_mode", None)
            if mode is None:
                value = target(*unpacked)
            else:
                with mode:
                    value = target(*unpacked)
        node.meta[self.value_key] = value
        return node

    def _result_of(self, target: Any, arguments: tuple[Any, ...], query: fx.Node) -> Any:
        """Example of the call's result; a plain callable is never run on examples."""
        if isinstance(target, torch._ops.OpOverload):
            return None
        return example(query)

    def _method(self, name: str, *arguments: Any) -> fx.Node:
        """A tensor method as a function call, which exported graphs accept too."""
        return self._call(getattr(torch.ops.aten, name).default, arguments)

    def _operand(self, node: fx.Node, index: int) -> fx.Node:
        """q, k or v in (B, H, N, D) layout and in the type the attention computes in."""
        site, match = self.site, self.site.match
        if index == 1 and match.key_transposed:
            node = self._call(torch.ops.aten.transpose.int, (node, -2, -1))
        shape = shape_of(node)
        if shape is not None and len(shape) == 3:
            heads = site.heads if index == 0 else site.kv_heads
            node = self._call(torch.ops.aten.unflatten.int, (node, 0, [-1, heads]))
        value = example(node)
        if isinstance(value, Tensor) and value.dtype != site.dtype:
            node = self._call(torch.ops.aten.to.dtype, (node, site.dtype))
        return node

    def _shaped(self, node: fx.Node) -> fx.Node:
        """The result in the shape that the attention's users expect."""
        shape = shape_of(self.site.node)
        if shape is not None and len(shape) == 3:
            node = self._call(torch.ops.aten.flatten.using_ints, (node, 0, 1))
        return node

    def _key_mask(self) -> fx.Node | None:
        """The mask as (B, N) booleans, expanded over a batch of 1."""
        site = self.site
        if not site.key_mask or site.match.mask is None:
            return None
        mask = self._call(torch.ops.aten.select.int, (site.match.mask, 2, 0))
        mask = self._call(torch.ops.aten.select.int, (mask, 1, 0))
        batch, rows = shape_of(site.match.query), shape_of(mask)
        if batch is not None and rows is not None and not same(batch[0], rows[0]):
            size = self._call(torch.ops.aten.sym_size.int, (site.match.query, 0))
            mask = self._call(torch.ops.aten.expand.default, (mask, [size, -1]))
        return mask

    def _size(self, source: SizeSource | int | None) -> Any:
        """A number, or a node that reads a size where it was made."""
        if not isinstance(source, SizeSource):
            return source
        with self.graph.inserting_after(_readable_after(source.node)):
            return self._call(torch.ops.aten.sym_size.int, (source.node, source.dim))

    def _text_after(self, query: fx.Node, grid: list[Any], before: Any) -> Any:
        """Tokens left when the video and what stands before it are taken away."""
        if isinstance(self.site.text_after, int):
            return self.site.text_after
        length = self._call(torch.ops.aten.sym_size.int, (query, 2))
        video = self._call(operator.mul, (grid[0], grid[1]))
        video = self._call(operator.mul, (video, grid[2]))
        rest = self._call(operator.sub, (length, video))
        return rest if before == 0 else self._call(operator.sub, (rest, before))

    def _erase(self, node: fx.Node) -> None:
        """Remove what nothing uses any more: the attention and, hand-written, its softmax chain."""
        pending = [node]
        while pending:
            current = pending.pop()
            if current.users or current.op not in ("call_function", "call_method"):
                continue
            if current.is_impure():
                continue
            sources = current.all_input_nodes
            self.graph.erase_node(current)
            if current is node or self.site.match.form == "softmax":
                pending += sources


def _readable_after(node: fx.Node) -> fx.Node:
    """A node after which `node`'s size can be read: inputs stay together at the front."""
    if node.op != "placeholder":
        return node
    last = node
    while last.next.op == "placeholder":
        last = last.next
    return last
