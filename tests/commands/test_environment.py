"""Where fq is started: its streams, its user, its variables, its folder."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import environment, fq

import fq_kernels
from fq import FqError, find
from fq.cli import main
from fq.gguf import cache as model_cache

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_a_stream_that_is_closed(tiny_path, tmp_path, closed):
    """What goes to the others still goes there, and nothing of it into a file that got its number."""
    figures = tmp_path / "figures.json"
    words = ["-m", "fq", "sweep", "-m", tiny_path, "-c", 16, "--chunks", 2, "--json", figures]
    shut = " ".join(f"{n}>&-" for n in closed)
    command = ["sh", "-c", f'exec "$@" {shut}', "sh", sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("" if 1 in closed else "model  tiny")
    assert ("[2/2]" in done.stderr) == (2 not in closed)
    assert json.loads(figures.read_text())["n_chunks"] == 2
    assert fq("results", 1, cwd=tmp_path)[0].startswith("model  tiny")


@pytest.mark.parametrize(
    "command",
    [
        "perplexity -m {model} -c 16 --chunks 2 --json f.json",
        "results 1 --csv f.csv --json f.json --store s.sqlite",
    ],
)
def test_files_are_written_whatever_becomes_of_stdout(tiny_path, tmp_path, command):
    sweep = ("sweep", "-m", tiny_path, "-c", 16, "--chunks", 2, "--sites", "ffn_norm[0]")
    fq(*sweep, "--store", tmp_path / "s.sqlite")
    whole = f"{sys.executable} -m fq {command.format(model=tiny_path)} > /dev/full"
    done = subprocess.run(whole, shell=True, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "fq: error: system: No space left on device",
    )
    assert {path.name for path in tmp_path.glob("f.*")} == set(re.findall(r"f\.\w+", command))


def test_an_error_with_stderr_closed_is_not_said_on_stdout(tmp_path):
    command = f"{sys.executable} -m fq inspect none.gguf 2>&-"
    done = subprocess.run(
        command, shell=True, env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")


# ---------------------------------------------------------------- the user


@pytest.fixture
def homeless(monkeypatch):
    """A user that /etc/passwd does not know, as in many containers."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "FQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_text_from_a_pipe_is_held_to_the_limit(tiny_path, tmp_path, monkeypatch, capsys):
    """Its size is not known before it is read."""
    monkeypatch.setattr("fq.commands.files.MAX_TEXT_BYTES", 1 << 20)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for n, status in ((1 << 21, 2), (4000, 0)):
        writing = subprocess.Popen(
            [sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('word ' * ({n} // 5))"]
        )
        assert (
            main(["perplexity", "-m", str(tiny_path), "-f", str(pipe), "-c", "32", "--chunks", "1"]) == status
        )
        writing.communicate()
    assert "larger than 1 MiB" in capsys.readouterr().err


def test_no_home(homeless, tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["pull"], ["inspect"], ["run", "-p", "x", "--json", "y"], ["sweep", "--offline"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("fq: error: ") and err.count("\n") == 1
        assert "set FQ_CACHE or XDG_CACHE_HOME" in err
    # which only an alias needs
    assert find(str(tiny_path)) == tiny_path
    assert main(["run", "-m", str(tiny_path), "-p", "x", "-n", "1", "--json", "y"]) == 0
    with pytest.raises(FqError, match="no such file"):
        find("no such model")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert model_cache.cache_folder() == Path("/x/fq")


# ---------------------------------------------------------------- the kernels


def python(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


def test_an_instruction_set_that_is_not_there():
    env = environment(FQ_KERNELS_ISA="nope")
    said = "FQ_KERNELS_ISA: instruction set 'nope' is not available here; there are " + ", ".join(
        fq_kernels.supported_isas()
    )
    for command in (["formats"], ["inspect", "x"], ["results"], ["sites"]):
        _, err = fq(*command, status=2, env=env)
        assert err == f"fq: error: {said}\n"
    fq("--help", env=env)
    done = python("-c", "import fq_kernels", env=env)
    assert done.stderr.splitlines()[-1] == f"ImportError: {said}"
    code = "try: import fq_kernels\nexcept ImportError as e: print(e)"
    assert python("-c", code, env=env).stdout == f"{said}\n"


def test_the_source_folder_says_that_it_is_one(tmp_path):
    """As after `pip install .`, from the root of the checkout: it comes before what is installed."""
    for package, place in (("fq_kernels", "fq_kernels"), ("fq", "model/fq")):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(Path(sys.modules[package].__file__).parent, tmp_path / place, ignore=ignored)
    shutil.copy(ROOT / "model/__main__.py", tmp_path / "model")
    # -S: not what an editable install does to find its modules
    env = environment(PYTHONPATH=str(Path(np.__file__).parents[1]))
    done = python("-S", "-c", "import fq_kernels", cwd=tmp_path, env=env)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path}/fq_kernels has no compiled module"), done.stderr
    assert "start it in another folder, or run pip install -e ." in last
    done = python("-S", "-m", "model", "formats", cwd=tmp_path, env=env)
    assert done.returncode == 2 and done.stderr.startswith("fq: error: ") and done.stderr.count("\n") == 1
    assert "pip install -e ." in done.stderr


def test_a_users_own_model_is_no_part_of_it(tmp_path):
    """A model.py, and a folder of that name, beside a script."""
    (tmp_path / "model.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "script.py").write_text(
        "import fq, fq.run.model\nprint(fq.Model is fq.run.model.Model, fq.Sweep.__name__)\n"
    )
    done = python("script.py", cwd=tmp_path, env=environment())
    assert (done.stdout, done.stderr) == ("True Sweep\n", "")
    out = python("-m", "fq", "--version", cwd=tmp_path, env=environment()).stdout
    assert out.startswith("fq ")


def test_another_import_that_fails_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "fq.commands.formats", None)
    with pytest.raises(ImportError, match="formats"):
        main(["formats"])
