"""Models that ``torch.ao.quantization`` made, moved into a checkpoint of zeropoint's.

Read are state dicts and whole models of ``torch.save`` and archives of ``torch.jit.save``, without
torch's quantized tensors or operators and without running anything that a file says. See
docs/rescue.md for what a file can and cannot tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import QuantizedLinear
from . import header as _header
from .assembled import without_twins, write_checkpoint
from .container import CheckpointError
from .header import LayerInfo, qualified
from .rescue_report import RescuedLayer, RescueReport
from .torch_archive import open_archive
from .torch_modules import living_state, read_state
from .torch_parity import compare_outputs, same_integers, torchs_reading
from .torch_state import Qparams, TorchLinear, TorchState

__all__ = [
    "CheckpointError",
    "RescueReport",
    "RescuedLayer",
    "TorchLinear",
    "TorchState",
    "observe_inputs",
    "read",
    "rescue",
]

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Any]
Inputs = Mapping[str, str | Qparams | list[Any]] | str | None


def read(source: Source, *, key: str | None = None) -> TorchState:
    """What a file, model or state dict of ``torch.ao.quantization`` holds.

    Args:
        source: a file of ``torch.save`` or ``torch.jit.save``; or a living model or state dict.
        key: where a file holds a dictionary of several things, the one to read.

    Raises:
        CheckpointError: the file is damaged, tries to call what such files do not, or holds
            neither a state dict nor a model.
        TypeError, ValueError: a living source whose contents do not fit.
        OSError: the file cannot be opened or read.
    """
    if isinstance(source, nn.Module | Mapping):
        if key is not None:
            raise ValueError(f"key is for files, got {key!r} with a {type(source).__name__}")
        return living_state(source)
    with open_archive(source) as archive:
        return read_state(archive, key)


def rescue(
    source: Source,
    path_out: str | os.PathLike[str],
    *,
    inputs: Inputs = None,
    no_bias: str | Iterable[str] = (),
    key: str | None = None,
    compare: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> RescueReport:
    """Write what torch quantized as a checkpoint that :func:`zeropoint.load` puts into the float
    architecture.

    Linear layers keep their integers, scales, zero points and bias. Dynamic ones become dynamic
    layers of zeropoint's, static ones static layers. Plain tensors are kept as they are; weights of
    other quantized layers become the floats they stand for; the rest is left and named in the
    report.

    A static layer needs to know scale and zero point of its input, which belong to whatever comes
    before it. A file says so only where torch traced the model (FX) and quantizes right before the
    layer, or where there is only one candidate. Elsewhere ``inputs`` says:

    * a mapping from layer to the module whose output it takes (``{"fc2": "fc1"}``), to
      ``(scale, zero_point)``, or to ``"dynamic"``; ``"*"`` for the layers it does not name;
    * ``"order"``: each layer takes the output of what stands before it in the file, which is
      right for a plain chain of layers and wrong where the model branches;
    * ``"dynamic"``: layers whose input the file does not tell quantize it on the fly.

    :func:`observe_inputs` finds the mapping by running the old model once.

    Args:
        source: as :func:`read`.
        path_out: the checkpoint, written atomically.
        inputs: see above.
        no_bias: glob patterns of layers whose bias of zeros is none: torch's qnnpack writes one
            for a layer without.
        key: as :func:`read`.
        compare: compare integers with torch's own reading of the file and outputs with torch's
            operators, as far as the installed torch can.
        metadata: strings of your own to keep in the checkpoint's header.

    Returns:
        What was done, layer by layer, and what the comparison gave.

    Raises:
        CheckpointError: as :func:`read`; no quantized Linear layer; a static layer whose input is
            unknown; values that a checkpoint cannot hold. No file is written.
        ValueError: ``inputs`` or ``no_bias`` name what is not there.
        OSError: the file system's.

    >>> import tempfile, zeropoint
    >>> from zeropoint.formats.torch_state import Packed
    >>> packed = Packed(zeropoint.QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5), None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/rescued.safetensors"
    ...     report = rescue({"_packed_params._packed_params": packed}, path)
    ...     layer = zeropoint.load(path, nn.Linear(3, 2, bias=False))
    >>> layer(torch.tensor([1.0, 2.0, 3.0]))
    tensor([3., 3.])
    """
    state = read(source, key=key)
    origin = Path(path_out if isinstance(source, nn.Module | Mapping) else source)
    _header.check_metadata(path_out, metadata)
    if not state.layers:
        raise CheckpointError(origin, _why_nothing(state))
    chosen = _choose_inputs(origin, state, inputs)
    biases = _choose_biases(state, no_bias)
    theirs = None
    if compare and not isinstance(source, nn.Module | Mapping) and state.kind == "state dict":
        theirs = torchs_reading(source, state.key)
    layers: dict[str, QuantizedLinear] = {}
    rows: list[RescuedLayer] = []
    for name, layer in state.layers.items():
        qparams, told = chosen.get(name, (None, ""))
        layers[name] = new = _build(origin, name, layer, biases[name], qparams)
        rows.append(
            RescuedLayer(
                name=name,
                torch_kind=_kind(layer),
                mode=new.mode,
                in_features=new.in_features,
                out_features=new.out_features,
                granularity="per tensor" if layer.weight.axis is None else "per channel",
                bias=new.bias is not None,
                input=told,
                integers_equal=same_integers(layer, theirs.layers.get(name)) if theirs else None,
                outputs=compare_outputs(layer, qparams, seed=len(rows)) if compare else None,
            )
        )
    _write(path_out, layers, state.tensors, metadata)
    return RescueReport(
        path=Path(path_out),
        kind=state.kind,
        layers=tuple(rows),
        tensors=tuple(state.tensors),
        dequantized=state.dequantized,
        left=state.left,
        zero_biases=_zero_biases(layers),
        compared=compare,
    )


def observe_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Qparams]:
    """Run a living model of torch's once and note scale and zero point of each Linear layer's
    input, for :func:`rescue`.

    Args:
        model: static, converted, of ``torch.ao.quantization``; torch must still have its operators.
        args, kwargs: what the model is called with.

    Returns:
        Name of a layer → scale and zero point.
    """
    found: dict[str, Qparams] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if isinstance(x, Tensor) and x.is_quantized:
                found[name] = (x.q_scale(), x.q_zero_point())

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "_packed_params") and hasattr(module, "in_features")
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _choose_inputs(
    path: Path, state: TorchState, inputs: Inputs
) -> dict[str, tuple[Qparams | None, str]]:
    """Scale and zero point of each static layer's input, and how they are known; ``None`` for
    layers that become dynamic."""
    given = dict(inputs) if isinstance(inputs, Mapping) else {}
    static = [name for name, layer in state.layers.items() if layer.output is not None]
    chosen: dict[str, tuple[Qparams | None, str]] = {}
    default = given.pop("*", None) if isinstance(inputs, Mapping) else inputs
    if default not in (None, "order", "dynamic"):
        raise ValueError(f"inputs must be 'order', 'dynamic' or a mapping, got {default!r}")
    for name in given:
        if name not in static:
            raise ValueError(f"inputs: {name!r} is no static layer; those are {', '.join(static)}")
    unknown = []
    for name in static:
        before = _before(state, name)
        others = [source for source in state.qparams if source != name]
        if name in given:
            chosen[name] = _given(state, name, given[name])
        elif name in state.inputs:
            chosen[name] = (state.inputs[name], "named in the file")
        elif len(others) == 1 and others[0] not in state.layers:
            chosen[name] = (state.qparams[others[0]], f"of {others[0]}, the only one")
        elif default == "order" and before is not None:
            chosen[name] = (state.qparams[before], f"of {before}, by order")
        elif default == "dynamic":
            chosen[name] = (None, "on the fly")
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(path, _unknown(state, unknown, default))
    return chosen


def _unknown(state: TorchState, layers: list[str], default: str | None) -> str:
    names = ", ".join(layers[:4]) + (", …" if len(layers) > 4 else "")
    if default == "order":
        source = next((s for s in state.qparams if s not in state.layers), "quant")
        return (
            f"nothing whose output scale is known stands before {names} in the file. Give inputs a "
            f"mapping for it, such as {{{layers[0]!r}: {source!r}, '*': 'order'}}"
        )
    before = _before(state, layers[0])
    return (
        f"the file does not say what scale the input of a static layer has ({names}). Say "
        "inputs='order' where each layer takes the output of what stands before it in the file"
        + (f" ({layers[0]} that of {before})" if before is not None else "")
        + ", inputs='dynamic' to quantize on the fly, or give a mapping from layer to module"
    )


def _before(state: TorchState, name: str) -> str | None:
    """The last module before a layer, in the file's order, whose output scale is known."""
    last = None
    for source in state.qparams:
        if source == name:
            return last
        last = source
    return None


