"""What a process may use of the machine: its affinity, and the limits of the cgroups around it."""

from __future__ import annotations

import os

import pytest
from command_line import fq

from fq.commands import options
from fq.machine import available_memory, default_threads

GIB = 1 << 30


@pytest.fixture
def root(tmp_path, monkeypatch):
    """root(files): what is in /proc and /sys of a machine of 16 processors, by path."""
    for name in ("process_cpu_count", "cpu_count"):
        monkeypatch.setattr(os, name, lambda: 16, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)

    def make(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return make


V2 = {"proc/self/cgroup": "0::/user.slice/job\n"}
V1 = {"proc/self/cgroup": "5:memory:/job\n3:cpu,cpuacct:/job\n2:cpuset:/job\n"}
CGROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    "files, threads",
    [
        ({}, 16),
        (V2, 16),
        (V2 | {f"{CGROUP}/user.slice/job/cpu.max": "max 100000\n"}, 16),
        (V2 | {f"{CGROUP}/user.slice/job/cpu.max": "200000 100000\n"}, 2),
        (V2 | {f"{CGROUP}/user.slice/job/cpu.max": "250000 100000\n"}, 3),
        (V2 | {f"{CGROUP}/user.slice/job/cpu.max": "1000 100000\n"}, 1),
        (V2 | {f"{CGROUP}/user.slice/job/cpu.max": "6400000 100000\n"}, 16),
        # the least of the groups around it
        (
            V2
            | {
                f"{CGROUP}/user.slice/job/cpu.max": "800000 100000\n",
                f"{CGROUP}/user.slice/cpu.max": "150000 50000\n",
            },
            3,
        ),
        # in a container: the root of what is mounted is its own group, under the host's path or none
        (V2 | {f"{CGROUP}/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/../../a\n", f"{CGROUP}/a/cpu.max": "500000 100000\n"}, 5),
        # both versions at once
        (
            {
                "proc/self/cgroup": "1:name=systemd:/a\n0::/a\n",
                f"{CGROUP}/unified/a/cpu.max": "700000 100000\n",
            },
            7,
        ),
        (
            V1
            | {
                f"{CGROUP}/cpu,cpuacct/job/cpu.cfs_quota_us": "150000\n",
                f"{CGROUP}/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            V1 | {f"{CGROUP}/cpu/cpu.cfs_quota_us": "50000\n", f"{CGROUP}/cpu/cpu.cfs_period_us": "10000\n"},
            5,
        ),
        (
            V1
            | {f"{CGROUP}/cpu/job/cpu.cfs_quota_us": "-1\n", f"{CGROUP}/cpu/job/cpu.cfs_period_us": "10\n"},
            16,
        ),
        # nonsense
        (V2 | {f"{CGROUP}/user.slice/job/cpu.max": "9 0\n"}, 16),
        ({"proc/self/cgroup": "what\n::\n", f"{CGROUP}/cpu.max": "\xff"}, 16),
    ],
)
def test_a_cpu_quota_counts(root, files, threads):
    assert default_threads(root(files)) == threads


def test_fewer_processors_than_the_quota_pays_for(root, monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 2, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert default_threads(root(V2 | {f"{CGROUP}/cpu.max": "400000 100000\n"})) == 2


def test_commands_go_by_it(tiny_path, monkeypatch):
    monkeypatch.setattr(options, "default_threads", lambda: 3)
    with options.executor_of(None) as executor, options.executor_of(2) as asked:
        assert (executor.threads, asked.threads) == (3, 2)
    _, err = fq("perplexity", "-m", tiny_path, "-c", 16, "--chunks", 1, "--json", "-")
    assert "s, 3 threads" in err


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 8 * GIB),
        (V2 | {f"{CGROUP}/user.slice/memory.max": "max\n"}, 8 * GIB),
        (
            V2
            | {
                f"{CGROUP}/user.slice/memory.max": f"{4 * GIB}\n",
                f"{CGROUP}/user.slice/memory.current": f"{3 * GIB}\n",
                f"{CGROUP}/user.slice/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 7\n",
            },
            GIB + GIB // 2,
        ),
        (
            V1
            | {
                f"{CGROUP}/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                f"{CGROUP}/memory/memory.usage_in_bytes": f"{GIB}\n",
                f"{CGROUP}/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 4096\n",
            },
            GIB + 4096,
        ),
        (
            V1
            | {
                f"{CGROUP}/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
                f"{CGROUP}/memory/job/memory.usage_in_bytes": "5\n",
            },
            8 * GIB,
        ),
    ],
)
def test_a_memory_limit_counts(root, files, free):
    meminfo = {"proc/meminfo": f"MemTotal: {9 << 20} kB\nMemAvailable:   {8 << 20} kB\n"}
    assert available_memory(root(files | meminfo)) == free


def test_where_nothing_is_known(root):
    assert available_memory(root({})) is None
