"""Sweeps on a Dask cluster as a user has them: the figures of one process, whatever becomes of workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import distributed
import psutil
import pytest
from command_line import environment, fq, popen
from stored_runs import ended

from fq.cluster import worker
from fq.cluster.dask_pool import dask_pool
from fq.cluster.worker import Job, Left, ModelFiles
from fq.commands.on_workers import worker_limit
from fq.errors import FqError
from fq.measure.chunks import Settings

SITES = ["--sites", "ffn_norm", "--sites", "l_out", "--format", "bf16", "--format", "bf16:stochastic"]
SITES += ["--format", "int8:tensor"]
HERE = ("started", "machine", "command", "model")


def figures(path):
    """All of a run's figures, but for time and machine."""
    data = json.loads(fq("results", 1, "--store", path, "--json", "-")[0])
    assert "--scheduler" not in data["command"] and "--worker" not in data["command"]
    data["numerics"] = {
        key: value for key, value in data["numerics"].items() if key not in ("isa", "threads")
    }
    return json.dumps({key: value for key, value in data.items() if key not in HERE})


@pytest.fixture(scope="module")
def command(tiny_path):
    return ["sweep", "-m", tiny_path, "-c", 64, "--chunks", 12, *SITES]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.sqlite"
    fq(*command, "--store", path)
    return figures(path)


