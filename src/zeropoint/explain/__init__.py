"""What one scale and one zero point do to given values, or to a layer's weights.

Numbers first (``numbers``, taken by ``measure``), then what is made of them: a table and a number
line in the terminal (``text``), a picture (``plot``).
"""

from .measure import explain
from .numbers import SHOWN, Explanation, Grid, Totals, Value

__all__ = ["SHOWN", "Explanation", "Grid", "Totals", "Value", "explain"]
