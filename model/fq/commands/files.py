"""Texts read and files written by the commands: checked before the work, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FqError

FileName = str | os.PathLike[str]
SAMPLE_TEXT = Path(__file__).parents[1] / "data" / "sample.txt"
MAX_TEXT_BYTES = 1 << 30

# What --json writes: kind of document -> its schema's version, in data/schema.json too. docs/json.md says
# when a version rises.
DOCUMENTS = {
    "bench": 1,
    "calibrate": 1,
    "compare": 1,
    "compare-estimate": 1,
    "divergence": 1,
    "forecast": 1,
    "formats": 1,
    "graph": 1,
    "inspect": 1,
    "pareto": 1,
    "perplexity": 1,
    "plan": 1,
    "profiles": 1,
    "ranges": 1,
    "rank": 1,
    "replicate": 1,
    "results": 1,
    "results-check": 1,
    "results-delete": 1,
    "results-merge": 1,
    "run": 1,
    "sensitivity": 1,
    "shard": 1,
    "sites": 1,
    "sweep": 1,
    "sweeps": 1,
    "tasks": 1,
    "trace": 1,
    "worker-check": 1,
}


def read_text(name: str | None) -> tuple[str, str]:
    """(the text, what to call it)."""
    path = SAMPLE_TEXT if name is None else Path(name)
    if path.is_dir():
        raise FqError(f"{path}: is a directory")
    with path.open("rb") as file:  # a pipe has no size, and a device no end
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise FqError(f"{path}: larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FqError(f"{path}: not UTF-8 at byte {e.start}") from None
    if not text.strip():
        raise FqError(f"{path}: the text is empty")
    return text, "sample text of the package" if name is None else str(path)


def text_sha256(text: str) -> str:
    import hashlib  # most commands need none

    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_outputs(
    outputs: Mapping[str, FileName | None], inputs: Mapping[str, FileName | None] | None = None
) -> None:
    """Find out before the work that each output can be written, and is no input and no other output.

    outputs  file by the option that names it; "-" is stdout, None is none
    inputs   file by what it is: "the model"

    A link is the file that it leads to. Raises FqError naming the option.
    """
    # where a shell sends our streams into a file, what is put in that file's place takes their text away
    taken = {_identity(1): "is where stdout goes", _identity(2): "is where stderr goes"}
    taken |= {_identity(name): f"is {what}" for what, name in (inputs or {}).items() if name is not None}
    for option, name in outputs.items():
        if name is None:
            continue
        said = f"{option} {os.fspath(name)}"
        identity = name if name == "-" else _identity(name)
        if identity is not None and identity in taken:
            raise FqError(f"{said}: {taken[identity]}")
        if name != "-":
            _check_writable(said, os.fspath(name))
        taken[identity] = f"is the file of {option} too"


def _identity(name: FileName | int) -> object:
    """Equal where two names are one file; None: a device or a pipe, which takes more than one."""
    try:
        found = os.stat(name)
    except OSError:
        return None if isinstance(name, int) else os.path.realpath(name)
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _check_writable(said: str, name: str) -> None:
    path = os.path.realpath(name)
    folder, why = os.path.dirname(path), ""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(_part_of(path))
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        writable = os.path.isdir(folder) and not name.endswith(os.sep)
    except OSError as e:
        writable, why = False, f": {e.strerror}"
    else:
        writable = os.access(name, os.W_OK)
        if not stat.S_ISREG(mode):
            if writable and not stat.S_ISDIR(mode):
                return
            writable, why = False, ": is a directory" if stat.S_ISDIR(mode) else ""
    if not (writable and os.access(folder, os.W_OK | os.X_OK)):
        raise FqError(f"{said}: cannot be written there{why}")


def _part_of(path: str) -> str:
    """Beside the file, under a name that is not too long where the file's own is not."""
    return os.path.join(os.path.dirname(path), f".fq-{os.getpid()}.part")


def write_json(kind: str, data: Mapping[str, Any], target: FileName) -> None:
    """A document of a kind (`DOCUMENTS`) whose first key names its schema; "-" is stdout."""
    document = {"schema": f"fq/{kind}/{DOCUMENTS[kind]}"} | dict(data)
    text = json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write(text, target)


def write(content: str | bytes, target: FileName) -> None:
    """Whole or not at all. A link stays one, and its file's mode and owner stay."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        before = os.stat(target)
    except FileNotFoundError:
        before = None
    if before is not None and not stat.S_ISREG(before.st_mode):
        # a device or a pipe is written to; it must not be replaced by a file
        Path(target).write_bytes(data)
        return
    path = os.path.realpath(target)
    part = Path(_part_of(path))
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:
            file.write(data)
        if before is not None:
            with contextlib.suppress(OSError):  # another's file stays theirs if we may give files away
                os.chown(part, before.st_uid, before.st_gid)
            part.chmod(stat.S_IMODE(before.st_mode))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
