"""The table of formats' speeds: a row for each, and which have a counterpart."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

from bench import casts
from fq_kernels import get_format


def test_a_row_for_each_format(capsys):
    names = ["bf16", "int8", "fp4_e2m1"]
    options = [word for name in names for word in ("--format", name)]
    assert casts.main([*options, "--rounds", "2", "--turn", "1e-5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "`" in line]
    assert [row[0] for row in rows] == [f"`{name}`" for name in names]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[5]) > 0 for row in rows)
    assert [bool(row[3]) for row in rows] == [True, False, True]


@pytest.mark.parametrize("name", [name for name, (theirs, _) in casts.FORMATS.items() if theirs])
def test_what_stands_beside_a_format_is_that_format(name):
    """On values that it does not cut, whose treatment casts differ in."""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    theirs = casts._ml_dtypes_cast(x, casts.FORMATS[name][0])()
    assert np.array_equal(theirs, get_format(name).quantise(x).values)
