"""The command line as a user has it: what it prints, and its exit status."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from json_documents import check_written

from fq.cli import __file__ as CLI
from fq.cli import main

# Ctrl-C must end a run within a second; the rest is for a busy machine.
INTERRUPT_SECONDS = 3.0
TIMEOUT = 120
NO_CACHE = "/nonexistent/cache"
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
        "FQ_CACHE": NO_CACHE,
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
    """(stdout, stderr) of a command that must end with `status`.

    In this process, as to start one takes longer than most commands; in one of its own with options of Popen
    other than `cwd`, or on a cluster's workers.
    """
    if options.keys() - {"cwd"} or "--scheduler" in args:
        with popen(*args, **options) as process:
            out, err = process.communicate(timeout=TIMEOUT)
        ended = process.returncode
    else:
        ended, out, err = _here(args, **options)
    assert ended == status, err
    assert "Traceback" not in err and "Warning" not in err, err
    if status != 2:  # there may be a partial result
        check_written(args, out, options.get("cwd", HERE))
    return out, err


def _here(args, cwd=HERE):
    """(exit status, stdout, stderr)."""
    variables, folder = dict(os.environ), Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    os.environ["FQ_CACHE"] = NO_CACHE
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*map(str, args)])
    except SystemExit as end:  # of the parser
        status = end.code
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
    return status, out.getvalue(), err.getvalue()
