"""``save_pretrained`` of transformers must not write integers as if they were float weights.

It writes what ``state_dict`` gives it, whoever holds the layers. So a layer asked for its state
looks up the stack for a ``save_pretrained``, and at the model that it saves: nothing of
transformers is changed, and a layer need not know what it was put into.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

_REFUSED = (
    "save_pretrained must not write the integers of quantized layers as if they were float weights"
)
_METHOD = "zeropoint"  # of a model whose config.json says where the integers are


def pretrained_class() -> Any:
    """``transformers.PreTrainedModel``, or ``None`` where nobody has imported it: who has such a
    model has done that."""
    library = sys.modules.get("transformers.modeling_utils")
    return getattr(library, "PreTrainedModel", None)


def is_savable(model: nn.Module) -> bool:
    """Whether ``save_pretrained`` writes a table of quantized layers beside the integers."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return getattr(config, "quant_method", None) == _METHOD


def check_state_goes_elsewhere(savable: bool = True) -> None:
    """For layers of integers that are asked for their state.

    Args:
        savable: whether the table of quantized layers can name a layer of this kind.

    Raises:
        ValueError: ``save_pretrained`` asks, of a model without such a table.
    """
    pretrained = pretrained_class()
    if pretrained is None:
        return
    code = getattr(inspect.unwrap(pretrained.save_pretrained), "__code__", None)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return
    if not savable:
        raise ValueError(f"{_REFUSED}: with layers of zeropoint.compat, save model.state_dict()")
    if not is_savable(frame.f_locals["self"]):
        refuse()


def refuse(*args: Any, **kwargs: Any) -> None:
    """A model's ``save_pretrained`` until it is made savable."""
    raise ValueError(
        f"{_REFUSED}: call zeropoint.integrations.transformers.make_savable(model) first, or use "
        "zeropoint.save"
    )
