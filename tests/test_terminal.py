"""What results look like in a terminal."""

from __future__ import annotations

import math

import pytest

from zeropoint.terminal import plain_text, seconds, size, table, three


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (999_499, "999 kB")],
        *[(999_500, "1.00 MB"), (22_700_000, "22.7 MB"), (2.5e12, "2500 GB")],
    ],
)
def test_sizes_at_the_borders_of_units(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "–"), (math.nan, "–"), (0.0, "0 µs"), (1e-6, "1.00 µs")],
        *[(999.4e-6, "999 µs"), (999.6e-6, "1.00 ms"), (0.9996, "1.00 s"), (123.4, "123 s")],
    ],
)
def test_times_at_the_borders_of_units(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_three_digits_without_exponent() -> None:
    assert [three(x) for x in (0, 0.0012345, -0.5, 12.34, 98765.0)] == [
        *("0", "0.00123", "-0.500", "12.3", "98765")
    ]


def test_a_title_is_no_markup_and_text_no_colour() -> None:
    made = table("[b]x[/b]")
    made.add_column("a wide column")
    made.add_row("[red]1[/red]")
    text = plain_text(made)
    assert "[b]x[/b]" in text
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.split("\n"))
