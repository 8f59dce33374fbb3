"""What the figures were taken on, from Linux's own files; whatever is missing is left out."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import fq_kernels


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches of the first processor: L1, L2, L3."""
    found = {}
    for i in range(8):
        folder = f"/sys/devices/system/cpu/cpu0/cache/index{i}"
        size = re.fullmatch(r"(\d+)([KM]?)", _read(f"{folder}/size"))
        if size and _read(f"{folder}/type") in ("Data", "Unified"):
            unit = {"": 1, "K": 1 << 10, "M": 1 << 20}[size[2]]
            found[f"L{_read(f'{folder}/level')}"] = int(size[1]) * unit
    return found


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    import importlib.metadata  # takes longer than all else here

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bytes(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


# What a processor is: maker, family, first and last model, as Linux counts them.
_PROCESSORS = (
    ("AuthenticAMD", 23, 48, 79, "Zen 2"),
    ("AuthenticAMD", 25, 0, 15, "Zen 3"),
    ("AuthenticAMD", 25, 16, 31, "Zen 4"),
    ("AuthenticAMD", 25, 32, 95, "Zen 3"),
    ("AuthenticAMD", 25, 96, 175, "Zen 4"),
    ("AuthenticAMD", 26, 0, 127, "Zen 5"),
    ("GenuineIntel", 6, 85, 85, "Skylake or Cascade Lake"),
    ("GenuineIntel", 6, 106, 106, "Ice Lake"),
    ("GenuineIntel", 6, 143, 143, "Sapphire Rapids"),
    ("GenuineIntel", 6, 173, 173, "Granite Rapids"),
    ("GenuineIntel", 6, 207, 207, "Emerald Rapids"),
)


def processor() -> str:
    """Its name, family and model: in a virtual machine the name may say no more than the maker."""
    cpu = _read("/proc/cpuinfo")

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:[ \t]*(.+)$", cpu, re.MULTILINE)
        return found[1] if found else ""

    name = field("model name") or platform.machine()
    maker, family, model = field("vendor_id"), field("cpu family"), field("model")
    if not (family.isdecimal() and model.isdecimal()):
        return name
    for known, number, first, last, kind in _PROCESSORS:
        if (known, number) == (maker, int(family)) and first <= int(model) <= last:
            return f"{name} (family {family} model {model}: {kind})"
    return f"{name} (family {family} model {model})"


def versions() -> dict[str, str]:
    """Of what has a say in a run's figures."""
    return {
        "fq": package_version("fq") or "not installed",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def describe(*libraries: str) -> dict[str, str]:
    """What a reader of timings wants to know; ``libraries`` are packages, named where installed."""
    import datetime

    virtual = re.search(r"^flags\s*:.*\bhypervisor\b", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor() + (", in a virtual machine" if virtual else ""),
        "processors": f"{os.cpu_count()}, load before the run {os.getloadavg()[0]:.1f}",
        "instruction sets": ", ".join(fq_kernels.supported_isas()),
        "caches": ", ".join(f"{name} {_bytes(size)}" for name, size in cache_sizes().items()),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": ", ".join(f"{name} {v}" for name in libraries if (v := package_version(name))),
    }
    return {name: value for name, value in about.items() if value}


def available_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes that can be taken without swapping, or being killed for a cgroup's limit; None: not known.

    ``root`` is where /proc and /sys are.
    """
    root = Path(root)
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = [int(found[1]) << 10] if found else []
    for folder, version in _cgroups(root, "memory"):
        limit, usage = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        numbers = [_read(folder / f"memory.{name}") for name in (limit, usage)]
        if all(re.fullmatch(r"\d{1,18}", number) for number in numbers):  # else "max"
            # what the kernel drops at once when it wants memory
            cached = re.search(
                rf"^{'total_' * (version == 1)}inactive_file (\d{{1,18}})$",
                _read(folder / "memory.stat"),
                re.MULTILINE,
            )
            free.append(max(int(numbers[0]) - int(numbers[1]) + (int(cached[1]) if cached else 0), 0))
    return min(free, default=None)


def default_threads(root: str | os.PathLike[str] = "/") -> int:
    """Processors that this process may use: its affinity's, or fewer where a cgroup's quota is less.

    A quota stops all threads of a group for the rest of a period once it is used up, so that more
    threads than it pays for wait for each other. ``root`` is where /proc and /sys are.
    """
    if hasattr(os, "process_cpu_count"):
        processors = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    for folder, version in _cgroups(Path(root), "cpu"):
        files = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        # quota and period; else "max", or -1
        found = re.fullmatch(r"(\d{1,18}) ([1-9]\d{0,17})", " ".join(_read(folder / name) for name in files))
        if found:
            processors = min(processors, max(-(-int(found[1]) // int(found[2])), 1))
    return processors


def _cgroups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version) of the groups that this process is in and of those around them, if they are there."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # of a container the path is often the host's, and what is mounted is the container's own group
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for mount in (controllers, controller) if controllers else ("", "unified"):
            for depth in range(len(parts) + 1):
                yield root.joinpath("sys/fs/cgroup", mount, *parts[:depth]), 1 if controllers else 2
