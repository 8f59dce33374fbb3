"""Chat templates. They come with the model file, from anyone: a process with limits renders each."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FqError

_RENDERER = Path(__file__).with_name("chat_renderer.py")
CPU_SECONDS = 2
MEMORY_MB = 400
MAX_CHARACTERS = 4_000_000  # of the result, beyond what the names that are given account for
# What it waits for is the processor alone: met where that is shared by many.
WALL_SECONDS = 4.5


def render(template: str, names: Mapping[str, Any]) -> str:
    """The text that a Jinja template makes of `names`, which are what JSON can hold.

    The environment is that of Hugging Face's transformers. Raises FqError, its text what is wrong in one
    line: for names that JSON cannot hold, any error of the template's, and one that asks for more than
    CPU_SECONDS, WALL_SECONDS, MEMORY_MB or MAX_CHARACTERS.
    """
    import subprocess  # not needed without a chat

    try:
        given = json.dumps(dict(names))
    except (TypeError, ValueError) as error:
        raise FqError(f"what is given to it is not JSON: {error}") from None
    limits = {"cpu": CPU_SECONDS, "memory": MEMORY_MB << 20, "characters": MAX_CHARACTERS + 4 * len(given)}
    # with the places that this process imports from, as it may run from a zip or under a PYTHONPATH
    request = json.dumps({"limits": limits, "path": sys.path, "template": template, "names": given})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_RENDERER)],
            input=request.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise FqError(f"it takes more than {WALL_SECONDS} s") from None
    except OSError as error:
        raise FqError(f"{sys.executable or 'Python'} cannot be started: {error.strerror}") from None
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise FqError(f"it takes more than {CPU_SECONDS} s of processor time")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise FqError(f"its process ended with status {done.returncode}") from None
    if "memory" in answer:
        raise FqError(f"it takes more than {MEMORY_MB} MB of memory")
    if "error" in answer:
        raise FqError(answer["error"])
    text: str = answer["text"]
    return text
