"""Runs GGUF files and measures what rounding their norms and other values costs.

>>> from fq import Executor, FakeQuant, Model, Perplexity, Rule, find
>>> model = Model(find("smollm2"))
>>> rules = FakeQuant(model.values, [Rule("bf16", kind="ffn_norm")])
>>> run = Perplexity(model, model.tokenizer.encode(text), chunks=8, fake_quant=rules,
...                  executor=Executor(2))
>>> for chunk in run:
...     print(chunk, run.ppl)
>>> print(run.result()["comparison"]["mean_kld"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fq_kernels import Executor, Format
    from fq_kernels.rules import FakeQuant, Place, Rule, Site

    from .arch.graph import Graph
    from .arch.hparams import HParams
    from .arch.keys import ModelError
    from .errors import FqError, NotFiniteError
    from .gguf.cache import find, pull
    from .gguf.file import GGUFError, GGUFFile
    from .measure.cells import cells_of
    from .measure.chunks import Settings
    from .measure.perplexity import Perplexity
    from .measure.streams import Stream, Streams
    from .measure.sweep import Sweep
    from .results.opened import open_results
    from .results.run import Run
    from .results.runs import Results
    from .run.context import Context
    from .run.generation import Sampler, Timings, generate
    from .run.model import Model
    from .text.tokenizer import Tokenizer
    from .text.vocabulary import TokenizerError

# name -> where it lives; looked up at first use, so that `fq --help` loads none of it
_HOMES = {
    "Executor": "fq_kernels",
    "Format": "fq_kernels",
    "FakeQuant": "fq_kernels.rules",
    "Place": "fq_kernels.rules",
    "Rule": "fq_kernels.rules",
    "Site": "fq_kernels.rules",
    "FqError": ".errors",
    "NotFiniteError": ".errors",
    "Settings": ".measure.chunks",
    "Sampler": ".run.generation",
    "Timings": ".run.generation",
    "generate": ".run.generation",
    "GGUFError": ".gguf.file",
    "GGUFFile": ".gguf.file",
    "Graph": ".arch.graph",
    "HParams": ".arch.hparams",
    "ModelError": ".arch.keys",
    "Perplexity": ".measure.perplexity",
    "Results": ".results.runs",
    "Run": ".results.run",
    "open_results": ".results.opened",
    "Context": ".run.context",
    "Model": ".run.model",
    "find": ".gguf.cache",
    "pull": ".gguf.cache",
    "Stream": ".measure.streams",
    "Streams": ".measure.streams",
    "Sweep": ".measure.sweep",
    "cells_of": ".measure.cells",
    "Tokenizer": ".text.tokenizer",
    "TokenizerError": ".text.tokenizer",
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
    "NotFiniteError",
    "Perplexity",
    "Place",
    "Results",
    "Rule",
    "Run",
    "Sampler",
    "Settings",
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
    "open_results",
    "pull",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fq")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
