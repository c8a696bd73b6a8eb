"""``torch.ao.nn.quantized``, as far as it is about Linear layers: its names, gathered.

``LinearReLU`` is of ``torch.ao.nn.intrinsic.quantized``.
"""

from . import dynamic, functional
from .modules import Linear, LinearPackedParams, LinearReLU

__all__ = ["Linear", "LinearPackedParams", "LinearReLU", "dynamic", "functional"]
