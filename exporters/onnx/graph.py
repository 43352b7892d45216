"""A small writer of ONNX nodes with operators, so that function bodies read like the mathematics.

It knows nothing of attention. Python ints become int64 constants and floats float32 ones; constants
live at the top level, where the bodies of Scan and Loop see them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import onnx
from onnx import TensorProto, helper, numpy_helper

Described = tuple[int, "list[None] | None"]
"""Element type and shape of a nested graph's value; [] a scalar, [None] a vector, None unknown."""

VECTOR: Described = (TensorProto.INT64, [None])


class Value:
    """A named tensor of a `Nodes` under construction."""

    def __init__(self, nodes: Nodes, name: str) -> None:
        self.nodes, self.name = nodes, name

    def _two(self, kind: str, left: Any, right: Any) -> Value:
        return self.nodes.op(kind, left, right)

    def __add__(self, other: Any) -> Value:
        return self._two("Add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self._two("Add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self._two("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self._two("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self._two("Mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self._two("Mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self._two("Div", self, other)

    def __floordiv__(self, other: Any) -> Value:
        return self._two("Div", self, other)  # on int64 tensors, never negative here

    def __mod__(self, other: Any) -> Value:
        return self._two("Mod", self, other)

    def __matmul__(self, other: Value) -> Value:
        return self._two("MatMul", self, other)

    def __gt__(self, other: Any) -> Value:
        return self._two("Greater", self, other)

    def __ge__(self, other: Any) -> Value:
        return self._two("GreaterOrEqual", self, other)

    def __lt__(self, other: Any) -> Value:
        return self._two("Less", self, other)

    def __and__(self, other: Value) -> Value:
        return self._two("And", self, other)

    def __or__(self, other: Value) -> Value:
        return self._two("Or", self, other)

    def equals(self, other: Any) -> Value:
        """Where both are equal; `==` stays Python's own."""
        return self._two("Equal", self, other)

    def maximum(self, other: Any) -> Value:
        """The larger of both, element by element."""
        return self._two("Max", self, other)

    def minimum(self, other: Any) -> Value:
        """The smaller of both, element by element."""
        return self._two("Min", self, other)

    def exp(self) -> Value:
        """Exponential."""
        return self.nodes.op("Exp", self)

    def log(self) -> Value:
        """Natural logarithm."""
        return self.nodes.op("Log", self)

    def sqrt(self) -> Value:
        """Square root."""
        return self.nodes.op("Sqrt", self)

    def transposed(self, *order: int) -> Value:
        """Axes in another order."""
        return self.nodes.op("Transpose", self, perm=list(order))

    def cast(self, kind: int) -> Value:
        """In another element type, one of `onnx.TensorProto`."""
        return self.nodes.op("Cast", self, to=kind)

    def float(self) -> Value:
        """In float32."""
        return self.cast(TensorProto.FLOAT)

    def sum(self, *axes: int, keep: bool = False) -> Value:
        """Sum over axes; keep: as extents of 1."""
        return self.nodes.op("ReduceSum", self, list(axes), keepdims=int(keep))

    def max(self, *axes: int, keep: bool = False) -> Value:
        """Largest over axes; keep: as extents of 1."""
        return self.nodes.op("ReduceMax", self, list(axes), keepdims=int(keep))

    def size(self, axis: int) -> Value:
        """Extent of one axis, int64 of shape (1,)."""
        end = {} if axis == -1 else {"end": axis + 1}
        return self.nodes.op("Shape", self, start=axis, **end)

    def unsqueeze(self, *axes: int) -> Value:
        """With axes of extent 1 inserted."""
        return self.nodes.op("Unsqueeze", self, list(axes))

    def squeeze(self, *axes: int) -> Value:
        """With axes of extent 1 removed."""
        return self.nodes.op("Squeeze", self, list(axes))

    def reshape(self, *shape: Value | int) -> Value:
        """Reshape; 0 keeps the input's extent at that place, as in ONNX."""
        return self.nodes.op("Reshape", self, self.nodes.shape(*shape))

    def expand(self, *shape: Value | int) -> Value:
        """Broadcast to a shape."""
        return self.nodes.op("Expand", self, self.nodes.shape(*shape))

    def gather(self, index: Value | int, axis: int) -> Value:
        """Entries of one axis, by index."""
        return self.nodes.op("Gather", self, index, axis=axis)

    def slice(self, axis: int, start: Value | int, end: Value | int) -> Value:
        """A range of one axis."""
        one = self.nodes.shape
        return self.nodes.op("Slice", self, one(start), one(end), [axis])


class Nodes:
    """Collects the nodes of a function body; `scan` and `loop` open nested graphs."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._stack: list[list[onnx.NodeProto]] = [[]]
        self._constants: dict[Any, Value] = {}
        self._count = 0

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """Of the outermost graph, in order."""
        return self._stack[0]

    def name(self, hint: str = "v") -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{hint}_{self._count}"

    def constant(self, value: Any) -> Value:
        """An int64 or float32 constant, shared by all its uses."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        known = (array.dtype.str, array.shape, array.tobytes())
        if known not in self._constants:
            name = self.name("const")
            tensor = numpy_helper.from_array(array, name)
            self._stack[0].append(helper.make_node("Constant", [], [name], value=tensor))
            self._constants[known] = Value(self, name)
        return self._constants[known]

    def attribute(self, name: str, field: str, kind: int) -> Value:
        """A scalar constant that takes its value from the function's attribute `name`."""
        output = self.name(name)
        node = helper.make_node("Constant", [], [output])
        node.attribute.append(
            onnx.AttributeProto(name=f"value_{field}", type=kind, ref_attr_name=name)
        )
        self._stack[0].append(node)
        return Value(self, output)

    def shape(self, *parts: Value | int) -> Value:
        """int64 vector of the parts; a `Value` part is a (1,) tensor."""
        if all(isinstance(part, int) for part in parts):
            return self.constant(list(parts))
        if len(parts) == 1 and isinstance(parts[0], Value):
            return parts[0]
        each = [part if isinstance(part, Value) else self.constant([part]) for part in parts]
        return self.op("Concat", *each, axis=0)

    def value(self, operand: Any) -> Value:
        """The operand, as a constant if it is a number or a list."""
        return operand if isinstance(operand, Value) else self.constant(operand)

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> Value:
        """Append a node with one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: Any, **attributes: Any) -> list[Value]:
        """Append a node with several outputs."""
        names = [self.value(x).name for x in inputs]
        made = [self.name(kind.lower()) for _ in range(outputs)]
        self._stack[-1].append(helper.make_node(kind, names, made, **attributes))
        return [Value(self, name) for name in made]

    def where(self, condition: Value, yes: Any, no: Any) -> Value:
        """One or the other, element by element."""
        return self.op("Where", condition, yes, no)

    def concat(self, axis: int, *values: Value) -> Value:
        """Joined along an axis."""
        return self.op("Concat", *values, axis=axis)

    def range(self, start: Any, limit: Any, step: int = 1) -> Value:
        """int64 range; (1,)-shaped bounds are accepted."""

        def scalar(x: Any) -> Any:
            return x.squeeze(0) if isinstance(x, Value) else x

        return self.op("Range", scalar(start), scalar(limit), step)

    def scan(
        self,
        step: Callable[..., Value],
        inputs: Sequence[tuple[Value, int]],
        rank: int,
    ) -> Value:
        """Stack `step(*slices)`, float32 tensors of a rank, over the first axis of the inputs.

        inputs: (value, element type) each.
        """
        graph = self._nested(
            lambda names: [step(*(Value(self, n) for n in names))],
            [(self.name("slice"), kind, None) for _, kind in inputs],
            [(TensorProto.FLOAT, [None] * rank)],
        )
        return self.op("Scan", *(v for v, _ in inputs), body=graph, num_scan_inputs=len(inputs))

    def loop(
        self,
        trips: Value,
        step: Callable[..., Sequence[Value]],
        *carried: Value,
        kinds: Sequence[Described] = (),
    ) -> list[Value]:
        """Run `step(iteration, *state)` a given number of times.

        kinds: element type and shape of each part of the state; int64 vectors if not given.
        """
        state = list(kinds) or [VECTOR] * len(carried)
        names: list[tuple[str, int, list[None] | None]]
        names = [
            (self.name("iteration"), TensorProto.INT64, []),
            (self.name("go"), TensorProto.BOOL, []),
        ]
        names += [(self.name("state"), *kind) for kind in state]

        def body(inputs: list[str]) -> list[Value]:
            iteration, go, *given = (Value(self, n) for n in inputs)
            return [self.op("Identity", go), *step(iteration, *given)]

        graph = self._nested(body, names, [(TensorProto.BOOL, []), *state])
        yes = self.op("Cast", 1, to=TensorProto.BOOL)
        return self.ops("Loop", len(carried), trips, yes, *carried, body=graph)

    def _nested(
        self,
        build: Callable[[list[str]], Sequence[Value]],
        inputs: Sequence[tuple[str, int, list[None] | None]],
        kinds: Sequence[Described],
    ) -> onnx.GraphProto:
        self._stack.append([])
        results = build([name for name, _, _ in inputs])
        nodes = self._stack.pop()
        return helper.make_graph(
            nodes,
            self.name("body"),
            [helper.make_tensor_value_info(*each) for each in inputs],
            [
                helper.make_tensor_value_info(v.name, *described)
                for v, described in zip(results, kinds, strict=True)
            ],
        )
