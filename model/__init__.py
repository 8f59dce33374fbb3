"""Runs llama-architecture GGUF files and measures what rounding their norm outputs costs.

from model import Executor, FakeQuant, Model, Perplexity, Rule, find

model = Model(find("smollm2"))
rules = FakeQuant(model.norms, [Rule("bf16", kind="ffn_norm")])
run = Perplexity(model, model.tokenizer.encode(text), chunks=8, fake_quant=rules,
                 executor=Executor(2))
for chunk in run:
    print(chunk, run.ppl)
print(run.result()["comparison"]["mean_kld"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fq_kernels import Executor, Format
    from fq_kernels.rules import FakeQuant, Norm, Rule, Site

    from .errors import FqError, NotFiniteError
    from .generation import Sampler, Timings, generate
    from .gguf_file import GGUFError, GGUFFile
    from .graph import Graph
    from .hparams import HParams, ModelError
    from .perplexity import Perplexity
    from .results import Results, Run
    from .runner import Context, Model
    from .store import find, pull
    from .streams import Stream, Streams
    from .sweep import Sweep, cells_of
    from .tokenizer import Tokenizer, TokenizerError

# name -> where it lives; looked up at first use, so that `fq --help` loads none of it
_HOMES = {
    "Executor": "fq_kernels",
    "Format": "fq_kernels",
    "FakeQuant": "fq_kernels.rules",
    "Norm": "fq_kernels.rules",
    "Rule": "fq_kernels.rules",
    "Site": "fq_kernels.rules",
    "FqError": "model.errors",
    "NotFiniteError": "model.errors",
    "Sampler": "model.generation",
    "Timings": "model.generation",
    "generate": "model.generation",
    "GGUFError": "model.gguf_file",
    "GGUFFile": "model.gguf_file",
    "Graph": "model.graph",
    "HParams": "model.hparams",
    "ModelError": "model.hparams",
    "Perplexity": "model.perplexity",
    "Results": "model.results",
    "Run": "model.results",
    "Context": "model.runner",
    "Model": "model.runner",
    "find": "model.store",
    "pull": "model.store",
    "Stream": "model.streams",
    "Streams": "model.streams",
    "Sweep": "model.sweep",
    "cells_of": "model.sweep",
    "Tokenizer": "model.tokenizer",
    "TokenizerError": "model.tokenizer",
}

__all__ = [
    "Context",
    "Executor",
    "FakeQuant",
    "Format",
    "FqError",
    "GGUFError",
    "GGUFFile",
    "Graph",
    "HParams",
    "Model",
    "ModelError",
    "Norm",
    "NotFiniteError",
    "Perplexity",
    "Results",
    "Rule",
    "Run",
    "Sampler",
    "Site",
    "Stream",
    "Streams",
    "Sweep",
    "Timings",
    "Tokenizer",
    "TokenizerError",
    "cells_of",
    "find",
    "generate",
    "pull",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
