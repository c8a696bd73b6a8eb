"""One packing for all that compute with the same weight, for as long as the weight lives.

A layer's packing hangs on its :class:`QTensor`. Two more cases need to find one: layers that hold
the same buffers (tied weights), and the operators of :mod:`zeropoint.ops`, which are given plain
tensors. Packings remembered for plain tensors are found by the weight tensor itself, are made again
when one of its tensors was changed in place or exchanged, and go when the weight goes.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary, ref

from torch import Tensor

from . import kernels
from .kernels import PackedWeight, prepack
from .layout import Layout
from .tensor import QTensor

_qtensors: WeakValueDictionary[tuple[int, int, int], QTensor] = WeakValueDictionary()
_remembered: dict[int, _Remembered] = {}


def version(t: Tensor | None) -> int:
    """How often a tensor was changed in place; −1 where torch does not count."""
    return -1 if t is None or t.is_inference() else t._version


def shared_qtensor(
    weight: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout | None = None
) -> QTensor:
    """One QTensor, and so one packing, for all layers that hold the same buffers (tied weights).

    Args:
        weight: int8 ``(out, in)``, or packed codes; scale: float32 ``(out,)``; zero_point: int32
            ``(out,)``; or both ``(out, groups)``.
        layout: below 8 bits, or with groups.

    Raises:
        TypeError, ValueError: tensors that do not fit together, or values out of range.
    """
    q = _living(weight, scale, zero_point, layout)
    if q is None:
        q = _qtensor(weight, scale, zero_point, layout)
        _qtensors[id(weight), id(scale), id(zero_point)] = q
    return q


def _qtensor(weight: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout | None) -> QTensor:
    """The QTensor of tensors as a layer holds them, checked."""
    if layout is None or layout.bits == 8:
        group_size = None if layout is None else layout.group_size
        axis = 0 if scale.ndim == 1 and group_size is None else None
        return QTensor(weight, scale, zero_point, axis, group_size=group_size)
    bits, signed, shape, group_size = layout
    axis = 0 if scale.ndim == 1 and group_size is None else None
    return QTensor.from_packed(
        weight, shape, scale, zero_point, axis, bits=bits, signed=signed, group_size=group_size
    )


def _living(
    weight: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout | None
) -> QTensor | None:
    q = _qtensors.get((id(weight), id(scale), id(zero_point)))
    # An id may have been used before; memory that a living QTensor holds cannot.
    if (
        q is None
        or q._int_repr is not weight
        or q._scale.data_ptr() != scale.data_ptr()
        or q._zero_point.data_ptr() != zero_point.data_ptr()
        or q._layout != layout
    ):
        return None
    return q


class _Remembered:
    """What was packed of tensors that are not kept alive by it."""

    __slots__ = ("layout", "packed", "sources", "versions")

    def __init__(self, tensors: tuple[Tensor, ...], layout: Layout | None, packed: Any) -> None:
        key = id(tensors[0])

        def forget(_: Any) -> None:
            if _remembered.get(key) is self:
                del _remembered[key]

        self.sources = (ref(tensors[0], forget), *map(ref, tensors[1:]))
        self.versions = tuple(map(version, tensors))
        self.layout, self.packed = layout, packed

    def current(self, tensors: tuple[Tensor, ...], layout: Layout | None) -> bool:
        return (
            len(tensors) == len(self.sources)
            and self.layout == layout
            and all(s() is t for s, t in zip(self.sources, tensors, strict=True))
            and self.versions == tuple(map(version, tensors))
        )


def _recall(tensors: tuple[Tensor, ...], layout: Layout | None = None) -> Any:
    entry = _remembered.get(id(tensors[0]))
    return entry.packed if entry is not None and entry.current(tensors, layout) else None


def _remember(packed: Any, tensors: tuple[Tensor, ...], layout: Layout | None = None) -> None:
    _remembered[id(tensors[0])] = _Remembered(tensors, layout, packed)


def remembered_qtensor(
    weight: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout | None = None
) -> QTensor:
    """The QTensor of these tensors, whose packing is remembered.

    Args:
        weight: int8 or uint8 ``(out, in)``, or packed codes.
        scale: float32, ``(out,)`` or ``()``; zero_point: int32 of the same shape; or both
            ``(out, groups)``.
        layout: below 8 bits, or with groups.

    Raises:
        TypeError, ValueError: tensors that do not fit together, or values out of range.
    """
    q = _living(weight, scale, zero_point, layout)
    if q is not None:
        forget(weight)  # a layer holds a packing, which serves
        return q
    tensors = (weight, scale, zero_point)
    packed = _recall(tensors, layout)
    if packed is not None:
        grouped = layout is not None and layout.group_size is not None
        axis = 0 if scale.ndim and not grouped else None
        q = QTensor._of(weight, scale, zero_point, axis, layout)
    else:
        q = _qtensor(weight, scale, zero_point, layout)
        if kernels.usable(weight, q):
            packed = prepack(q)._packed
            _remember(packed, tensors, layout)
    q._packed = packed
    return q


def remembered_float(weight: Tensor) -> PackedWeight:
    """The packed form of a float32 or bfloat16 weight ``(out, in)``, remembered.

    Raises:
        TypeError, ValueError: another weight.
    """
    packed = _recall((weight,))
    if packed is None:
        packed = prepack(weight.detach())
        _remember(packed, (weight,))
    return packed


def forget(weight: Tensor) -> None:
    """Pack anew at the next use: for changes that torch does not count."""
    _remembered.pop(id(weight), None)


def count() -> int:
    """How many packings are remembered for plain tensors."""
    return len(_remembered)


QPARAMS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""Buffers of a static layer that are read as numbers."""


def fresh(cache: tuple[Any, ...], buffers: dict[str, Tensor | None]) -> bool:
    """Whether what a layer derived from its buffers still holds. The packing of the weight has its
    own check, where the packing is used; here only replaced buffers and static parameters count.

    Args:
        cache: QTensor of the weight, buffers ``scale`` and ``zero_point``; of a static layer also
            input scale, input zero point, output's or ``None``, the buffers of :data:`QPARAMS` and
            their versions.
        buffers: of the layer, by name.
    """
    if (
        cache[0]._int_repr is not buffers["weight"]
        or cache[1] is not buffers["scale"]
        or cache[2] is not buffers["zero_point"]
    ):
        return False
    if len(cache) > 3:
        scale, zero_point, y_scale, y_zero_point = cache[6]
        if scale is not buffers["input_scale"] or zero_point is not buffers["input_zero_point"]:
            return False
        if (
            y_scale is not buffers["output_scale"]
            or y_zero_point is not buffers["output_zero_point"]
        ):
            return False
        versions = cache[7]
        if version(scale) != versions[0] or version(zero_point) != versions[1]:
            return False
        if y_scale is not None:
            return version(y_scale) == versions[2] and version(y_zero_point) == versions[3]
    return True
