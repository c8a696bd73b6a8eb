"""zeropoint: the Linear layer of a neural network, in float and in integers, for PyTorch."""

from . import functional, ops
from .affine import (
    choose_qparams,
    quantize_per_channel,
    quantize_per_group,
    quantize_per_tensor,
    quantize_to_spec,
)
from .diagnose import Diagnosis, diagnose
from .embedding import QuantizedEmbedding
from .explain import Explanation, explain
from .float_linear import Linear
from .formats.native import CheckpointError, load, quantize_file, save
from .formats.native import inspect as inspect_checkpoint
from .kernels import (
    PackedWeight,
    active_isa,
    available_isas,
    force_isa,
    prepack,
    unpack,
)
from .modules import QuantizedLinear
from .observers import (
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)
from .packed_linear import PackedLinear
from .plan import Plan, plan
from .prepack_model import PrepackingSummary, prepack_model, unpack_model
from .quantize import QuantizationSummary, quantize
from .quantize_folder import quantize_folder
from .recipes import RECIPES, LayerRecipe, Recipe, get_recipe
from .report import Report, compare
from .search import Front, search
from .spec import (
    ACTIVATION_UINT8,
    WEIGHT_INT4,
    WEIGHT_INT8,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    int4,
)
from .tensor import QTensor

__all__ = [
    "ACTIVATION_UINT8",
    "RECIPES",
    "WEIGHT_INT4",
    "WEIGHT_INT8",
    "CheckpointError",
    "Diagnosis",
    "EntropyObserver",
    "Explanation",
    "Front",
    "LayerRecipe",
    "Linear",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PackedLinear",
    "PackedWeight",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PercentileObserver",
    "Plan",
    "PrepackingSummary",
    "QTensor",
    "QuantSpec",
    "QuantizationSummary",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Recipe",
    "Report",
    "active_isa",
    "available_isas",
    "choose_qparams",
    "compare",
    "diagnose",
    "explain",
    "force_isa",
    "functional",
    "get_recipe",
    "inspect_checkpoint",
    "int4",
    "load",
    "ops",
    "plan",
    "prepack",
    "prepack_model",
    "quantize",
    "quantize_file",
    "quantize_folder",
    "quantize_per_channel",
    "quantize_per_group",
    "quantize_per_tensor",
    "quantize_to_spec",
    "save",
    "search",
    "unpack",
    "unpack_model",
]
