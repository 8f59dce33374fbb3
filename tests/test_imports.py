"""What starting up loads: most of a short command's time is imports, so each is made where it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fq.gguf.synthetic import tiny_shape, write_llama_gguf

# Each costs milliseconds, and is for something that these programs do not do.
FETCHING = {"subprocess", "tempfile", "shutil", "zipfile", "hashlib"}
REPORTING = {"sqlite3", "tqdm", "jinja2", "importlib.metadata", "email", "fq.run.trace", "fq.commands.show"}
NUMBERS = {"gguf", "ml_dtypes", "numpy.random", "difflib"}
PARALLEL = {"multiprocessing", "concurrent.futures", "asyncio"}

RUN = """
from fq.run.generation import Sampler, generate
from fq.run.context import Context
from fq.run.model import Model
from fq.gguf.cache import find
from fq_kernels import Executor
model = Model(find(sys.argv[1]))
ids = model.tokenizer.encode("Hello world", parse_special=True)
context = Context(model, 16, Executor(2))
decoder = model.tokenizer.stream_decoder()
text = "".join(map(decoder.push, generate(context, ids, 3, Sampler())))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_llama_gguf(path, tiny_shape())
    return path


def loaded(program: str, path: Path) -> set[str]:
    code = f"import sys\n{program}\nprint('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("program", "needs", "others"),
    [
        ("import fq", "", {"numpy", "fq_kernels"}),
        ("import fq_kernels.rules", "import numpy", {"fq", "tokenizers", "json"}),
        ("from fq.run.model import Model", "import numpy", {"tokenizers"}),
        (RUN, "import numpy, tokenizers", set()),
    ],
    ids=["package", "kernels", "runner", "run"],
)
def test_only_what_is_used_is_imported(program: str, needs: str, others: set[str], path: Path) -> None:
    unused = FETCHING | REPORTING | NUMBERS | PARALLEL | others
    assert unused & (loaded(program, path) - loaded(needs, path)) == set()


def test_a_command_leaves_no_blas_threads_to_look_for_work() -> None:
    program = """
import os
from fq.cli import main
assert "numpy" not in sys.modules  # which reads it once
os.environ.pop("OPENBLAS_NUM_THREADS", None)
main(["formats", "--json"])
assert "numpy" in sys.modules and os.environ["OPENBLAS_NUM_THREADS"] == "1"
"""
    assert "numpy" in loaded(program, Path())
