"""The noise control: the error's length in each row, and nothing else of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_cli import fq

from fq_kernels import get_format
from model import FqError
from model.noise import noise_format


@pytest.mark.parametrize("spec", ["bf16", "int4"])
def test_each_row_has_the_error_of_the_format(spec):
    x = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)
    x[7] = 0  # which every format keeps
    x[8, 3] = np.nan
    rounding = get_format(spec).quantise(x).values - x
    noise = get_format(noise_format(spec)).quantise(x).values - x
    assert not noise[7].any()
    assert np.isnan(noise[8]).any()
    rows = np.delete(np.arange(40), [7, 8])
    lengths = np.linalg.norm(noise, axis=1), np.linalg.norm(rounding, axis=1)
    np.testing.assert_allclose(lengths[0][rows], lengths[1][rows], rtol=1e-3)
    # not the rounding's direction, and not another row's
    directions = [e[rows] / length[rows, None] for e, length in zip((noise, rounding), lengths, strict=True)]
    assert abs((directions[0] * directions[1]).sum(axis=1)).max() < 0.25
    assert abs(directions[0] @ directions[0].T - np.eye(len(rows))).max() < 0.25


def test_a_rows_noise_is_its_own():
    fmt = get_format(noise_format("bf16"))
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    whole = fmt.quantise(x).values
    for i in (8, 0, 3):
        assert fmt.quantise(x[i : i + 1]).values.tobytes() == whole[i].tobytes()


@pytest.mark.parametrize("spec", ["bf16:truncate", "noise_bf16"])
def test_formats_without_a_noise(spec):
    noise_format("bf16")
    with pytest.raises(FqError, match="for formats without options"):
        noise_format(spec)


def test_the_command_and_what_it_keeps(tiny_path, tmp_path):
    store = tmp_path / "store.sqlite"
    sweep = ["sweep", "-m", tiny_path, "-c", 32, "--chunks", 2, "--noise", "--store", store]
    data = json.loads(fq(*sweep, "--json", "-")[0])
    rounded, noise = data["groups"]
    assert (rounded["name"], noise["name"]) == ("ffn_norm[*].raw=bf16", "ffn_norm[*].raw=noise_bf16")
    assert 0.1 < noise["kld_together"] / rounded["kld_together"] < 10
    cells = {cell["name"]: cell["sites"] for cell in data["cells"]}
    (a,), (b,) = cells["ffn_norm[0].raw=bf16"], cells["ffn_norm[0].raw=noise_bf16"]
    assert b["sqnr_db"] == pytest.approx(a["sqnr_db"], abs=0.01)
    assert json.loads(fq("results", 1, "--store", store, "--json", "-")[0]) == data
