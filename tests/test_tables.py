"""What the verbs show to people."""

from moekit.tables import short


def test_short_numbers_have_two_decimals_and_a_unit() -> None:
    counts = (0, 7, 999, 1600, 999_999, 5_677_536, 16_375_728_128, 2057.5e12)
    assert [short(count) for count in counts] == ["0", "7", "999", "1.60K", "1.00M", "5.68M", "16.38B", "2,057.50T"]
