"""What the figures were taken on, from Linux's own files; whatever is missing is left out."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import fq_kernels


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bytes(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


def describe(*libraries: str) -> dict[str, str]:
    """What a reader of timings wants to know; ``libraries`` are packages, named where installed."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    virtual = re.search(r"^flags\s*:.*\bhypervisor\b", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": (cpu[1] if cpu else platform.machine()) + (", in a virtual machine" if virtual else ""),
        "processors": f"{os.cpu_count()}, load before the run {os.getloadavg()[0]:.1f}",
        "instruction sets": ", ".join(fq_kernels.supported_isas()),
        "caches": ", ".join(f"{name} {_bytes(size)}" for name, size in cache_sizes().items()),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": ", ".join(f"{name} {v}" for name in libraries if (v := package_version(name))),
    }
    return {name: value for name, value in about.items() if value}


def available_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) << 10 if found else None
