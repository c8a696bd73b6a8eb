"""torch's names for quantized Linear layers, as long as code still calls them.

The same arguments and results as in torch, with :class:`zeropoint.QTensor` in the place of torch's
quantized tensors (which are taken too). Old line and new line side by side: docs/migration.md.

=======================================  ====================================
torch                                    here
=======================================  ====================================
``torch.quantize_per_tensor``            ``compat.quantize_per_tensor``
``torch.quantize_per_channel``           ``compat.quantize_per_channel``
``torch.ops.quantized``                  ``compat.ops``
``torch.ao.nn.quantized``                ``compat.quantized``
``torch.ao.nn.quantized.functional``     ``compat.quantized.functional``
``torch.ao.nn.quantized.dynamic``        ``compat.quantized.dynamic``
``torch.ao.quantization``                ``compat`` (``quantize_dynamic``)
=======================================  ====================================
"""

from ..affine import quantize_per_channel, quantize_per_tensor
from . import ops, quantized
from .convert import quantize_dynamic

__all__ = [
    "ops",
    "quantize_dynamic",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantized",
]
