"""Numbers as a person reads them."""

import pytest

from tasks.report.numbers import count, duration, percent, share, size, whole


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (12, "12"),
        (9_999, "9,999"),
        (0.25, "0.25"),
        (2060.4, "2,060"),
        (12_345, "12.3 k"),
        (999_999, "1.00 M"),
        (1_234_567, "1.23 M"),
    ],
)
def test_counts_have_three_digits_and_a_unit(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4_512_000, "4.51 MB"), (9_999_999, "10.0 MB"), (30_000_000_000, "30.0 GB")],
)
def test_sizes_are_in_powers_of_ten(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (9.999, "10.00 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_shares_never_hide_what_is_there() -> None:
    assert [share(0, 10), share(1, 10_000), share(1, 8), share(3, 0)] == ["0.0%", "<0.1%", "12.5%", "–"]
    assert percent(0.873) == "87.3%"
    assert whole(1_234_567) == "1,234,567"
