"""The rule that chooses a layer's form: here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..modules import Mode

FORMS = ("float", "packed", "int8-weight-only", "int8-dynamic", "int8-static")
"""The forms of a Linear layer, those first that lose less: torch's float layer, the same packed
(nothing lost), weights rounded, weights and activations rounded row by row, and activations
rounded by a scale found beforehand, which needs calibration data."""
MARGIN = 0.05
"""By how much a form must be faster to count as faster."""
MODES: dict[str, Mode] = {
    "int8-weight-only": "weight-only",
    "int8-dynamic": "dynamic",
    "int8-static": "static",
}
"""Of the integer forms."""


def choose(
    times: Mapping[str, float], allow: Iterable[str] = FORMS, margin: float = MARGIN
) -> tuple[str, str]:
    """Of the forms within ``margin`` of the fastest, the one that loses least.

    So a form that loses more is used only where every form that loses less is slower by more than
    the margin: weight-only int8 where memory is what binds (few rows), dynamic int8 where
    arithmetic is (many rows), and nothing is ever made slower than it was.

    Args:
        times: form → its time, in any unit; forms that were not timed are missing.
        allow: forms that may be chosen, of :data:`FORMS`; ``"float"`` always may.
        margin: 0.05 is five percent.

    Returns:
        The form, and why, in words.

    Raises:
        ValueError: an unknown form, or no time for ``"float"``.

    >>> choose({"float": 100.0, "packed": 60.0, "int8-dynamic": 59.0})
    ('packed', '1.7 × as fast as float; within 5 % of int8-dynamic, and loses less')
    """
    allow = {"float", *allow}
    if unknown := [form for form in (*allow, *times) if form not in FORMS]:
        raise ValueError(f"forms are {', '.join(FORMS)}; got {unknown[0]!r}")
    if "float" not in times:
        raise ValueError(f"times must hold 'float', got {', '.join(times) or 'none'}")
    candidates = [form for form in FORMS if form in times and form in allow]
    fastest = min(candidates, key=lambda form: times[form])
    limit = times[fastest] * (1 + margin)
    choice = next(form for form in candidates if times[form] <= limit)
    ratio = times["float"] / times[choice]
    reason = f"{ratio:.1f} × as fast as float" if choice != "float" else ""
    if choice != fastest:
        near = f"within {margin * 100:.0f} % of {fastest}, and loses less"
        reason = f"{reason}; {near}" if reason else near
    elif choice == "float":
        reason = "nothing is faster"
    faster = [f for f in times if f not in allow and times[f] * (1 + margin) < times[choice]]
    if faster:
        best = min(faster, key=lambda form: times[form])
        reason += f"; {best}, {times[choice] / times[best]:.1f} × as fast, is not allowed"
    return choice, reason
