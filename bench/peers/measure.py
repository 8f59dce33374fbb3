"""What is measured of the two programs, in pairs: ours, theirs, ours, theirs, ..."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import quartiles
from fq import FqError
from fq_kernels import isa

from .llama import LlamaCpp
from .processes import Idle, Whole, Worker, run_whole

N_PROMPT, N_FIRST, N_DECODE, N_CTX = 512, 16, 32, 512
N_PREDICT, PROMPT = 5, "Hello world"
PPL_CTX = 512
# llama.cpp rounds activations to 8 bits, which changes a perplexity by a few per mille
PPL_TOLERANCE = 0.02

MIN_ROUNDS = 3  # of which one may be an outlier

# Whether llama.cpp copies weights into layouts of its own, its default, and how rows are called.
# Neither is the faster in all: both are measured.
FORMS = ((True, ""), (False, "; llama.cpp --no-repack"))

SMOLLM2, TINYLLAMA = "smollm2-135m-instruct.q4_1", "tinyllama-shape"
# (beginning of the file's name, key of the row) -> the ratio asked for, of any instruction set and of one
BARS_OF_ALL = {
    (SMOLLM2, "cold start"): "<= 1.5",
    (TINYLLAMA, "cold start"): "<= 1.5",
    (TINYLLAMA, "peak memory"): "<= 1.2",
}
BARS = {
    "avx2": {
        (TINYLLAMA, "prompt"): ">= 1.3",
        (TINYLLAMA, "decode"): ">= 0.65",
        (SMOLLM2, "prompt"): ">= 3.0",
        (SMOLLM2, "decode"): ">= 0.65",
        (SMOLLM2, "perplexity"): ">= 3.0",
        (SMOLLM2, "perplexity F32"): ">= 1.6",
    },
    "avx512": {
        (TINYLLAMA, "prompt"): ">= 1.0",
        (TINYLLAMA, "decode"): ">= 1.0",
        (SMOLLM2, "prompt"): ">= 2.0",
        (SMOLLM2, "decode"): ">= 1.0",
        (SMOLLM2, "perplexity"): ">= 3.35",
        (SMOLLM2, "perplexity F32"): ">= 1.5",
    },
}


@dataclass
class Row:
    """One thing measured: a figure of each program a round."""

    model: str
    key: str
    what: str
    unit: str
    threads: int
    ours: Sequence[float]
    theirs: Sequence[float]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Ours over theirs within each round: lower quartile, median, upper quartile."""
        return quartiles(np.asarray(self.ours) / np.asarray(self.theirs))

    @property
    def bar(self) -> str | None:
        for (name, key), bar in (BARS_OF_ALL | BARS.get(isa(), {})).items():
            if self.key == key and self.model.lower().startswith(name):
                return bar
        return None

    @property
    def holds(self) -> bool | None:
        """Whether the median ratio is as asked for; None where nothing is."""
        if self.bar is None:
            return None
        sign, bound = self.bar.split()
        return self.ratio[1] >= float(bound) if sign == ">=" else self.ratio[1] <= float(bound)

    def as_json(self) -> dict[str, Any]:
        figures = {"ours": list(self.ours), "theirs": list(self.theirs)}
        return asdict(self) | figures | {"ratio": self.ratio, "bar": self.bar, "holds": self.holds}


@dataclass(frozen=True)
class Rounds:
    """How many pairs of turns a row has: at most ``most``, fewer once they have taken ``seconds``."""

    most: int
    seconds: float


def in_pairs(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: Rounds
) -> tuple[list[Any], list[Any]]:
    """What each gave in each round, in strict alternation."""
    results: tuple[list[Any], list[Any]] = ([], [])
    begin = time.perf_counter()
    for done in range(rounds.most):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > rounds.seconds:
            break
        for call, got in zip((ours, theirs), results, strict=True):
            got.append(call())
    return results


def _in_turn(
    ours: Worker, theirs: Worker, word: str, numbers: Sequence[int], rounds: Rounds
) -> Iterator[Any]:
    """Seconds, the median of those of a turn, of each worker; the other one must be idle meanwhile."""

    def turn(worker: Worker, other: Worker) -> float:
        with Idle(other):
            return float(np.median(worker.ask(word, numbers)))

    for seconds in in_pairs(lambda: turn(ours, theirs), lambda: turn(theirs, ours), rounds):
        yield np.array(seconds)


def speed(model: Path, llama: LlamaCpp, threads: int, rounds: Rounds) -> Iterator[Row]:
    """Prompt and decode, each program in a worker that has the model loaded."""
    for repack, form in FORMS:
        yield from _speed(
            model, llama.serve(str(model), threads, N_CTX, repack=repack), form, threads, rounds
        )


