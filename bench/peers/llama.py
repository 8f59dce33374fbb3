"""llama.cpp as the package llama-cpp-python brings it: found, and linked to a program of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fq import FqError

SOURCE = Path(__file__).with_name("llama_peer.c")
HOW_TO = "see bench/peers/README.md for how to build it"

# Does not import the package: that would load it and all that it needs.
_FIND = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("llama_cpp")
folder = spec.submodule_search_locations[0] if spec else None
print(json.dumps([folder, importlib.metadata.version("llama-cpp-python") if spec else None]))
"""


@dataclass(frozen=True)
class LlamaCpp:
    """The program, and what it is made of."""

    program: str
    about: str

    def serve(self, model: str, threads: int, n_ctx: int, *, repack: bool) -> list[str]:
        return [self.program, "serve", model, str(threads), str(n_ctx), str(int(repack))]

    def perplexity(self, model: str, text: str, n_ctx: int, chunks: int, threads: int) -> list[str]:
        return [self.program, "perplexity", model, text, str(n_ctx), str(chunks), str(threads)]

    def run(self, model: str, prompt: str, n: int, threads: int, *, repack: bool) -> list[str]:
        return [self.program, "run", model, prompt, str(n), str(threads), str(int(repack))]


def _output(command: Sequence[str], what: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as e:
        raise FqError(f"{what}: {command[0]}: {e.strerror}") from None
    except subprocess.CalledProcessError as e:
        said = (e.stderr or "").strip().splitlines()
        raise FqError(f"{what}: {said[-1] if said else f'exit status {e.returncode}'}") from None


def find(python: str, build: Path) -> LlamaCpp:
    """The llama.cpp that ``python`` has installed; the program goes into the folder ``build``.

    Raises FqError where there is none, or no C compiler.
    """
    folder, version = json.loads(_output([python, "-c", _FIND], f"llama.cpp ({HOW_TO})"))
    if folder is None:
        raise FqError(f"{python} has no llama-cpp-python: {HOW_TO}")
    libraries, headers = Path(folder, "lib"), Path(folder).parent / "include"
    for path in (libraries / "libllama.so", headers / "llama.h"):
        if not path.exists():
            raise FqError(f"{path} is missing: {HOW_TO}")
    program = build / "llama_peer"
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    link = [
        f"-L{libraries}",
        f"-Wl,-rpath,{libraries}",
        "-lllama",
        "-lggml",
        "-lggml-base",
        "-lm",
        "-pthread",
    ]
    _output(
        [*compiler.split(), "-O2", str(SOURCE), "-o", str(program), "-pthread", f"-I{headers}", *link, "-lm"],
        f"cannot compile {SOURCE.name} with {compiler}",
    )
    ggml, features = _output([str(program), "version"], "llama.cpp").split(";", 1)
    built_for = ", ".join(re.findall(r"(\w+) = 1", features))
    return LlamaCpp(str(program), f"llama-cpp-python {version}, {ggml}, built for {built_for}")
