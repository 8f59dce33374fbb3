"""What a sweep would take, by a clock of the test's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq

from fq import Results, Sweep
from fq.commands.sweep import forecast_text
from fq.measure.cells import cells_of
from fq.measure.forecast import forecast

N_CTX, N = 64, 4


@pytest.fixture
def sweep(tiny, executor):
    tokens = np.arange(N * N_CTX) * 5 % tiny.hparams.n_vocab
    cells = cells_of(tiny, ["*[*].raw"], ["bf16"])
    return Sweep(tiny, tokens, cells, n_ctx=N_CTX, executor=executor)


def ticking(run, each):
    """A clock that goes on by so much with each step."""
    now = [0.0]
    plain = Sweep.run

    def counted(self, chunk, cells):
        count = self.on_step
        self.on_step = lambda: (now.__setitem__(0, now[0] + each), count())
        try:
            yield from plain(self, chunk, cells)
        finally:
            self.on_step = count

    return now, counted


def test_the_time_is_that_of_all_steps(sweep, monkeypatch):
    now, counted = ticking(sweep, 0.25)
    monkeypatch.setattr(Sweep, "run", counted)
    steps, count = sweep.steps, sweep.on_step
    data = forecast(sweep, 1e9, lambda: now[0])
    assert data["steps"] == steps and data["step_seconds"] == pytest.approx(0.25)
    assert data["seconds"] == pytest.approx(0.25 * steps)
    assert data["chunks_of_cells"] == N * len(sweep.cells) and data["n_cells"] == len(sweep.cells)
    # and nothing is left of it
    assert sweep.steps == steps and sweep.finished == {} and sweep.on_step is count


def test_it_ends_in_time_within_a_cell(sweep, monkeypatch):
    now, counted = ticking(sweep, 2.0)
    monkeypatch.setattr(Sweep, "run", counted)
    data = forecast(sweep, 3.0, lambda: now[0])
    assert now[0] == 4.0 and data["step_seconds"] == pytest.approx(2.0) and data["store_bytes"] is None
    assert sweep.finished == {} and list(sweep)[-1] == (len(sweep.cells) - 1, N - 1)


def test_memory_and_store(sweep, tiny_path, tmp_path):
    data = forecast(sweep)
    assert data["memory_bytes"] == sum(sweep.memory) + (len(sweep.cells) - 1) * sweep.memory[1]
    assert data["model_bytes"] == tiny_path.stat().st_size
    # 31 scored tokens of three numbers and a flag, and counts of one site or of none
    list(sweep)
    some = [sweep.finished[i, 0] for i in range(len(sweep.cells))]
    sizes = [31 * 25 + left.counts.nbytes for left in some]
    assert min(sizes) <= data["store_bytes"] / data["chunks_of_cells"] <= max(sizes)


def test_the_command(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")  # where nobody answers
    store = tmp_path / "s.sqlite"
    command = "sweep", "-m", tiny_path, "-c", N_CTX, "--chunks", 4, "--sites", "ffn_norm", "--store", store
    out, _ = fq(*command, "--dry-run", "--json", tmp_path / "j")
    data = json.loads((tmp_path / "j").read_text())
    assert "cells   4, 4 chunks of 64: 16 chunks of cells" in out and "seconds on" in out
    assert data["n_cells"] == 4 and data["seconds"] > 0 and not store.exists()
    for more in (["--resume"], ["-c", 32], ["--scheduler", "local:1"]):
        _, err = fq(*command, "--dry-run", *more, status=2)
        assert "--dry-run is of one run" in err
    half, _ = fq(*command, "--dry-run", "--shard", "1/2")
    assert "8 chunks of cells" in half
    second, _ = fq(*command, "--dry-run", "--shard", "2/2")
    assert "8 chunks of cells" in second and "store   some" in second and "seconds on" in second
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS")
    fq(*command)
    with Results(store, must_exist=True) as kept:
        assert len(kept.list()) == 1


@pytest.mark.parametrize(
    "n, said", [(430_000, "430 kB"), (1_000_000, "1 MB"), (999e6, "999 MB"), (12e9, "12.0 GB")]
)
def test_sizes_in_words(n, said):
    data = dict.fromkeys(("n_cells", "n_chunks", "n_ctx", "chunks_of_cells", "cells_at_a_time", "threads"), 1)
    data |= {"memory_bytes": 1, "model_bytes": 1, "store_bytes": n, "seconds": 1}
    assert f"\nstore   some {said}\n" in forecast_text(data)
