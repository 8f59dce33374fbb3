"""Texts read and files written by the commands: checked before the work, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import FqError

SAMPLE_TEXT = Path(__file__).parents[1] / "data" / "sample.txt"
MAX_TEXT_BYTES = 1 << 30


def read_text(name: str | None) -> tuple[str, str]:
    """(the text, what to call it)."""
    path = SAMPLE_TEXT if name is None else Path(name)
    if path.is_dir():
        raise FqError(f"{path}: is a directory")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise FqError(f"{path}: larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise FqError(f"{path}: not UTF-8 at byte {e.start}") from None
    if not text.strip():
        raise FqError(f"{path}: the text is empty")
    return text, "sample text of the package" if name is None else str(path)


def check_target(option: str, target: str | None) -> None:
    """Find out before the work, not after it, that the file cannot be written."""
    if target in (None, "-"):
        return
    path = Path(target)
    if path.exists() and not path.is_file() and not path.is_dir() and os.access(path, os.W_OK):
        return
    if path.is_dir() or not path.resolve().parent.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise FqError(f"{option} {target}: cannot be written there")


def write_json(data: Any, target: str) -> None:
    text = json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write(text, target)


def write(content: str | bytes, target: str) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    if os.path.exists(target) and not os.path.isfile(target):
        # a device or a pipe is written to; it must not be replaced by a file
        Path(target).write_bytes(data)
        return
    # whole or not at all
    part = Path(f"{target}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
