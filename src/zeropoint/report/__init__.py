"""What quantization cost a model.

Numbers first (``numbers``, taken by ``measure``, ``sums`` and ``timing``), then what is made of
them: terminal table (``table``), JSON (``schema.json`` describes it), HTML (``page`` and
``sections``, ``plots`` and ``pictures``, ``templates``).
"""

from ..running import model_bytes
from .as_json import SCHEMA_VERSION, schema
from .measure import compare
from .numbers import (
    Difference,
    Environment,
    Grid,
    Histogram,
    Integers,
    Latency,
    LayerReport,
    Metric,
    Outputs,
    Report,
    Timing,
)

__all__ = [
    "SCHEMA_VERSION",
    "Difference",
    "Environment",
    "Grid",
    "Histogram",
    "Integers",
    "Latency",
    "LayerReport",
    "Metric",
    "Outputs",
    "Report",
    "Timing",
    "compare",
    "model_bytes",
    "schema",
]
