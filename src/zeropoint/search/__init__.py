"""``search``: what each layer should get, within a budget of accuracy, size or time.

``find`` tells the steps. Numbers first (``numbers``), taken by ``sensitivities``, ``cost`` and
``validate``; ``solve`` allocates, ``front`` makes points of allocations, ``budgets`` chooses among
them; ``table`` shows them, ``schema.json`` describes their JSON.
"""

from .find import CHOICES, search
from .numbers import (
    FLOAT,
    SCHEMA_VERSION,
    Budget,
    Check,
    Choice,
    Front,
    Group,
    Pair,
    Point,
    schema,
)

__all__ = [
    "CHOICES",
    "FLOAT",
    "SCHEMA_VERSION",
    "Budget",
    "Check",
    "Choice",
    "Front",
    "Group",
    "Pair",
    "Point",
    "schema",
    "search",
]
