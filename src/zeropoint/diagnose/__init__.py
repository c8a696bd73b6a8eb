"""Which layers lose what under quantization, why, and what mends it.

Numbers first (``numbers``); everything else takes them or shows them.
"""

from .numbers import (
    SCHEMA_VERSION,
    Cause,
    Damage,
    Diagnosis,
    ErrorSplit,
    LayerDiagnosis,
    MetricChange,
    OutlierChannel,
    Saturation,
    Trial,
    schema,
)

__all__ = [
    "SCHEMA_VERSION",
    "Cause",
    "Damage",
    "Diagnosis",
    "ErrorSplit",
    "LayerDiagnosis",
    "MetricChange",
    "OutlierChannel",
    "Saturation",
    "Trial",
    "schema",
]