def _speed(model: Path, theirs: list[str], form: str, threads: int, rounds: Rounds) -> Iterator[Row]:
    name = model.stem
    ours = [sys.executable, "-m", "bench.peers.ours", str(model), str(threads), str(N_CTX)]
    with Worker("fq", ours) as fq, Worker("llama.cpp", theirs) as peer:
        if fq.greeting != peer.greeting:
            raise FqError(f"{model}: {fq.greeting} tokens in fq's vocabulary, {peer.greeting} in llama.cpp's")
        # as llama-bench: speed does not depend on which tokens they are
        rng = np.random.default_rng(0)
        ids = rng.integers(0, int(fq.greeting[0]), N_PROMPT).tolist()
        decode = [N_FIRST, *ids[: N_FIRST + N_DECODE]]
        for worker in (fq, peer):  # the first time comes with what is made and read once
            worker.ask("decode", decode)
        a, b = _in_turn(fq, peer, "decode", decode, rounds)
        what = f"decode, {N_DECODE} after {N_FIRST}{form}"
        yield Row(name, "decode", what, "tok/s", threads, 1 / a, 1 / b)
        a, b = _in_turn(fq, peer, "prompt", ids, rounds)
        what = f"prompt of {N_PROMPT}{form}"
        yield Row(name, "prompt", what, "tok/s", threads, N_PROMPT / a, N_PROMPT / b)


def perplexity(
    model: Path, f32: Path, text: Path, llama: LlamaCpp, threads: int, chunks: int, rounds: Rounds
) -> Iterator[Row]:
    """Both processes from start to end: on the same file, and theirs on its F32 version."""
    n_tokens = chunks * PPL_CTX

    def ours() -> Whole:
        options = ["-f", str(text), "-c", str(PPL_CTX), "--chunks", str(chunks), "-t", str(threads)]
        options += ["--chunk-order", "first"]  # as llama.cpp takes them
        command = [sys.executable, "-m", "fq", "perplexity", "-m", str(model), *options]
        return run_whole("fq perplexity", [*command, "--json", "-"])

    def theirs(file: Path) -> Whole:
        command = llama.perplexity(str(file), str(text), PPL_CTX, chunks, threads)
        return run_whole("llama.cpp's perplexity", command)

    for key, file, on in (("perplexity", model, ""), ("perplexity F32", f32, ", llama.cpp on F32")):
        fq, peer = in_pairs(ours, lambda file=file: theirs(file), rounds)
        found = [json.loads(runs[0].output) for runs in (fq, peer)]
        a, b = (float(result["ppl"]) for result in found)
        if not math.isclose(a, b, rel_tol=PPL_TOLERANCE):
            raise FqError(f"perplexity of fq {a:.4f}, of llama.cpp {b:.4f}: not the same work")
        phases = [json.loads(run.output) for run in peer]
        medians = {p: float(np.median([run[p] for run in phases])) for p in phases[0] if p.endswith("_s")}
        about = {"ppl_ours": a, "ppl_theirs": b, "seconds_theirs": medians}
        what = f"perplexity, {chunks} chunks of {PPL_CTX}, whole process{on}"
        rates = ([n_tokens / run.seconds for run in runs] for runs in (fq, peer))
        yield Row(model.stem, key, what, "tok/s", threads, *rates, about)


def cold_start(model: Path, llama: LlamaCpp, threads: int, rounds: Rounds) -> Iterator[Row]:
    """``fq run -n 5`` from start to end, against the same of llama.cpp."""
    command = [sys.executable, "-m", "fq", "run", "-m", str(model), "-p", PROMPT, "-n", str(N_PREDICT)]
    command += ["--ignore-eos", "-t", str(threads)]

    def peer(repack: bool) -> Whole:
        argv = llama.run(str(model), PROMPT, N_PREDICT, threads, repack=repack)
        return run_whole("llama.cpp", argv)

    done = [json.loads(run_whole("fq run", [*command, "--json", "-"]).output)]
    done.append(json.loads(peer(False).output.strip().rpartition("\n")[2]))
    prompts, counts = zip(*((d["prompt_tokens"], len(d["generated_tokens"])) for d in done), strict=True)
    if prompts[0] != prompts[1] or counts[0] != counts[1]:
        raise FqError(f"{model}: not the same work: prompts {prompts}, tokens generated {counts}")
    for repack, form in FORMS:
        ours, theirs = in_pairs(
            lambda: run_whole("fq run", command), lambda repack=repack: peer(repack), rounds
        )
        start = f"run -n {N_PREDICT}, whole process"
        for key, what, unit, figure in (
            ("cold start", f"{start}{form}", "s", lambda run: run.seconds),
            ("peak memory", f"{start}, peak RSS{form}", "MiB", lambda run: run.peak_bytes / 2**20),
        ):
            figures = ([figure(run) for run in runs] for runs in (ours, theirs))
            yield Row(model.stem, key, what, unit, threads, *figures)