def _given(state: TorchState, name: str, value: Any) -> tuple[Qparams | None, str]:
    if value == "dynamic":
        return None, "on the fly"
    if isinstance(value, str):
        if value not in state.qparams:
            raise ValueError(
                f"inputs: the file has no output scale of {value!r} (for {name!r}); it has those "
                f"of {', '.join(state.qparams)}"
            )
        return state.qparams[value], f"of {value}, as given"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"inputs: {name!r} must have a module or (scale, zero_point): {value!r}")
    scale, zero_point = value
    if type(scale) not in (float, int) or type(zero_point) is not int:
        raise ValueError(f"inputs: {name!r} must have a float and an int, got {value!r}")
    return (float(scale), zero_point), "as given"


def _choose_biases(state: TorchState, no_bias: str | Iterable[str]) -> dict[str, Tensor | None]:
    patterns = [no_bias] if isinstance(no_bias, str) else list(no_bias)
    biases = {name: layer.bias for name, layer in state.layers.items()}
    for pattern in patterns:
        matching = [name for name in biases if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"no_bias: {pattern!r} matches no quantized Linear layer")
        for name in matching:
            bias = state.layers[name].bias
            if bias is not None and bool(bias.any()):
                raise ValueError(f"no_bias: the bias of {name!r} is not zero")
            biases[name] = None
    return biases


