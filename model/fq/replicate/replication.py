"""The original report's experiments: as it made them, and as they have to be made.

Each experiment returns plain figures, as `fq replicate --json` writes them; `replicate.text`
puts them beside the report's. Three modes stand side by side:

- ``report``  what its patch does: the first row to reach the name ``norm-N``
- ``meant``   the same on the site it was meant for: the first row to reach the FFN norm
- ``right``   every row of the FFN norm
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fq_kernels import Executor, round_trip
from fq_kernels.rules import FakeQuant, Place, RowCallback, Rule, Site

from .. import machine
from ..errors import FqError
from ..gguf.cache import ALIASES, DEFAULT_ALIAS, PackagedModel
from ..gguf.synthetic import RANDOM_WEIGHTS
from ..gguf.types import GGML_TYPES
from ..measure.overhead import BASELINE, CONTROL, Configuration, Overhead, reports_layer
from ..measure.perplexity import Perplexity
from ..measure.statistics import compare
from ..provenance import sha256_of
from ..results import trace_summary
from ..run.context import Context
from ..run.generation import Sampler, generate
from ..run.model import Model
from ..run.trace import Trace, provenance

NORMS = ("attn_norm", "ffn_norm")  # of a layer of the report's model
MODES = {
    "report": "norm[{}]=bf16:first-call",
    "meant": "ffn_norm[{}]=bf16:first-call",
    "right": "ffn_norm[{}]=bf16",
}

# 28,672 elements are 14 rows of 2,048; 30 rows of two norms are these 14 and 1 more, twice.
N_PROMPT, N_DECODED = 14, 1
# The load the report names: "Hello world" and 5 tokens, of which the last is not evaluated.
HELLO, N_HELLO = "Hello world", 5
# The report's total time over its tokens/s: 19 tokens, 14 of prompt and 5.
N_TIMED = 5
ANSWER, N_ANSWER = "The answer is", 10
# Random weights have no perplexity worth the time: enough chunks to see the control.
RANDOM_CHUNKS = 2

# What the report prints. Times in ms; of each: baseline, layer 5, all layers.
REPORT: dict[str, Any] = {
    "model": "TinyLlama 1.1B Chat Q4_K_M",
    "layers": 22,
    "calls_per_layer": 30,
    "calls": 660,
    "tensor_elements": 28672,
    "layer": 5,
    "quantisation": {"one": {"rounded": 1, "skipped": 29}, "all": {"rounded": 22, "skipped": 638}},
    "performance": {
        "prompt": [6479.47, 6687.57, 6752.71],
        "eval": [1886.13, 1498.44, 1926.19],
        "total": [8907.00, 8249.78, 9228.38],
        "tokens_per_second": [2.13, 2.18, 2.06],
    },
    "bf16_type": 16,
    "first_difference": [0.000007, 0.000441],
    "last_difference": [0.000174, 0.001501],
    "answer": "The word 'downtown' in",
}

# The unit test: the value (in float32 it prints as the report's), the result, the difference.
UNIT_TEST = (
    (1.23456789, "1.23437500", "0.00019288"),
    (-0.987654321, "-0.98437500", "0.00327933"),
    (0.000123456, "0.00012302", "0.00000043"),
    (-1000.123456, "-1000.00000000", "0.12347412"),
    (3.14159265, "3.14062500", "0.00096774"),
)
ROUNDINGS = {"nearest-even": "bf16", "truncate": "bf16:truncate"}

# Called with what is run and its steps, which it passes on: a place for a progress bar.
Watch = Callable[[str, Iterable[int], int], Iterable[int]]


@dataclass(frozen=True)
class Settings:
    """rounds and seed of the timings; chunks (-1: all) of n_ctx tokens of the perplexity."""

    rounds: int = 30
    chunks: int = -1
    n_ctx: int = 512
    seed: int = 0


def rule(mode: str, layer: int | None) -> Rule:
    """The rule of a mode, for one layer or (None) all."""
    return Rule.parse(MODES[mode].format("*" if layer is None else layer))


# ---------------------------------------------------------------- of no model


def unit_values() -> list[dict[str, Any]]:
    """The report's five values, rounded by truncation and to nearest even, with 8 decimals as it prints."""
    values = np.array([value for value, _, _ in UNIT_TEST], np.float32)
    rounded = {name: round_trip(values[None], fmt)[0] for name, fmt in ROUNDINGS.items()}
    found = []
    for i, (_, result, difference) in enumerate(UNIT_TEST):
        ours = {
            name: {
                "result": f"{r[i]:.8f}",
                "difference": f"{abs(float(values[i]) - float(r[i])):.8f}",
            }
            for name, r in rounded.items()
        }
        theirs = {"result": result, "difference": difference}
        found.append(
            {
                "value": f"{values[i]:.8f}",
                "report": theirs,
                **ours,
                "report_agrees_with": [name for name in ROUNDINGS if ours[name] == theirs],
            }
        )
    return found


