"""bench.sites_table: sweeps of a store as rows of a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report_store import cells_for, layers, run_of, save

from bench import sites_table


def test_a_row_for_each_group_and_a_table_for_each_model(tmp_path, capsys):
    path = tmp_path / "s.sqlite"
    norms = [("ffn_norm", i) for i in range(3)]
    run = run_of(cells_for(layers(3), ("bf16", "int8")), norms, 8)

    def means(cell):
        """Layer 1 costs ten times what the others do."""
        return np.linspace(1, 1.1, 8) * (1e-5 if "[1]" in cell.name else 1.2e-5 if "*" in cell.name else 1e-6)

    save(path, run, means)
    save(path, replace(run, settings=run.settings | {"model": "other.gguf"}), means)
    assert sites_table.main(["--store", str(path), "--over", "int8", "bf16"]) == 0
    first, ratio, second, _ = capsys.readouterr().out.strip().split("\n\n")
    assert first.startswith("| m.gguf | all together |") and second.startswith("| other.gguf |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.split("\n")[2:]]
    assert [row[0] for row in rows] == ["`ffn_norm[*].raw=bf16`", "`ffn_norm[*].raw=int8`"]
    _, together, adds, middle, largest, shared = rows[0]
    costs = float(together.partition(" ")[0]), float(adds.partition(" ")[0]), float(middle)
    assert costs == pytest.approx((1.26e-5, 1.0, 1.1e-6), rel=1e-3)
    assert largest.startswith("layer 1: ") and shared == "layer 1"
    said = "- `ffn_norm[*].raw=int8` costs 1 times `ffn_norm[*].raw=bf16` ("
    assert ratio.startswith(said) and ratio.endswith("p = 1.0e+00)") and "\n" not in ratio
    short = tmp_path / "short.sqlite"
    save(short, replace(run, settings=run.settings | {"n_chunks_asked": 1, "chunk_indices": [0]}), means)
    assert sites_table.main(["--store", str(short)]) == 0 and "not resolved" in capsys.readouterr().out
    assert sites_table.main(["--store", str(tmp_path / "none")]) == 2