@contextlib.contextmanager
def cluster(folder, *workers, **variables):
    """A scheduler's address, with workers of the given options beside it."""
    env, running = environment(**variables), []

    def dask(*words):
        program = [sys.executable, "-m", "distributed.cli." + words[0], *map(str, words[1:])]
        with open(os.devnull, "w") as nothing:
            running.append(subprocess.Popen(program, cwd=folder, env=env, stdout=nothing, stderr=nothing))

    file = folder / "scheduler.json"
    try:
        dask("dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file)
        end = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        for options in workers:
            dask("dask_worker", "--scheduler-file", file, "--nthreads", 1, "--no-dashboard", *options)
        with distributed.Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(len(workers), timeout=30)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in running:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


@pytest.mark.parametrize("n", [1, 2])
def test_processes_here(command, whole, tmp_path, n):
    path = tmp_path / "s.sqlite"
    with socket.socket() as other:  # as of another cluster's scheduler
        with contextlib.suppress(OSError):  # it is there
            other.bind(("", 8787))
            other.listen()
        _, err = fq(*command, "--store", path, "--scheduler", f"local:{n}")
    assert err.count("fq: worker ") == n and "[12/12] " in err and "warning" not in err
    assert figures(path) == whole


def test_a_scheduler_by_address_by_file_and_by_the_variable(command, whole, tmp_path):
    with cluster(tmp_path, ["--name", "one"], ["--name", "two"]) as address:
        for k, (option, variables) in enumerate(
            (
                (["--scheduler", tmp_path / "scheduler.json"], {}),
                ([], {"DASK_SCHEDULER_ADDRESS": address}),
            )
        ):
            path = tmp_path / f"{k}.sqlite"
            _, err = fq(*command, "--store", path, *option, env=environment(**variables))
            assert re.search(r"worker (one|two) \(tcp://", err) and figures(path) == whole
        out, _ = fq("worker-check", "-m", command[2], "--scheduler", address, "--json", tmp_path / "w.json")
        found = json.loads((tmp_path / "w.json").read_text())["workers"]
        assert [one["ready"] for one in found] == [True, True] and "one (tcp://" in out
        assert {one["model"] for one in found} == {str(command[2])} and found[0]["threads"] == 1


def local_workers(process):
    """The processes that run tasks: those whose parent is a worker's nanny, or the coordinator's own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
    return []


def test_killed_workers_cost_nothing_but_time(command, whole, tmp_path):
    """Two of them at random moments; bench.scale does it ten times, and more."""
    path, rng, killed = tmp_path / "s.sqlite", random.Random(1), 0
    running = popen(*command, "--store", path, "--scheduler", "local:3")
    moments = sorted(rng.sample(range(1, 40), 2))
    while running.poll() is None and killed < 2:
        if ended(path) >= moments[killed] and (there := local_workers(running)):
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(there).kill()
                killed += 1
        time.sleep(0.005)
    _, err = running.communicate(timeout=100)
    assert running.returncode == 0, err
    assert killed and figures(path) == whole


def test_a_coordinator_that_is_killed_goes_on(command, whole, tmp_path):
    path = tmp_path / "s.sqlite"
    arguments = [*command, "--store", path, "--resume", "--scheduler"]
    with cluster(tmp_path, []) as address:
        running = popen(*arguments, address)
        while running.poll() is None and ended(path) < 20:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        before = ended(path)
        _, err = fq(*arguments, address)
    assert f"{before} of " in err and figures(path) == whole


def test_ctrl_c_keeps_what_is_done(command, whole, tmp_path):
    path = tmp_path / "s.sqlite"
    arguments = [*command, "--store", path, "--resume", "--scheduler", "local:1"]
    running = popen(*arguments)
    while running.poll() is None and ended(path) < 10:
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode in (0, 130) and "Traceback" not in err
    fq(*arguments)
    assert figures(path) == whole


PRELOAD = "import fq_kernels\nimport fq.cluster.worker as w\nfq_kernels.CONTRACT = w.CONTRACT = 'fq-0'\n"


def test_a_worker_of_another_contract_is_refused_by_name(command, whole, tmp_path):
    (tmp_path / "other.py").write_text(PRELOAD)
    path = tmp_path / "s.sqlite"
    other = ["--name", "old", "--preload", tmp_path / "other.py"]
    with cluster(tmp_path, ["--name", "new"], other) as address:
        _, err = fq("worker-check", "-m", command[2], "--scheduler", address, "--json", "-", status=2)
        _, err = fq(*command, "--store", path, "--scheduler", address)
        assert "worker old (tcp://" in err and "is refused: its contract of numerics is fq-0, not fq-" in err
    assert figures(path) == whole


def test_workers_find_the_model_in_a_folder_of_their_own(command, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(command[2], there)
    with cluster(tmp_path, []) as address:
        options = ["-m", command[2], "--scheduler", address, "--worker-model-dir", there, "--json", "-"]
        (one,) = json.loads(fq("worker-check", *options)[0])["workers"]
        assert one["model"] == str(there / "tiny.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheduler", "local:0"], "local:N makes N processes, from 1 to"),
        (["--scheduler", "local:x"], "local:N makes N processes, from 1 to"),
        (["--scheduler", "nowhere"], "no Dask scheduler answers"),
        (["--scheduler", "local:1", "--shard", "1/2"], "--shard is for processes without a scheduler"),
    ],
)
def test_bad_requests(command, tmp_path, options, words):
    _, err = fq(*command, "--store", tmp_path / "s.sqlite", *options, status=2)
    assert words in err


def test_a_lost_baseline_is_said_as_one_process_says_it(command, tmp_path):
    from fq.gguf.synthetic import SAMPLE_TEXT  # any text will do

    model = tmp_path / "nan.gguf"
    data = bytearray(Path(command[2]).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN at the end of the last tensor
    model.write_bytes(data)
    arguments = ["sweep", "-m", model, "-f", SAMPLE_TEXT, *command[3:], "--store", tmp_path / "s.sqlite"]
    _, plain = fq(*arguments, status=1)
    _, err = fq(*arguments, "--scheduler", "local:1", "-t", 1, status=1)
    assert [line for line in err.splitlines() if "error" in line] == plain.splitlines()[-1:]


def test_processes_here_share_what_is_free(monkeypatch):
    monkeypatch.setattr("fq.commands.options.available_memory", lambda: 8 << 30)
    with dask_pool("local:2", 1) as here:
        assert worker_limit(None, here) == 2 << 30 and worker_limit("3G", here) == 3 << 30
    elsewhere = SimpleNamespace(n_here=None)
    assert worker_limit(None, elsewhere) is None and worker_limit("3G", elsewhere) == 3 << 30
    monkeypatch.setattr("fq.commands.options.available_memory", lambda: None)
    assert worker_limit(None, here) is None


# ---------------------------------------------------------------- a worker, in this process


@pytest.fixture
def job(tiny_path, tiny):
    from fq.gguf.synthetic import SAMPLE_TEXT
    from fq.measure.cells import cells_of

    tokens = tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))[: 4 * 64]
    digest = hashlib.sha256(tiny_path.read_bytes()).hexdigest()
    cells = tuple(cells_of(tiny, ["ffn_norm"], ["bf16"]))
    settings = Settings(n_ctx=64, chunks=4, chunk_order="first")
    size = tiny_path.stat().st_size
    files = ModelFiles((str(tiny_path),), digest, size)
    yield Job("k", files, None, None, tokens, cells, (), settings, 1, None)
    worker._jobs.clear()


def test_a_task_before_the_job_is_known(job):
    with pytest.raises(worker.UnknownJobError):
        worker.run("k", 0, (0,))
    about = worker.begin(job)
    assert about["threads"] == 1 and about["model"] == job.model.paths[0]
    left = worker.run("k", 2, (1, 2))
    assert isinstance(left, Left) and left.chunk == 2 and left.cells == (1, 2) and not left.not_finite
    with pytest.raises(FqError, match=r"no x\.gguf with SHA-256"):
        worker.find_model(replace(job.model, paths=("/nowhere/x.gguf",)), None)


def test_a_digest_is_kept_while_the_file_stays(job, monkeypatch, tmp_path, tiny_path):
    path = tmp_path / "tiny.gguf"
    shutil.copy(tiny_path, path)
    mine = replace(job.model, paths=(str(path),))
    counted = []
    plain = worker.sha256_of
    monkeypatch.setattr(worker, "sha256_of", lambda *paths: counted.append(paths) or plain(*paths))
    assert worker.find_model(mine, None) == worker.find_model(mine, None) == path and len(counted) == 1
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(FqError, match="has the size, but is another"):
        worker.find_model(mine, None)


def test_a_folder_that_is_named_comes_first(job, tmp_path, tiny_path):
    there = tmp_path / tiny_path.name
    assert worker.find_model(job.model, str(tmp_path)) == tiny_path
    shutil.copy(tiny_path, there)
    assert worker.find_model(job.model, str(tmp_path)) == there