def _build(
    path: Path, name: str, layer: TorchLinear, bias: Tensor | None, input: Qparams | None
) -> QuantizedLinear:
    try:
        if layer.output is None or input is None:
            return QuantizedLinear.from_quantized(layer.weight, bias, "dynamic")
        return QuantizedLinear.from_quantized(layer.weight, bias, "static", input, layer.output)
    except ValueError as error:
        raise CheckpointError(path, str(error), name) from None


def _kind(layer: TorchLinear) -> str:
    kind = "dynamic" if layer.is_dynamic else "static"
    return f"{kind}, ReLU fused" if layer.relu else kind


def _zero_biases(layers: Mapping[str, QuantizedLinear]) -> tuple[str, ...]:
    return tuple(
        name
        for name, layer in layers.items()
        if layer.bias is not None and layer.bias.numel() and not bool(layer.bias.any())
    )


def _why_nothing(state: TorchState) -> str:
    names = [*state.tensors, *state.left]
    if any("activation_post_process" in n or "fake_quant" in n for n in names):
        return "it holds observers, not integers: torch.ao.quantization.convert was not called"
    return "it holds no quantized Linear layer"


def _write(
    path: str | os.PathLike[str],
    layers: Mapping[str, QuantizedLinear],
    plain: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
) -> None:
    held: dict[str, Tensor] = dict(plain)
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            held[qualified(name, key)] = tensor
    tensors, aliases = without_twins(path, held)
    infos = {name: LayerInfo.of(layer) for name, layer in layers.items()}
    write_checkpoint(path, tensors, aliases, infos, metadata)
