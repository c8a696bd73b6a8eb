"""Which layers lose what under quantization, why, and what mends it.

Numbers first (``numbers``); everything else takes them or shows them.
"""

from .as_json import schema
from .measure import BUDGET, diagnose
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
)

__all__ = [
    "BUDGET",
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
    "diagnose",
    "schema",
]
