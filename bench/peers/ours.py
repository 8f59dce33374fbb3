"""Our worker: as llama_peer.c's ``serve``, over the public interface. MODEL THREADS N_CTX"""

from __future__ import annotations

import sys
from time import perf_counter

from fq import Context, Executor, Model


def main(path: str, threads: str, n_ctx: str) -> None:
    model = Model(path)
    context = Context(model, int(n_ctx), Executor(int(threads)))
    print("ok", model.hparams.n_vocab, flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        n_first, ids = None, list(map(int, numbers))
        if word == "decode":
            n_first, *ids = ids
        elif word != "prompt":
            raise ValueError(f"unknown command {word!r}")
        context.clear()
        begin = perf_counter()
        context.eval(ids[:n_first])
        seconds = [perf_counter() - begin] if n_first is None else []
        for token in [] if n_first is None else ids[n_first:]:
            begin = perf_counter()
            context.eval([token], decoding=True)
            seconds.append(perf_counter() - begin)
        print("ok", *seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
