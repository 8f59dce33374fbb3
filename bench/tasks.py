"""Scores of multiple-choice items by fq tasks, lm-evaluation-harness and llama-perplexity, on the same items.

Of lm-eval's runs with and without a rule each item's log-likelihoods must be fq's to the last bit, and so the
paired difference is fq's. llama-perplexity is a separate program, if one is named: its scores stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fq import find
from fq.machine import processor
from fq_kernels import isa

from .task_items import (
    questions,
    sentences,
    write_hellaswag,
    write_json_lines,
    write_lm_eval_task,
    write_multiple_choice,
    write_winogrande,
)

TASK = "continuations"


def ours(kind: str, file: Path, model: str, rule: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fq", "tasks", f"--{kind}", "-f", str(file), "-m", model]
    done = subprocess.run([*command, "--fake-quant", rule, "--json", "-"], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lm_eval(folder: Path, model: str, rule: str | None) -> list[dict[str, Any]]:
    """What lm-eval has logged of each item, in the file's order."""
    out = folder / f"out{bool(rule):d}"
    arguments = {"model": model} | ({"fake_quant": rule} if rule else {})
    command = [
        sys.executable,
        "-m",
        "fq.lm_eval",
        "run",
        "--model",
        "fq",
        "--model_args",
        json.dumps(arguments),
    ]
    command += ["--tasks", TASK, "--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    env = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    subprocess.run(command, check=True, capture_output=True, env=env)
    (log,) = out.rglob("samples_*.jsonl")
    found = [json.loads(line) for line in log.read_text().split("\n") if line]
    return sorted(found, key=lambda one: int(one["doc_id"]))


def llama(program: str, kind: str, file: Path, model: str, n: int) -> str:
    """The score as its last line has it."""
    command = [
        program,
        "-m",
        model,
        "-f",
        str(file),
        f"--{kind}",
        f"--{kind}-tasks",
        str(n),
        "-t",
        "2",
        "-c",
        "512",
    ]
    command += ["-np", "8", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-kvu"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if kind == "winogrande":
        scores = re.findall(r"^\d+\t(\d+\.\d+)\t", done.stdout, re.MULTILINE)
    else:
        scores = re.findall(r"^\d+\t(\d+\.\d+)%?(?:\t|$)", done.stdout, re.MULTILINE)
    assert len(scores) == n, done.stdout[-2000:] + done.stderr[-2000:]
    return f"{float(scores[-1]):.2f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description=__doc__)
    parser.add_argument("-m", "--model", default="smollm2", metavar="MODEL")
    parser.add_argument("-f", "--file", required=True, metavar="FILE")
    parser.add_argument("--items", type=int, default=240, metavar="N")
    parser.add_argument("--fake-quant", default="*[*].raw=fp8_e4m3fn", metavar="RULE")
    parser.add_argument("--lm-eval", action="store_true", help="also run lm-eval, which must be installed")
    parser.add_argument("--llama-perplexity", metavar="PROGRAM", help="llama.cpp's (default: without it)")
    args = parser.parse_args(argv)
    text, model = Path(args.file).read_text(), str(find(args.model))
    items, gaps = questions(text, args.items), sentences(text, args.items)
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {kind: folder / f"{kind}.items" for kind in ("hellaswag", "winogrande", "multiple-choice")}
        write_hellaswag(items, files["hellaswag"])
        write_winogrande(gaps, files["winogrande"])
        write_multiple_choice(items, files["multiple-choice"])
        write_json_lines(items, folder / "items.jsonl")
        write_lm_eval_task(folder / "items.jsonl", folder, TASK)
        for kind, file in files.items():
            found = ours(kind, file, model, args.fake_quant)
            theirs = (
                llama(args.llama_perplexity, kind, file, model, args.items) if args.llama_perplexity else ""
            )
            rows.append(_row(f"--{kind}: acc_token", found["scores"]["acc_token"], theirs))
        found = ours("multiple-choice", folder / "items.jsonl", model, args.fake_quant)
        if args.lm_eval:
            for which, rule in (("base", None), ("rounded", args.fake_quant)):
                logged = lm_eval(folder, model, rule)
                assert len(logged) == args.items
                for item, log in zip(found["items"], logged, strict=True):
                    ln_p = [
                        float(pair[0][0] if isinstance(pair[0], list) else pair[0])
                        for pair in log["filtered_resps"]
                    ]
                    worst = max(worst, *(abs(a - b) for a, b in zip(ln_p, item[which]["ln_p"], strict=True)))
                for score in ("acc", "acc_norm"):
                    share = sum(log[score] for log in logged) / len(logged)
                    found["scores"][score][f"lm_eval_{which}"] = share
        for score in ("acc", "acc_norm"):
            one = found["scores"][score]
            theirs = ""
            if args.lm_eval:
                theirs = f"{100 * one['lm_eval_base']:.2f} %, rounded {100 * one['lm_eval_rounded']:.2f} %"
            rows.append(_row(f"the same questions: {score}", one, theirs))
    print(f"{processor()}, {isa()}; {args.items} items each, {args.fake_quant}\n")
    print("| | baseline | rounded | difference | 95 % | p | the other program |")
    print("| --- | --: | --: | --: | --- | --: | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if args.lm_eval:
        print(f"\nLargest difference of an answer's ln p from lm-eval's log: {worst:g}")
    return int(worst != 0)


def _row(what: str, one: dict[str, Any], theirs: str) -> list[str]:
    low, high = one["difference_ci95"]
    return [
        what,
        f"{100 * one['base']:.2f} %",
        f"{100 * one['rounded']:.2f} %",
        f"{100 * one['difference']:+.2f} %",
        f"{100 * low:+.2f} % to {100 * high:+.2f} %",
        f"{one['p']:.3g}",
        theirs,
    ]


if __name__ == "__main__":
    sys.exit(main())