def type_numbers() -> dict[str, Any]:
    number = REPORT["bf16_type"]
    return {
        "report": number,
        "report_is": GGML_TYPES[number].name,
        "bf16": next(n for n, t in GGML_TYPES.items() if t.name == "BF16"),
    }


# ---------------------------------------------------------------- of a model


def _evaluate(
    model: Model,
    prompt: Sequence[int],
    n_decoded: int,
    executor: Executor,
    rules: Iterable[Rule] = (),
    *,
    on_row: RowCallback | None = None,
    trace: Trace | None = None,
) -> FakeQuant:
    """A prompt and n_decoded tokens after it, one by one, the likeliest each; the counters."""
    fake_quant = FakeQuant(model.values, list(rules), on_row)
    context = Context(model, len(prompt) + n_decoded, executor, fake_quant, trace)
    for _ in generate(context, prompt, n_decoded + 1, Sampler()):
        pass
    return fake_quant


def check_norms(model: Model) -> None:
    """Raises FqError for a model whose layers have other norms than the report's."""
    kinds = dict.fromkeys(place.kind for place in model.norms if place.layer is not None)
    if set(kinds) != set(NORMS):
        raise FqError(
            f"{model.path}: its layers have the norms {', '.join(kinds)}, the report's model has "
            f"{' and '.join(NORMS)}: what it did cannot be repeated on this one"
        )


def describe_model(model: Model) -> dict[str, Any]:
    digest = sha256_of(*model.file.paths)
    hp = model.hparams
    known = ALIASES[DEFAULT_ALIAS]
    assert isinstance(known, PackagedModel)
    return {
        "path": model.path,
        "name": os.path.basename(model.path),
        "bytes": model.file.size,
        "sha256": digest,
        "is_alias": DEFAULT_ALIAS if digest == known.sha256 else None,
        "random_weights": str(model.file.metadata.get("general.name", "")).startswith(RANDOM_WEIGHTS),
        "n_layer": hp.n_layer,
        "n_embd": hp.n_embd,
        "layer": reports_layer(model),
    }


def architecture(model: Model, tokens: Sequence[int], executor: Executor) -> dict[str, Any]:
    """Norm rows and kernel calls per layer, from a trace of two loads; and which names the patch knows.

    tokens  the first N_PROMPT are the prompt of the load that the report's figures come from
    """
    loads = {
        "figures": (list(tokens[:N_PROMPT]), N_DECODED),
        "text": (model.tokenizer.encode(HELLO), N_HELLO - 1),
    }
    found: dict[str, Any] = {"layer": reports_layer(model), "n_embd": model.hparams.n_embd}
    found["loads"] = {name: _count(model, *load, executor) for name, load in loads.items()}
    return found | {"names": _names(model)}


