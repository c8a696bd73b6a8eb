"""zeropoint: the Linear layer of a neural network, in float and in integers, for PyTorch."""

from . import functional
from .modules import Linear, QuantizedLinear
from .spec import (
    ACTIVATION_UINT8,
    WEIGHT_INT8,
    PerChannel,
    PerTensor,
    QuantSpec,
)
from .tensor import (
    QTensor,
    choose_qparams,
    quantize_per_channel,
    quantize_per_tensor,
    quantize_to_spec,
)

__all__ = [
    "ACTIVATION_UINT8",
    "WEIGHT_INT8",
    "Linear",
    "PerChannel",
    "PerTensor",
    "QTensor",
    "QuantSpec",
    "QuantizedLinear",
    "choose_qparams",
    "functional",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_to_spec",
]
