"""ONNX's operators in place of zeropoint's: what each layer becomes in the file, see docs/onnx.md.

Runs after all optimization, so that nothing turns the integers written here into floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from ..layout import Layout
from ..tensor import SMALLEST_SCALE, QTensor
from .onnx_embedding import embedding
from .onnx_graph import CONTRIB, Builder, constant_of
from .onnx_operators import DOMAIN, OPERATORS
from .onnx_weights import Codes

_FLOAT, _INT8, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8
_INT32 = ir.DataType.INT32
_EXACT = 1  # accuracy_level of MatMulNBits: products of float32


class Lowering:
    """Replaces the nodes of the domain ``zeropoint``.

    Args:
        model: to be changed.
        standard: without operators of ONNX Runtime's own.

    Attributes:
        left: what the file has not, in words.
    """

    def __init__(self, model: ir.Model, standard: bool) -> None:
        self._model, self._standard = model, standard
        self._new = Builder(model)
        self._codes: tuple[Any, Any] = (None, None)  # of the weight at hand
        self._names: dict[tuple[str, ...], str] = {}
        self._graph: Any = None  # of the node at hand
        self.left: dict[str, None] = {}  # a set in order

    def run(self) -> int:
        """How many nodes were replaced.

        Raises:
            ValueError: a layer that cannot be written; names it.
        """
        everything = ir.traversal.RecursiveGraphIterator(self._model.graph)
        nodes = [node for node in everything if node.domain == DOMAIN]
        for node in nodes:
            names = [key for key in OPERATORS[node.op_type] if key != "activation"]
            given = dict.fromkeys(names) | dict(zip(names, node.inputs, strict=False))
            attributes = {key: attribute.value for key, attribute in node.attributes.items()}
            self._graph = node.graph
            make: Callable[..., ir.Value] = getattr(self, f"_{node.op_type}")
            self._new.replace(node, make(given, attributes))
        self._model.opset_imports.pop(DOMAIN, None)
        return len(nodes)

    # Linear layers

    def _linear_dynamic(self, given: Any, attributes: Any) -> ir.Value:
        name, codes = self._weight(given, attributes)
        integers, zero_point, scale = self._rows(self._input(given))
        new = self._new
        if not codes.per_channel:
            x = self._shared("centred", integers, lambda: new("Sub", integers, zero_point))
            y = new("Mul", self._float_product(x, name, codes), scale)
            return self._finish(y, given, attributes)
        _check_sums(name, codes)
        weight, weight_zero_point = self._factor(name, codes)
        q = self._shared("bytes", integers, lambda: new.cast(integers, _FLOAT, _UINT8))
        z = self._shared("int32", zero_point, lambda: new.cast(zero_point, _FLOAT, _INT32))
        inputs = [q, weight] + ([None, weight_zero_point] if weight_zero_point is not None else [])
        total = new("MatMulInteger", *inputs)
        sums = new.constant(f"{name}.sums", lambda: codes.real_integers().sum(1, dtype=torch.int32))
        total = new("Sub", total, new("Mul", z, sums))
        scales = new("Mul", scale, self._scale(name, codes))
        y = new("Mul", new.cast(total, _INT32, _FLOAT), scales)
        return self._finish(y, given, attributes)

    def _linear_weight_only(self, given: Any, attributes: Any) -> ir.Value:
        name, codes = self._weight(given, attributes)
        y = self._float_product(self._input(given), name, codes)
        return self._finish(y, given, attributes)

    def _linear_static(self, given: Any, attributes: Any) -> ir.Value:
        x, new = self._input(given), self._new
        scale, zero_point = self._qparams(given, "input", _UINT8)
        key = ("static", scale, zero_point)
        q = self._shared(key, x, lambda: new("QuantizeLinear", x, scale, zero_point))
        return self._finish(self._integer_product(q, given, attributes), given, attributes)

    def _linear_integer(self, given: Any, attributes: Any) -> ir.Value:
        y = self._integer_product(given["input"], given, attributes)
        return self._finish(y, given, attributes, _FLOAT)

    def _linear_quantized(self, given: Any, attributes: Any) -> ir.Value:
        y = self._integer_product(given["input"], given, attributes)
        y = self._finish(y, given, attributes, _FLOAT)
        return self._new("QuantizeLinear", y, *self._qparams(given, "output", given["input"].dtype))

    def _linear_float(self, given: Any, attributes: Any) -> ir.Value:
        new, weight = self._new, given["weight"]
        weight = new("Transpose", new.cast(weight, weight.dtype, _FLOAT), perm=[1, 0])
        return self._finish(new("MatMul", self._input(given), weight), given, attributes)

    def _integer_product(self, q: ir.Value, given: Any, attributes: Any) -> ir.Value:
        """Of integers by an integer weight, as floats: DequantizeLinear before a MatMul."""
        name, codes = self._weight(given, attributes)
        new, dtype = self._new, q.dtype or _UINT8
        scale, zero_point = self._qparams(given, "input", dtype)
        if not codes.per_channel:
            # Not by DequantizeLinear: ONNX Runtime 1.32 would take the weight's for one by channel.
            def centred() -> ir.Value:
                return new("Sub", *(new.cast(t, dtype, _FLOAT) for t in (q, zero_point)))

            x = self._shared(("centred", zero_point), q, centred)
            return new("Mul", self._float_product(x, name, codes), scale)
        x = self._shared(
            ("real", scale, zero_point), q, lambda: new("DequantizeLinear", q, scale, zero_point)
        )
        _check_sums(name, codes)  # ONNX Runtime multiplies the integers
        return new("MatMul", x, self._real(name, codes, cast=True))

    def _float_product(self, x: ir.Value, name: str, codes: Codes) -> ir.Value:
        """Of floats by an integer weight, in float32.

        DequantizeLinear before a MatMul says it plainly, but ONNX Runtime's default is to fuse the
        two and to round the floats to 8 bits; a MatMulNBits says that it must not. Of 8 bits it
        would dequantize at every call, while a Cast of a constant is done once.
        """
        new = self._new
        rows, columns = codes.codes.shape
        block = codes.block_size
        if not self._standard and block and (codes.width == 4 or not codes.per_channel):
            how: dict[str, Any] = {
                "K": columns,
                "N": rows,
                "bits": codes.width,
                "block_size": block,
            }
            how["accuracy_level"] = _EXACT
            blocks = self._blocks(name, codes, block)
            return new("MatMulNBits", x, *blocks, domain=CONTRIB, **how)
        if self._standard or not codes.per_channel:
            return new("MatMul", x, self._real(name, codes, cast=False))
        weight, zero_point = self._factor(name, codes)
        weight = new.cast(weight, _INT8, _FLOAT)
        if zero_point is not None:
            weight = new("Sub", weight, new.cast(zero_point, _INT8, _FLOAT))
        return new("Mul", new("MatMul", x, weight), self._scale(name, codes))

    def _finish(
        self, y: ir.Value, given: Any, attributes: Any, dtype: ir.DataType | None = None
    ) -> ir.Value:
        """Bias, activation, residual, and the type of the output: by default the input's."""
        new = self._new
        dtype = dtype or given["input"].dtype or _FLOAT
        if (bias := given["bias"]) is not None:
            y = new("Add", y, new.cast(bias, bias.dtype, _FLOAT))
        activation = attributes.get("activation")
        if activation == "relu":
            y = new("Relu", y)
        elif activation == "gelu":
            y = new("Gelu", y)
        elif activation == "silu":
            y = new("Mul", y, new("Sigmoid", y))
        if (residual := given.get("residual")) is not None:
            residual = new.cast(new.cast(residual, residual.dtype, dtype), dtype, _FLOAT)
            y = new("Add", y, residual)
        return new.cast(y, _FLOAT, dtype)

    # Activations

    def _input(self, given: Any) -> ir.Value:
        x = given["input"]
        return self._shared("float32", x, lambda: self._new.cast(x, x.dtype, _FLOAT))

    def _rows(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """``(integers, zero_point, scale)`` of each row, as floats, by the steps of
        :func:`zeropoint.reference.quantize_rows`; the scale of a row with NaN or ±Inf is NaN."""
        new = self._new
        zero, one, steps = (new.scalar(v) for v in (0.0, 1.0, 255.0))
        last = new.numbers([-1])

        def make() -> tuple[ir.Value, ir.Value, ir.Value]:
            lo = new("Min", new("ReduceMin", x, last, keepdims=1), zero)
            hi = new("Max", new("ReduceMax", x, last, keepdims=1), zero)
            scale = new("Sub", new("Div", hi, steps), new("Div", lo, steps))
            scale = new("Max", scale, new.scalar(SMALLEST_SCALE))
            inverse = new("Div", one, scale)
            zero_point = new("Round", new("Mul", new("Neg", lo), inverse))
            zero_point = new("Clip", zero_point, zero, steps)
            integers = new("Add", new("Round", new("Mul", x, inverse)), zero_point)
            integers = new("Clip", integers, zero, steps)
            nan = new("ReduceSum", new("Sub", x, x), last, keepdims=1)
            return integers, zero_point, new("Add", scale, nan)

        return self._shared("rows", x, make)

    def _qparams(self, given: Any, side: str, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        zero_point = given[f"{side}_zero_point"]
        number = int(constant_of(zero_point, f"{side}_zero_point"))
        return given[f"{side}_scale"], self._new.scalar(number, dtype)

    def _shared(self, key: Any, value: Any, make: Callable[[], Any]) -> Any:
        """Layers with the same input quantize it once."""
        return self._new.shared((key, value, self._graph), make)

    # Weights

    def _weight(self, given: Any, attributes: Any) -> tuple[str, Codes]:
        values = [given[key] for key in ("weight", "scale", "zero_point")]
        key = tuple(value.name for value in values)
        name = self._names.get(key)
        if name is None:  # the first of a weight has its name; others differ in their scales
            name, same = key[0], sum(known[0] == key[0] for known in self._names)
            self._names[key] = name = f"{name}.{same}" if same else name
        if key != self._codes[0]:
            self._codes = key, self._read(name, values, attributes)
        return name, self._codes[1]

    def _read(self, name: str, values: list[ir.Value], attributes: Any) -> Codes:
        keys = ("weight", "scale", "zero_point")
        weight, scale, zero_point = map(constant_of, values, keys)
        bits, group_size = attributes.get("bits", 8), attributes.get("group_size")
        columns, signed = attributes.get("in_features"), bool(attributes.get("signed", False))
        if bits == 8:
            signed, columns = weight.dtype == torch.int8, weight.shape[1]
        if not len(weight) or not columns:
            raise ValueError(f"{name!r} is empty, {tuple(weight.shape)}")
        layout = Layout.of(torch.Size((len(weight), columns)), signed, bits, group_size)
        axis = 0 if scale.ndim == 1 and group_size is None else None
        codes = Codes.of(QTensor._of(weight, scale, zero_point, axis, layout.kept()))
        if codes.bits != codes.width:
            left = f"the width of {name!r}: its integers of {bits} bits take {codes.width}"
            self.left[left] = None
        return codes

    def _factor(self, name: str, codes: Codes) -> tuple[ir.Value, ir.Value | None]:
        """``(integers, zero_point)``, int8 ``(in, out)`` and ``(out,)``; the latter ``None`` where
        all are 0."""
        weight = self._signed(name, codes, 0, True)
        if bool((codes.zero_point != codes.middle).any()):
            return weight, self._signed(name, codes, 1, True)
        return weight, None

    def _signed(self, name: str, codes: Codes, part: int, cast: bool) -> ir.Value:
        kind = ir.DataType.INT4 if codes.width == 4 else _INT8

        def make() -> Any:
            array = codes.signed()[part].numpy()
            array = array[0] if part and codes.per_channel else array
            return array.astype(kind.numpy())

        name = f"{name}.{('transposed', 'zeros_transposed')[part]}"
        value = self._new.constant(name, make, kind)
        return self._new.cast(value, kind, _INT8) if cast else value

    def _real(self, name: str, codes: Codes, *, cast: bool) -> ir.Value:
        """The weight as floats ``(in, out)``; of 4 bits by way of 8 if ``cast``.

        Zero points are given where they are 0 too: otherwise ONNX Runtime 1.32 makes a wrong one
        when it is told to have exact products (``session.x64quantprecision``).
        """
        weight, zero_point = (self._signed(name, codes, part, cast) for part in (0, 1))
        how: dict[str, Any]
        how = {"axis": 1} if codes.per_channel else {"axis": 0, "block_size": codes.group_size}
        return self._new("DequantizeLinear", weight, self._scale(name, codes), zero_point, **how)

    def _scale(self, name: str, codes: Codes) -> ir.Value:
        """Float32 ``(out,)`` or ``(groups, out)``."""
        scale = codes.scale[:, 0] if codes.per_channel else codes.scale.T
        value = self._new.constant(f"{name}.scales_transposed", lambda: scale)
        return self._new.cast(value, value.dtype, _FLOAT)

    def _blocks(self, name: str, codes: Codes, size: int) -> list[ir.Value]:
        """Data, float32 scales and, where there are any, zero points."""

        def make() -> list[ir.Value]:
            new, (data, scale, zero_point) = self._new, codes.blocks(size)
            values = [new.constant(f"{name}.blocks", lambda: data)]
            values.append(new.constant(f"{name}.scales", lambda: scale))
            if zero_point is not None:
                values.append(new.constant(f"{name}.zeros", lambda: zero_point))
            return values

        data, scale, *zero_point = self._new.shared((name, "blocks"), make)
        return [data, self._new.cast(scale, scale.dtype, _FLOAT), *zero_point]

    # Embeddings

    def _embedding(self, given: Any, attributes: Any) -> ir.Value:
        weight = None  # as the table holds it
        if attributes["bits"] not in (4, 8):
            name, codes = self._weight(given, attributes)
            weight = self._new.constant(f"{name}.rows", codes.rows)
        return embedding(self._new, given, attributes, weight)


def _check_sums(name: str, codes: Codes) -> None:
    """Refuse a weight whose products with bytes may add up to more than 32 bits."""
    largest = codes.real_integers().abs().sum(1, dtype=torch.int64).max()
    if 255 * int(largest) >= 2**31:
        raise ValueError(
            f"{name!r} has {codes.codes.shape[1]} inputs, so many that sums of its products with "
            "bytes may not fit 32 bits"
        )
