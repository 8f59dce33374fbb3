"""The command line as a user has it: processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from json_documents import check_written

from fq.cli import __file__ as CLI

# Ctrl-C must end a run within a second; the rest is for a busy machine.
INTERRUPT_SECONDS = 3.0
TIMEOUT = 120
# Not the root of the checkout, whose packages would hide the installed ones.
HERE = Path(__file__).parent


def environment(**variables):
    """This process's, with the package importable from any folder and no cache but an empty one."""
    root = str(Path(CLI).parents[1])
    path = [variables.pop("first_on_path", ""), root, os.environ.get("PYTHONPATH")]
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "",
        "FQ_CACHE": "/nonexistent/cache",
    }
    return os.environ | ours | variables


def popen(*args, env=None, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fq", *map(str, args)],
        **(
            {
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "encoding": "utf-8",
                "env": env or environment(),
                "cwd": HERE,
            }
            | options
        ),
    )


def fq(*args, status=0, **options):
    """(stdout, stderr) of a command that must end with `status`."""
    with popen(*args, **options) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, err
    assert "Traceback" not in err and "Warning" not in err, err
    if status != 2:  # there may be a partial result
        check_written(args, out, options.get("cwd", HERE))
    return out, err
