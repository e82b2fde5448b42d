"""The short form of tests/studies/fuzz.py: damaged files of every kind that is read."""

import pytest
from support import fuzz


@pytest.mark.parametrize("seed", [0, 1])
def test_a_damaged_file_gives_one_line_or_what_it_held(tmp_path, seed):
    """Or an image that is named as broken. Other data come back unnoticed only from formats
    without a checksum, which are listed."""
    tried, faults = fuzz.try_all(tmp_path, 40, seed)
    unexpected = [
        fault for fault in faults if not (fault[3] == "other data" and fault[:2] in fuzz.UNCHECKED)
    ]
    assert not unexpected
    for kind, found in tried.items():
        noticed = sum(count for (_, what), count in found.items() if what in ("one line", "named"))
        assert noticed > 8, kind  # the mutations do reach what is read
