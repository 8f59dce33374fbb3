"""Shares of a sweep: together they are all of it, none twice, and they are of one size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq import FqError
from fq.measure.share import Share

SIZES = st.integers(1, 40)


@given(SIZES, SIZES, SIZES)
def test_shares_are_all_of_it(n_cells, n_chunks, n):
    parts = [
        [(chunk, cell) for chunk in range(n_chunks) for cell in Share(i, n).cells(chunk, n_cells, n_chunks)]
        for i in range(1, n + 1)
    ]
    assert list(itertools.chain(*parts)) == [
        (chunk, cell) for chunk in range(n_chunks) for cell in range(n_cells)
    ]
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    # whole chunks, but for the first and the last
    for part in parts:
        cut = [c for c in {chunk for chunk, _ in part} if sum(chunk == c for chunk, _ in part) < n_cells]
        assert len(cut) <= 2


def test_as_they_are_written():
    assert Share.parse("2/8") == Share(2, 8) and str(Share(2, 8)) == "2/8"
    assert Share().cells(3, 5, 9) == range(5)


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1/99999999", "٢/٨"])
def test_what_is_no_share(text):
    with pytest.raises(FqError, match="a shard is i/n"):
        Share.parse(text)
