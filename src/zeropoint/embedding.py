"""``QuantizedEmbedding``: a table of integers, of which the rows asked for are dequantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import held_weight
from .affine import quantize_to_spec
from .packings import forget, shared_qtensor
from .saving import check_state_goes_elsewhere
from .spec import WEIGHT_INT8, QuantSpec
from .tensor import QTensor

OUTPUT_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
)
"""Types that rows may come out in."""


class QuantizedEmbedding(nn.Module):
    """An embedding table for inference whose rows are integers of 2 to 8 bits.

    A call gathers the rows that are asked for and dequantizes those: ``scale · (q − zero_point)``
    in float32, rounded once to the output dtype. The table is never unpacked. Plain torch
    operations, so that ``torch.compile`` and ``torch.export`` see through it.

    State is plain buffers, as of :class:`QuantizedLinear`: ``weight`` int8 ``(num_embeddings,
    embedding_dim)``, ``scale`` float32 and ``zero_point`` int32 ``(num_embeddings,)``. Below 8 bits
    the weight is unsigned and packed, uint8 ``(num_embeddings, ceil(embedding_dim · bits / 8))``
    (:mod:`zeropoint.codec`). Where groups along a row have scales of their own, ``scale`` and
    ``zero_point`` are ``(num_embeddings, groups)``, the one of ``scale_dtype``, the other int8, or
    uint8 below 8 bits. An output layer tied to the table may hold the same buffers.

    Rows come out in ``output_dtype``. A float table's dtype decides what follows it, since there is
    no float input to take it from; so ``.to(dtype)``, ``.half()`` and the like change
    ``output_dtype`` and nothing else: the scales stay as they are.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: entries of a row.
        padding_idx: kept for what reads it. It only keeps gradients away from a float row; here no
            row has one. A row of zeros, as padding usually is, comes out as exact zeros.
        device: of the buffers.
        output_dtype: float32, bfloat16, float16 or float64.
        bits: width of the integers, 2 to 8.
        group_size: entries along a row that share a scale; ``None`` means one scale a row.
        scale_dtype: of the scales of groups: float32, bfloat16 or float16.

    The integers start as zeros; :meth:`from_embedding` or ``load_state_dict`` fills them.

    Raises:
        TypeError: ``bits``, ``group_size``, ``scale_dtype`` or ``output_dtype`` of the wrong type.
        ValueError: a width, size or type that is not supported, ``padding_idx`` outside the table.

    >>> table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 4, padding_idx=0))
    >>> table
    QuantizedEmbedding(10, 4, padding_idx=0, bits=8)
    >>> table(torch.tensor([0, 0])).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """

    __constants__ = ["bits", "embedding_dim", "group_size", "num_embeddings", "padding_idx"]
    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        output_dtype: torch.dtype = torch.float32,
        *,
        bits: int = 8,
        group_size: int | None = None,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"padding_idx must be within the {num_embeddings} rows, got {padding_idx}"
                )
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.output_dtype = _checked(output_dtype)
        self.bits, self.group_size, self.scale_dtype = bits, group_size, scale_dtype
        size = num_embeddings, embedding_dim
        held = held_weight.buffers(*size, bits, group_size, scale_dtype)
        self._layout = held_weight.layout(*size, bits, group_size)
        for name, (shape, dtype) in held.items():
            fill = 1 if name == "scale" else 0
            self.register_buffer(name, torch.full(shape, fill, dtype=dtype, device=device))

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, spec: QuantSpec = WEIGHT_INT8
    ) -> QuantizedEmbedding:
        """Quantize a float table.

        Args:
            embedding: any ``nn.Embedding`` without ``max_norm``; it is not changed. ``sparse`` and
                ``scale_grad_by_freq`` are about gradients and have no meaning here.
            spec: how rows are quantized, by default int8, symmetric, one scale a row.

        Raises:
            TypeError: ``embedding`` is not an ``nn.Embedding``, or of a dtype without output.
            ValueError: ``max_norm``; NaN or Inf in the table; a spec along another axis.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}"
            )
        if embedding.max_norm is not None:
            raise ValueError(
                f"embedding must have no max_norm, got {embedding.max_norm}: looking a row up "
                "would change the table"
            )
        output_dtype = _checked(embedding.weight.dtype)
        weight = quantize_to_spec(embedding.weight, spec)
        return cls.from_quantized(weight, embedding.padding_idx, output_dtype)

    @classmethod
    def from_quantized(
        cls,
        weight: QTensor,
        padding_idx: int | None = None,
        output_dtype: torch.dtype = torch.float32,
    ) -> QuantizedEmbedding:
        """A table of rows that are quantized already.

        Args:
            weight: ``(num_embeddings, embedding_dim)``, per tensor, per group or per channel along
                axis 0. uint8 is stored as int8 with both integers and zero points lowered by 128;
                below 8 bits signed integers are stored as unsigned, both raised.
            padding_idx, output_dtype: see the class.

        Raises:
            TypeError, ValueError: as the class, or a shape or axis that does not fit.
        """
        held = held_weight.held(weight)
        num_embeddings, embedding_dim = weight.shape
        table = cls(
            num_embeddings,
            embedding_dim,
            padding_idx,
            weight.device,
            output_dtype,
            bits=weight.bits,
            group_size=weight.group_size,
            scale_dtype=weight.scale.dtype,
        )
        for name, value in held.items():
            getattr(table, name).copy_(value)
        return table.eval()

    def forward(self, input: Tensor) -> Tensor:
        """The rows at these indices, as ``nn.Embedding``.

        Args:
            input: int32 or int64 indices from 0 of any shape ``(*)``.

        Returns:
            ``(*, embedding_dim)`` in ``output_dtype``.

        Raises:
            IndexError: an index outside the table.
        """
        flat = input.reshape(-1)
        # torch's own lookup, which takes and refuses the indices that nn.Embedding does.
        codes = nn.functional.embedding(flat, self.weight)
        scale, zero_point = self.scale.index_select(0, flat), self.zero_point.index_select(0, flat)
        axis, layout = 0 if scale.ndim == 1 else None, self._layout
        if layout is not None:
            layout = layout._replace(shape=torch.Size((codes.shape[0], self.embedding_dim)))
        rows = QTensor._of(codes, scale, zero_point, axis, layout).dequantize()
        return rows.to(self.output_dtype).reshape(*input.shape, self.embedding_dim)

    def weight_qtensor(self) -> QTensor:
        """The table as a :class:`QTensor` that shares this layer's buffers, and with them one
        packing with an output layer that holds the same."""
        return shared_qtensor(self.weight, self.scale, self.zero_point, self._layout)

    def dequantize(self) -> nn.Embedding:
        """The float table these integers stand for, in ``output_dtype``, trainable."""
        with torch.no_grad():
            weight = self.weight_qtensor().dequantize().to(self.output_dtype)
        size = self.num_embeddings, self.embedding_dim
        table = nn.Embedding(*size, self.padding_idx, _weight=weight)
        return table.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}"
            + (f", padding_idx={self.padding_idx}" if self.padding_idx is not None else "")
            + f", bits={self.bits}"
            + (f", group_size={self.group_size}" if self.group_size is not None else "")
            + (f", {self.output_dtype}" if self.output_dtype != torch.float32 else "")
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        # What would have become of the float table tells where the rows go.
        probe = torch.empty(0, dtype=self.output_dtype, device=self.weight.device)
        output_dtype = _checked(fn(probe).dtype)
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.output_dtype = output_dtype
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        check_state_goes_elsewhere()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        forget(self.weight)


def _checked(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or dtype not in OUTPUT_DTYPES:
        names = ", ".join(str(d) for d in OUTPUT_DTYPES)
        raise TypeError(f"output_dtype (a float table's own) must be one of {names}, got {dtype}")
    return dtype
