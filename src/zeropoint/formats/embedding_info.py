"""The entry of an embedding table in a checkpoint's table of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..embedding import OUTPUT_DTYPES, QuantizedEmbedding
from .weight_entry import (
    MAX_SIZE,
    SCALE_DTYPE_OF,
    Fail,
    weight_from_dict,
    weight_tensors,
    weight_to_dict,
)

KIND = "embedding"
"""What an entry has under ``kind``. Those of Linear layers have no such key."""

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in OUTPUT_DTYPES
}


@dataclass(frozen=True)
class EmbeddingInfo:
    """One entry of the layer table: what to build for a quantized embedding.

    Attributes:
        num_embeddings, embedding_dim: of the table.
        dtype: of its rows as they come out: ``"float32"``, ``"bfloat16"``, ``"float16"`` or
            ``"float64"``.
        bits: width of its integers, 2 to 8.
        group_size: entries of a row that share a scale; ``None`` means one scale a row.
        scale_dtype: of the scales of groups: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """

    num_embeddings: int
    embedding_dim: int
    dtype: str = "float32"
    bits: int = 8
    group_size: int | None = None
    scale_dtype: str = "float32"

    @classmethod
    def of(cls, table: QuantizedEmbedding) -> EmbeddingInfo:
        """The entry of an existing table."""
        return cls(
            table.num_embeddings,
            table.embedding_dim,
            str(table.output_dtype).removeprefix("torch."),
            table.bits,
            table.group_size,
            str(table.scale_dtype).removeprefix("torch."),
        )

    @property
    def columns(self) -> int:
        """Integers in a row of the weight."""
        return self.embedding_dim

    def build(self, device: Any) -> QuantizedEmbedding:
        """A table by this entry, its integers zero."""
        return QuantizedEmbedding(
            self.num_embeddings,
            self.embedding_dim,
            None,  # a model's, which no lookup asks for
            device,
            _DTYPES[self.dtype],
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=SCALE_DTYPE_OF[self.scale_dtype],
        )

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype and shape of each of the table's tensors, by their names within it."""
        size = self.num_embeddings, self.embedding_dim
        return weight_tensors(*size, self.bits, self.group_size, self.scale_dtype)

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON holds it."""
        return {
            "kind": KIND,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "dtype": self.dtype,
            "weight": weight_to_dict(self.bits, self.group_size, self.scale_dtype),
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any], version: str, fail: Fail) -> EmbeddingInfo:
        """The inverse of :meth:`to_dict`, of an entry that has a ``kind``.

        Raises:
            CheckpointError: it is no entry of an embedding, or in a version without such.
        """
        if version in ("1", "2") or entry["kind"] != KIND:
            raise fail(f"kind must be {KIND!r}, from version 3 on, or be left out")
        expected = {"kind", "num_embeddings", "embedding_dim", "dtype", "weight"}
        if set(entry) != expected:
            raise fail(f"the entry must have exactly the keys {', '.join(sorted(expected))}")
        sizes = {key: entry[key] for key in ("num_embeddings", "embedding_dim")}
        for key, size in sizes.items():
            if type(size) is not int or not 0 <= size < MAX_SIZE:
                raise fail(f"{key} must be an integer from 0, got {str(size)[:40]!r}")
        dtype = entry["dtype"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise fail(f"dtype must be one of {', '.join(_DTYPES)}, got {str(dtype)[:40]!r}")
        return cls(**sizes, dtype=dtype, **weight_from_dict(entry["weight"], fail))
