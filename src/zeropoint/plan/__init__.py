"""``plan``: time a model's Linear layers in every form on this machine, and say which to use."""

from .measure import plan
from .numbers import Plan, ShapePlan, Time
from .rule import FORMS, MARGIN, MODES, choose

__all__ = ["FORMS", "MARGIN", "MODES", "Plan", "ShapePlan", "Time", "choose", "plan"]
