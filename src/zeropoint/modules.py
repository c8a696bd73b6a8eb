"""``QuantizedLinear``: the layer for inference, whose weights are integers."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import functional, held_weight, kernels
from .affine import quantize_to_spec
from .float_linear import Linear
from .input_transform import check_rotation, transform_input, walsh_hadamard
from .packings import QPARAMS, forget, fresh, shared_qtensor, version
from .recording import recorded
from .saving import check_state_goes_elsewhere
from .spec import WEIGHT_INT8, QuantSpec
from .tensor import QTensor

Mode = Literal["dynamic", "static", "weight-only"]
"""How a :class:`QuantizedLinear` treats its activations."""


class QuantizedLinear(nn.Module):
    """A Linear layer for inference whose weights are integers of 2 to 8 bits.

    Modes:

    * ``"dynamic"``: float in, float out; each row of activations is quantized on the fly;
    * ``"static"``: activations have a scale and zero point known beforehand. Takes floats
      (quantized on the way) or a :class:`QTensor` (torch's own is converted); gives floats, or a
      ``QTensor`` where ``output_scale`` is set and the input is a ``QTensor``;
    * ``"weight-only"``: float activations × dequantized weights.

    State is plain buffers: ``weight`` int8 ``(out, in)``, ``scale`` float32 ``(out,)``,
    ``zero_point`` int32 ``(out,)``, ``bias`` float32 ``(out,)`` or ``None``; in static mode
    ``input_scale`` float32 ``()`` and ``input_zero_point`` int32 ``()``, and ``output_scale`` and
    ``output_zero_point`` of the same shapes, or ``None``. Below 8 bits the weight is unsigned and
    packed, uint8 ``(out, ceil(in · bits / 8))`` (:mod:`zeropoint.codec`). Where groups of inputs
    have scales of their own, ``scale`` and ``zero_point`` are ``(out, groups)``, the one of
    ``scale_dtype``, the other int8, or uint8 below 8 bits. The copy for the hardware is made
    at the first call, dropped when a buffer changes, and never saved. Scales and bias stay float32
    through ``.to(dtype)``, ``.half()`` and the like.

    A layer may change its input first (:mod:`zeropoint.input_transform`): ``input_factor``, float32
    ``(in,)`` or ``None``, multiplies it, and where ``rotation`` is above 1, each run of so many
    entries is Walsh–Hadamard transformed. The weight is that of the changed input.

    Args:
        in_features, out_features: as :class:`Linear`.
        bias: whether there is a bias.
        mode: one of the above.
        quantized_output: static mode only: hold an output scale and zero point.
        device: of the buffers.
        bits: width of the weight's integers, 2 to 8.
        group_size: inputs that share a scale; ``None`` means one scale an output channel.
        scale_dtype: of the scales of groups: float32, bfloat16 or float16.
        input_factor: whether there is one, ones at first.
        rotation: size of the Walsh–Hadamard transform, a power of two that divides
            ``in_features``; above 1 it needs ``input_factor``.

    The integers start as zeros; :meth:`from_linear` or ``load_state_dict`` fills them.

    Raises:
        TypeError: ``bits``, ``group_size`` or ``scale_dtype`` of the wrong type.
        ValueError: an unknown mode, ``quantized_output`` outside static mode, a width, size or
            type of scales that is not supported, a rotation that does not fit.

    >>> layer = QuantizedLinear.from_linear(Linear(16, 4))
    >>> layer
    QuantizedLinear(in_features=16, out_features=4, bias=True, mode='dynamic', bits=8)
    """

    __constants__ = ["bits", "group_size", "in_features", "mode", "out_features", "rotation"]
    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_factor: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mode: Mode = "dynamic",
        quantized_output: bool = False,
        device: Any = None,
        *,
        bits: int = 8,
        group_size: int | None = None,
        scale_dtype: torch.dtype = torch.float32,
        input_factor: bool = False,
        rotation: int = 1,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if quantized_output and mode != "static":
            raise ValueError(f"quantized_output needs mode 'static', got mode {mode!r}")
        check_rotation("rotation", rotation, in_features)
        if rotation > 1 and not input_factor:
            raise ValueError(f"rotation needs input_factor, got rotation {rotation} without one")
        self.in_features = in_features
        self.out_features = out_features
        self.mode, self.rotation = mode, rotation
        self.bits, self.group_size, self.scale_dtype = bits, group_size, scale_dtype
        size = out_features, in_features
        held = held_weight.buffers(*size, bits, group_size, scale_dtype)
        self._layout = held_weight.layout(*size, bits, group_size)
        f32, i32, one = torch.float32, torch.int32, torch.Size(())
        out = torch.Size((out_features,))
        for name, present, fill, shape, dtype in (
            ("weight", True, 0, *held["weight"]),
            ("scale", True, 1, *held["scale"]),
            ("zero_point", True, 0, *held["zero_point"]),
            ("bias", bias, 0, out, f32),
            ("input_scale", mode == "static", 1, one, f32),
            ("input_zero_point", mode == "static", 0, one, i32),
            ("output_scale", quantized_output, 1, one, f32),
            ("output_zero_point", quantized_output, 0, one, i32),
            ("input_factor", input_factor, 1, torch.Size((in_features,)), f32),
        ):
            buffer = torch.full(shape, fill, dtype=dtype, device=device) if present else None
            self.register_buffer(name, buffer)
        self._cache: tuple[Any, ...] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mode: Mode = "dynamic",
        weight_spec: QuantSpec = WEIGHT_INT8,
        input_qparams: tuple[float | Tensor, int | Tensor] | None = None,
        output_qparams: tuple[float | Tensor, int | Tensor] | None = None,
    ) -> QuantizedLinear:
        """Quantize a float layer.

        Args:
            linear: any ``nn.Linear``; it is not changed.
            mode: see the class.
            weight_spec: how the weights are quantized, by default int8, symmetric, per channel.
            input_qparams: ``(scale, zero_point)`` of the activations, unsigned 8 bits; needed by
                static mode, refused by the others.
            output_qparams: ``(scale, zero_point)`` of a quantized output; static mode only.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``.
            ValueError: NaN or Inf in the weight; qparams missing, superfluous or out of range.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight = quantize_to_spec(linear.weight, weight_spec)
        return cls.from_quantized(weight, linear.bias, mode, input_qparams, output_qparams)

    @classmethod
    def from_quantized(
        cls,
        weight: QTensor,
        bias: Tensor | None = None,
        mode: Mode = "dynamic",
        input_qparams: tuple[float | Tensor, int | Tensor] | None = None,
        output_qparams: tuple[float | Tensor, int | Tensor] | None = None,
        *,
        input_factor: Tensor | None = None,
        rotation: int = 1,
    ) -> QuantizedLinear:
        """A layer around weights that are quantized already.

        Args:
            weight: ``(out_features, in_features)``, per tensor, per group or per channel along
                axis 0. uint8 is stored as int8 with both integers and zero points lowered by 128;
                below 8 bits signed integers are stored as unsigned, both raised.
            bias, mode, input_qparams, output_qparams: as :meth:`from_linear`.
            input_factor: float32 ``(in_features,)``, finite; rotation: see the class. ``weight`` is
                that of the changed input, and so are ``input_qparams``.

        Raises:
            ValueError: as :meth:`from_linear`, or a shape or axis that does not fit.
        """
        if weight.ndim != 2 or weight.axis not in (None, 0):
            raise ValueError(
                "weight must have shape (out_features, in_features), per tensor, per group or per "
                f"channel along axis 0; got shape {tuple(weight.shape)}, axis {weight.axis}"
            )
        if (input_qparams is None) != (mode != "static"):
            raise ValueError(
                f"input_qparams must be given in static mode and only there, got {input_qparams!r} "
                f"in mode {mode!r}"
            )
        out_features, in_features = weight.shape
        device = weight.device
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
        layer = cls(
            in_features,
            out_features,
            bias is not None,
            mode,
            output_qparams is not None,
            device,
            bits=weight.bits,
            group_size=weight.group_size,
            scale_dtype=weight.scale.dtype,
            input_factor=input_factor is not None,
            rotation=rotation,
        )
        if layer.input_factor is not None and input_factor is not None:
            if tuple(input_factor.shape) != (in_features,) or not input_factor.isfinite().all():
                raise ValueError(
                    f"input_factor must be finite, of shape ({in_features},), got "
                    f"{input_factor.dtype} of shape {tuple(input_factor.shape)}"
                )
            layer.input_factor.copy_(input_factor.detach())
        for name, value in held_weight.held(weight).items():
            getattr(layer, name).copy_(value)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias.detach())
        for side, qparams in (("input", input_qparams), ("output", output_qparams)):
            if qparams is not None:
                # An empty QTensor checks the range of what came.
                empty = torch.empty(0, dtype=torch.uint8, device=device)
                checked = QTensor(empty, *qparams)
                getattr(layer, f"{side}_scale").copy_(checked.scale)
                getattr(layer, f"{side}_zero_point").copy_(checked.zero_point)
        layer.eval()
        return layer

    def forward(self, input: Tensor | QTensor) -> Tensor | QTensor:
        """``(*, in_features)`` → ``(*, out_features)``; dtypes as the class says."""
        if is_dynamo_compiling():
            return self._recorded(input)
        cache, buffers, mode = self._cache, self._buffers, self.mode
        # fresh, written out: it is a tenth of what a small call costs.
        if (
            cache is None
            or cache[0]._int_repr is not buffers["weight"]
            or cache[1] is not buffers["scale"]
            or cache[2] is not buffers["zero_point"]
            or (mode == "static" and not fresh(cache, buffers))
        ):
            if recorded(input):
                return self._recorded(input)
            cache = self._rebuild()
        factor = buffers["input_factor"]
        if factor is not None:
            changed = kernels.quick_transform(input, factor, self.rotation)
            input = self._changed(input) if changed is None else changed
        weight, bias = cache[0], buffers["bias"]
        if mode == "dynamic":
            return functional.linear_dynamic(input, weight, bias)  # type: ignore[arg-type]
        if mode == "weight-only":
            return functional.linear_weight_only(input, weight, bias)  # type: ignore[arg-type]
        if isinstance(input, Tensor) and input.is_quantized:
            input = QTensor.from_torch(input)
        if isinstance(input, QTensor):
            if cache[5] is not None:
                return functional.linear(input, weight, bias, *cache[5])
            return functional.linear_static(input, weight, bias)
        return functional.linear_static(input, weight, bias, cache[3], cache[4])

    def _recorded(self, input: Tensor | QTensor) -> Tensor | QTensor:
        """As :meth:`forward`, where torch compiles or exports: one operator on plain tensors."""
        if self.input_factor is not None:
            input = self._changed(input)
        axis = 0 if self.group_size is None else None
        weight = QTensor._of(self.weight, self.scale, self.zero_point, axis, self._layout)
        if self.mode == "dynamic":
            return functional.linear_dynamic(input, weight, self.bias)  # type: ignore[arg-type]
        if self.mode == "weight-only":
            return functional.linear_weight_only(input, weight, self.bias)  # type: ignore[arg-type]
        if isinstance(input, QTensor):
            if self.output_scale is not None:
                return functional.linear(
                    input, weight, self.bias, self.output_scale, self.output_zero_point
                )
            return functional.linear_static(input, weight, self.bias)
        return functional.linear_static(
            input, weight, self.bias, self.input_scale, self.input_zero_point
        )

    def _changed(self, input: Tensor | QTensor) -> Tensor:
        if not isinstance(input, Tensor) or input.is_quantized:
            raise TypeError(
                "input must be a float tensor for a layer with an input_factor, got "
                f"{type(input).__name__}"
            )
        return transform_input(input, self.input_factor, self.rotation)  # type: ignore[arg-type]

    def weight_qtensor(self) -> QTensor:
        """The weight as a :class:`QTensor` that shares this layer's buffers. Where there is an
        ``input_factor``, it is that of the changed input."""
        cache = self._cache
        if cache is None or not fresh(cache, self._buffers):
            cache = self._rebuild()
        return cache[0]

    def dequantize(self) -> Linear:
        """The float layer these integers stand for: a trainable :class:`Linear`, float32."""
        # skip_init: drawing numbers only to overwrite them would move the caller's generator.
        linear = nn.utils.skip_init(
            Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=torch.float32,
        )
        with torch.no_grad():
            weight = self.weight_qtensor().dequantize()
            if self.input_factor is not None:
                weight = walsh_hadamard(weight, self.rotation) * self.input_factor
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, mode={self.mode!r}, bits={self.bits}"
        ) + "".join(
            f", {name}={value}"
            for name, value, usual in (
                ("group_size", self.group_size, None),
                ("input_factor", self.input_factor is not None, False),
                ("rotation", self.rotation, 1),
            )
            if value != usual
        )

    def _rebuild(self) -> tuple[Any, ...]:
        b = self._buffers
        weight = shared_qtensor(self.weight, self.scale, self.zero_point, self._layout)
        static: tuple[Any, ...] = ()
        if self.mode == "static":
            qparams = [b[name] for name in QPARAMS]
            numbers = [None if t is None else t.item() for t in qparams]
            output = None if numbers[2] is None else (numbers[2], numbers[3])
            static = (*numbers[:2], output, qparams, [version(t) for t in qparams])
        self._cache = (weight, b["scale"], b["zero_point"], *static)
        return self._cache

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                # A cast would round scales and bias; only the device may change.
                self._buffers[name] = old.to(new.device)
        self._cache = None
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        check_state_goes_elsewhere()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # Inference tensors have no version counter that would tell that they have changed.
        forget(self.weight)
        if self._cache is not None:
            self._cache[0]._packed = None
            self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cache": None}
