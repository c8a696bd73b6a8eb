"""``PackedLinear``: a float Linear layer for inference, its weight laid out for the hardware."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import functional
from .float_linear import Linear
from .kernels import PackedWeight
from .packings import version
from .recording import record

PACKED_DTYPES = (torch.float32, torch.bfloat16)
"""Of weights that can be packed."""


class PackedLinear(nn.Module):
    """``y = x Aᵀ + b`` in float32 or bfloat16, with nothing lost and only the packed weight held.

    The sum over the inputs is one chain of fused multiply-adds in float32, then the bias is added:
    the same bits on every machine (:func:`zeropoint.reference.linear_float`), as near to the exact
    sum as torch's own layer, whose order of summation varies. The output has the input's dtype.

    ``state_dict()`` holds ``weight`` and ``bias`` as ``nn.Linear``'s does, and
    ``load_state_dict`` packs what it is given. ``weight`` and every ``state_dict()`` are unpacked
    copies, made when they are read: writing to them changes nothing, and reading takes the time and
    memory of a copy. The bias is a buffer. Copies of the layer share the packed weight.

    ``.to(torch.float32)`` and ``.to(torch.bfloat16)`` convert the weight and pack it again; other
    floating-point types are refused. Gradients reach the input, by way of an unpacked copy. On
    devices other than the CPU the weight is held plain, and the reference computes.

    Args:
        in_features, out_features: as :class:`zeropoint.Linear`.
        bias: whether there is a bias.
        device: of the weight and bias.
        dtype: float32 or bfloat16; by default torch's default dtype.

    The weight starts as zeros; :meth:`from_linear` or ``load_state_dict`` fills it.

    Raises:
        TypeError: another dtype.

    >>> linear = nn.Linear(3, 2)
    >>> layer = PackedLinear.from_linear(linear)
    >>> layer
    PackedLinear(in_features=3, out_features=2, bias=True, dtype=torch.float32)
    >>> bool((layer.weight == linear.weight).all())
    True
    """

    __constants__ = ["in_features", "out_features"]
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        weight = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        self._hold(weight, weight.new_zeros(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, share: PackedLinear | None = None) -> PackedLinear:
        """Pack a float layer.

        Args:
            linear: any ``nn.Linear``; it is not changed.
            share: a layer made of the same weight, whose packing this one is to use.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or its weight of another dtype.
            ValueError: ``share`` holds a weight of another shape or dtype.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if share is None:
            layer._hold(linear.weight.detach(), bias)
        else:
            held, weight = share._bare, linear.weight
            if held.shape != weight.shape or held.dtype != weight.dtype:
                raise ValueError(
                    f"share must hold a weight of shape {tuple(weight.shape)} and {weight.dtype}, "
                    f"got {tuple(held.shape)} and {held.dtype}"
                )
            layer._hold(held, bias)
        return layer.train(linear.training)

    def _hold(self, weight: Tensor | PackedWeight, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._pack(weight)
        self.register_buffer("bias", bias)
        self._rebias()

    def _pack(self, weight: Tensor | PackedWeight) -> None:
        if weight.dtype not in PACKED_DTYPES:
            raise TypeError(
                f"a packed weight must be torch.float32 or torch.bfloat16, got {weight.dtype}; "
                "unpack() the layer first"
            )
        if isinstance(weight, Tensor):
            packed = PackedWeight(weight)
            # Where it cannot be packed it must at least not be the caller's tensor.
            weight = packed if packed.is_packed else PackedWeight(weight.clone())
        self._bare = weight  # without bias; compiled code knows it by its handle

    def _rebias(self) -> PackedWeight:
        """Put the bias beside the weight, as float32, which the kernels read."""
        bias = self._buffers["bias"]
        self._bias_seen = (bias, version(bias))
        self._held = self._bare.with_bias(None if bias is None else bias.to(torch.float32))
        return self._held

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` → ``(*, out_features)``, of ``input``'s dtype."""
        if is_dynamo_compiling():
            return record("linear_float", input, self._bare, self.bias, (), None, None)
        seen, bias = self._bias_seen, self._buffers["bias"]
        packed = self._held
        if seen[0] is not bias or seen[1] != version(bias):
            packed = self._rebias()
        return functional.linear(input, packed)  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """``(out_features, in_features)``: an unpacked copy, made at each reading."""
        weight, _ = self._held.unpack()
        assert isinstance(weight, Tensor)
        return weight if self._held.is_packed else weight.clone()

    @property
    def packed_bytes(self) -> int:
        """Of the packed weight, padding included; 0 where it is held plain."""
        return self._bare.nbytes

    @property
    def packing(self) -> int:
        """A number that living layers have in common if they use one packed weight."""
        return id(self._bare._packed if self._bare.is_packed else self._bare._plain)

    def unpack(self, weight: nn.Parameter | None = None) -> Linear:
        """The layer this one was packed from: a trainable :class:`zeropoint.Linear`, same bits.

        Args:
            weight: the unpacked weight, where another layer that shares it was unpacked before.
        """
        # skip_init: drawing numbers only to overwrite them would move the caller's generator.
        linear = nn.utils.skip_init(
            Linear, self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight) if weight is None else weight
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self._held.dtype}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        # What a conversion would do to the weight shows on an empty tensor; only then is it done.
        held = self._held
        device = torch.device("cpu") if held.is_packed else self.weight.device
        probe = fn(torch.empty(0, dtype=held.dtype, device=device))
        if probe.dtype != held.dtype or probe.device != device:
            self._pack(fn(self.weight))
        super()._apply(fn, recurse)
        self._rebias()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        # For as long as it takes the weight is a buffer, so that torch's own rules hold for it.
        weight = self.weight
        before = version(weight)
        self._buffers["weight"] = weight
        try:
            super()._load_from_state_dict(*args)
        finally:
            loaded = self._buffers.pop("weight")
        if loaded is not None and (loaded is not weight or version(weight) in (-1, before + 1)):
            self._pack(loaded.detach())
        self._rebias()
