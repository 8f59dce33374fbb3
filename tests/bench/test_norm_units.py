"""bench.norm_units and bench.torch_norms: their tables of a tiny model."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tiny_models import TINY, write_tiny

from bench import norm_units, torch_norms


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("units") / "tiny.gguf", TINY["gemma3"])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Words of a text, and more of them. " * 80)
    return path


def test_a_row_for_each_step(path, text, capsys):
    assert norm_units.main(["-m", str(path), "-f", str(text), "--chunks", "4", "-c", "24"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match(r"\| [a-z1BoifatA].*`", line)]
    assert len(rows) == len(norm_units.STEPS) + len(norm_units.PLUS_ONE) + 1
    assert re.search(
        r"\| BF16 accumulator, one after the other \| `acc=bf16` \| \d\.\d\de[-+]\d\d \| \d", out
    )


def test_each_profile_beside_each(path, text, capsys):
    args = ["-m", str(path), "-f", str(text), "--chunks", "4", "-c", "24", "--profiles"]
    assert norm_units.main(args) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(norm_units.PROFILES)
    assert all(row[1 + i].strip(" |") == "0" for i, row in enumerate(rows)), "each from itself"


def test_what_differs_from_torch_is_counted_in_places():
    a = np.array([[0x3F80, 0xBF80, 0x0000]], np.uint16)
    tally = torch_norms.Tally()
    tally.add(a, np.array([[0x3F81, 0xBF7E, 0x8000]], np.uint16))
    assert (tally.rows, tally.elements, tally.different, tally.most) == (1, 3, 3, 2)
