"""The C++ core: load it, pack weights for it, call it.

The core knows no torch: it gets addresses, shapes and strides. Which instruction set computes is
decided once, at import: the best that this CPU and its operating system enable, or a lower one by
the environment variable ``ZEROPOINT_ISA`` or :func:`force_isa`. ``reference`` is the lowest: no
kernel at all. Every one of them returns the bits of :mod:`zeropoint.reference`.
"""

from torch._C import _len_torch_dispatch_stack as dispatch_modes

from .calls import linear_float, linear_integer, linear_quantized, packed_usable, usable
from .isas import (
    REFERENCE,
    activate_from_environment,
    active_isa,
    available_isas,
    core,
    core_error,
    force_isa,
)
from .shortcuts import quick, quick_integers, quick_transform
from .weights import PackedWeight, has_kernel, packed, packed_by_handle, prepack, unpack

__all__ = [
    "REFERENCE",
    "PackedWeight",
    "activate_from_environment",
    "active_isa",
    "available_isas",
    "core",
    "core_error",
    "dispatch_modes",
    "force_isa",
    "has_kernel",
    "linear_float",
    "linear_integer",
    "linear_quantized",
    "packed",
    "packed_by_handle",
    "packed_usable",
    "prepack",
    "quick",
    "quick_integers",
    "quick_transform",
    "unpack",
    "usable",
]
