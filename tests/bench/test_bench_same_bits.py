"""bench.same_bits: the command's JSON beside that of other sets, threads and batches."""

from __future__ import annotations

import pytest

from bench import same_bits
from fq_kernels import supported_isas


def test_all_alike(tiny_path, capsys):
    arguments = ["-m", str(tiny_path), "--threads", "1", "2", "-b", "7", "512", "-c", "64", "--chunks", "1"]
    assert same_bits.main(arguments) == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(f"| {tiny_path}")]
    slow = sum(isa in ("scalar", "sse2") for isa in supported_isas())
    assert len(rows) == slow + 5 * (len(supported_isas()) - slow)
    assert len({row[-1] for row in rows}) == 1 and out.endswith("the same in all\n")


def test_one_that_is_not(tiny_path, capsys, monkeypatch):
    real = same_bits.digest
    monkeypatch.setattr(
        same_bits, "digest", lambda case, *given: real(case._replace(chunks=1), *given) + str(case.threads)
    )
    assert (
        same_bits.main(
            [
                "-m",
                str(tiny_path),
                "--threads",
                "1",
                "2",
                "-b",
                "64",
                "-c",
                "64",
                "--isa",
                supported_isas()[-1],
            ]
        )
        == 1
    )
    assert f"not the same: {tiny_path}, 2 chunks" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        same_bits.main(["--isa", "vax"])
    assert "not vax" in capsys.readouterr().err
    assert same_bits.main(["-m", str(tmp_path / "none.gguf"), "--isa", supported_isas()[-1]]) == 2
    assert "none.gguf" in capsys.readouterr().err