def _count(model: Model, prompt: Sequence[int], n_decoded: int, executor: Executor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fq-") as folder:
        path = Path(folder) / "trace.json"
        with Trace(path, provenance(model, executor)) as trace:
            _evaluate(model, prompt, n_decoded, executor, trace=trace)
        stream = trace_summary.summarise(path)["streams"][0]
    layers = [
        {key: layer[key] for key in ("attn_norm_rows", "ffn_norm_rows", "rows", "calls")}
        | {"addresses": len(layer["pointers"])}
        for layer in stream["layers"]
    ]
    return {
        "n_prompt": len(prompt),
        "n_decoded": n_decoded,
        "tensor_elements": len(prompt) * model.hparams.n_embd,
        "rows": sum(layer["rows"] for layer in layers),
        "kernel_calls": sum(layer["calls"] for layer in layers),
        "layers": layers,
    }


def _known_to_patch(name: str) -> bool:
    """The patch's two patterns: sscanf's of ``blk.%d.ffn_norm`` (and the text in the name), ``norm-%d``."""
    return bool(("ffn_norm" in name and re.match(r"blk\.\d", name)) or re.match(r"norm-\d", name))


def _names(model: Model) -> dict[str, int]:
    """Norms whose name the patch knows: alone, and with the multiply by the weight fused into them."""
    alone = ["norm" if norm.layer is None else f"norm-{norm.layer}" for norm in model.norms]
    fused = [node.name for node in model.graph.nodes if node.norm]
    return {
        "norms": len(alone),
        "known_alone": sum(map(_known_to_patch, alone)),
        "known_fused": sum(map(_known_to_patch, fused)),
    }


def quantisation(model: Model, tokens: Sequence[int], executor: Executor) -> dict[str, Any]:
    """Rows rounded and skipped in ``one`` layer and in ``all``: {scope: {mode: figures}}, and the layer."""
    prompt = list(tokens[:N_PROMPT])
    found: dict[str, Any] = {"layer": reports_layer(model)}
    for scope, layer in _scopes(model).items():
        found[scope] = {}
        for mode in MODES:
            fake_quant = _evaluate(model, prompt, N_DECODED, executor, [rule(mode, layer)])
            found[scope][mode] = _counts(fake_quant)
    return found


def _scopes(model: Model) -> dict[str, int | None]:
    return {"one": reports_layer(model), "all": None}


def _counts(fake_quant: FakeQuant) -> dict[str, Any]:
    """Rows of the sites that the rule takes, and of the FFN norms of their layers."""
    matched = fake_quant.matched
    layers = {counter.site.place.layer for counter in matched}
    rounded = dict.fromkeys(NORMS, 0)
    for counter in matched:
        rounded[counter.site.place.kind] += counter.rows_quantised
    seen = sum(counter.rows_seen for counter in matched)
    ffn_seen = sum(fake_quant.rows_seen(Place("ffn_norm", layer)) for layer in layers)
    n = sum(rounded.values())
    return {
        "rules": [str(rule) for rule in fake_quant.rules],
        "rows_seen": seen,
        "rows_rounded": n,
        "rows_skipped": seen - n,
        "coverage": n / seen,
        "rounded_by_kind": rounded,
        "ffn_rows_seen": ffn_seen,
        "ffn_coverage": rounded["ffn_norm"] / ffn_seen,
        "elements": sum(counter.elements for counter in matched),
        "changed": sum(counter.changed or 0 for counter in matched),
        "max_abs_error": max(counter.max_abs_error or 0.0 for counter in matched),
    }


def timed_configurations(model: Model) -> list[Configuration]:
    found = [Configuration(BASELINE), Configuration(CONTROL)]
    for mode, title in (("report", "report's mode"), ("right", "right mode")):
        for layer in _scopes(model).values():
            scope = "all layers" if layer is None else f"layer {layer}"
            found.append(Configuration(f"{scope}, {title}", (rule(mode, layer),)))
    return found


def performance(model: Model, tokens: Sequence[int], settings: Settings, watch: Watch) -> dict[str, Any]:
    """The report's load in turns, on one thread as it had it."""
    with Executor(1) as executor:
        run = Overhead(
            model,
            tokens,
            timed_configurations(model),
            n_prompt=N_PROMPT,
            n_predict=N_TIMED,
            rounds=settings.rounds,
            seed=settings.seed,
            executor=executor,
        )
        for _ in watch("performance", run, run.warm_up + run.rounds):
            pass
    return run.result()


def differences(model: Model, tokens: Sequence[int], executor: Executor) -> dict[str, Any]:
    """|result - value| of the first and last element of each rounded row of one layer.

    Per prompt and mode: how many rows, and smallest and largest difference of either element.
    """
    layer = reports_layer(model)
    encode = model.tokenizer.encode
    prompts = {
        f'"{HELLO}"': encode(HELLO),
        f'"{ANSWER}"': encode(ANSWER),
        "the sample text": list(tokens[:N_PROMPT]),
    }
    runs = []
    for name, prompt in prompts.items():
        modes = {}
        for mode in MODES:
            rows: list[tuple[Site, float, float]] = []

            def on_row(*row: Any, rows: list[Any] = rows) -> None:
                rows.append(row)

            _evaluate(model, prompt, N_DECODED, executor, [rule(mode, layer)], on_row=on_row)
            first, last = np.array([row[1:] for row in rows]).T
            modes[mode] = {
                "rows": len(rows),
                "first": [float(first.min()), float(first.max())],
                "last": [float(last.min()), float(last.max())],
            }
        runs.append({"prompt": name, "n_tokens": len(prompt), "first_token": prompt[0], "modes": modes})
    return {"layer": layer, "runs": runs}


def generation(model: Model, executor: Executor) -> dict[str, Any]:
    """N_ANSWER tokens after ANSWER: the text of each mode, and its predictions against the baseline's.

    mean_kld, max_kld and same_top compare the predictions along the baseline's own text.
    """
    prompt = model.tokenizer.encode(ANSWER)
    context = Context(model, len(prompt) + N_ANSWER, executor)
    streams: dict[str, Any] = {}
    base = None
    for mode in ("baseline", "report", "right"):
        rules = [] if mode == "baseline" else [rule(mode, None)]
        with context.under(rules):
            context.clear()
            stop = frozenset(model.tokenizer.eog_ids)
            tokens = list(generate(context, prompt, N_ANSWER, Sampler(), stop=stop))
        streams[mode] = {"tokens": tokens, "text": model.tokenizer.decode(tokens)}
        text = streams["baseline"]["tokens"]
        if not text:
            continue
        with context.under(rules):
            context.clear()
            logits = context.eval([*prompt, *text][:-1], slice(len(prompt) - 1, None))
        if base is None:
            base = logits
            continue
        paired = compare(base, logits, np.array(text), executor)
        streams[mode] |= {
            "same_tokens": tokens == text,
            "mean_kld": float(paired.kld.mean()),
            "max_kld": float(paired.kld.max()),
            "same_top": float(paired.same_top.mean()),
        }
    return {"prompt": ANSWER, "n_prompt": len(prompt), "n": N_ANSWER, "streams": streams}


def perplexity(
    model: Model, tokens: np.ndarray, chunks: int, settings: Settings, executor: Executor, watch: Watch
) -> dict[str, Any]:
    """The baseline, the report's mode and the right mode over all layers, and the control."""
    found: dict[str, Any] = {}
    for mode in ("report", "right"):
        run = Perplexity(
            model,
            tokens,
            n_ctx=settings.n_ctx,
            chunks=chunks,
            chunk_order="first",  # the page speaks of the text's first chunk
            fake_quant=FakeQuant(model.values, [rule(mode, None)]),
            control=mode == "right",
            executor=executor,
        )
        for _ in watch(f"perplexity, {mode} mode", run, run.n_chunks):
            pass
        assert run.fake_quant is not None
        result = run.result()
        found[mode] = {
            "comparison": result["comparison"],
            "chunk_mean_kld": [chunk["mean_kld"] for chunk in result["chunks"]],
            "counts": _counts(run.fake_quant),
            "not_finite": result["not_finite"],
        }
        for key in ("n_tokens", "n_ctx", "n_chunks", "n_scored", "control"):
            if key in result:
                found[key] = result[key]
    return found


# ---------------------------------------------------------------- all of it


def check_settings(settings: Settings) -> None:
    """Before the first experiment, not in the fourth. Raises FqError."""
    if settings.rounds < 2:
        raise FqError(f"--rounds must be at least 2, not {settings.rounds}")
    if settings.seed < 0:
        raise FqError(f"--seed must be at least 0, not {settings.seed}")


class Replication:
    """Every experiment on every model; iterate over it to run it.

    models    the models
    sample    the text whose first tokens are the prompts
    text      the text of the perplexity, and text_name, what it is called
    executor  of everything but the timings, which take one thread

    ``for what in run: ...`` yields what is run next. ``result()`` gives what is there so far, so
    an interrupted run loses one experiment. Raises FqError for what cannot be run, before
    anything is.
    """

    def __init__(
        self,
        models: Sequence[Model],
        sample: str,
        text: str,
        text_name: str,
        settings: Settings,
        executor: Executor,
        watch: Watch = lambda what, steps, n: steps,
    ) -> None:
        check_settings(settings)
        self.models, self.settings, self.executor = list(models), settings, executor
        self.text_name, self.watch = text_name, watch
        # before any of it runs, which is a load too
        self._machine = machine.describe("numpy", "gguf", "tokenizers")
        self._steps: list[tuple[dict[str, Any], str, Callable[[], Any]]] = []
        self.data: list[dict[str, Any]] = []
        for model in self.models:
            check_norms(model)
        for model in self.models:
            self._plan(model, model.tokenizer.encode(sample), np.array(model.tokenizer.encode(text)))

    def _plan(self, model: Model, prompt: list[int], tokens: np.ndarray) -> None:
        about = describe_model(model)
        settings, executor, watch = self.settings, self.executor, self.watch
        chunks = settings.chunks
        if about["random_weights"]:
            chunks = RANDOM_CHUNKS if chunks == -1 else min(chunks, RANDOM_CHUNKS)
        # refuses at once what it would refuse after minutes
        Perplexity(model, tokens, n_ctx=settings.n_ctx, chunks=chunks, executor=executor)
        data: dict[str, Any] = {"model": about}
        self.data.append(data)
        self._steps += [
            (data, "architecture", lambda: architecture(model, prompt, executor)),
            (data, "quantisation", lambda: quantisation(model, prompt, executor)),
            (data, "performance", lambda: performance(model, prompt, settings, watch)),
            (data, "differences", lambda: differences(model, prompt, executor)),
            (data, "generation", lambda: generation(model, executor)),
            (data, "perplexity", lambda: perplexity(model, tokens, chunks, settings, executor, watch)),
        ]

    def __iter__(self) -> Iterator[str]:
        for data, name, experiment in self._steps:
            if name not in data:
                yield f"{data['model']['name']}: {name}"
                data[name] = experiment()

    def result(self) -> dict[str, Any]:
        about = provenance(self.models[0], self.executor)
        return {
            "provenance": {key: about[key] for key in ("fq", "numpy", "python", "isa", "threads")},
            "machine": self._machine,
            "settings": vars(self.settings) | {"text": self.text_name},
            "partial": any(name not in data for data, name, _ in self._steps),
            "report": REPORT,
            "unit_values": unit_values(),
            "type_numbers": type_numbers(),
            "models": self.data,
        }
