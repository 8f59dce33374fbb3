"""Items made of a text, in the forms that llama-perplexity and lm-evaluation-harness read; none is fetched.

A question is the beginning of a paragraph, the right answer how it goes on, and the others how others do;
of a sentence with a gap, one choice is the word that stood there, and the other a word from another's.
"""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from pathlib import Path

from fq.measure.chunks import chunk_order

BEGINNING, ENDING, GAP = 24, 8, 6  # words


def questions(text: str, n: int) -> list[tuple[str, list[str], int]]:
    """(question, four answers, the right one's number)."""
    paragraphs = [line.split() for line in text.split("\n") if not line.strip().startswith("=")]
    paragraphs = [words for words in paragraphs if len(words) > BEGINNING + ENDING]
    assert len(paragraphs) > n, "the text has too few paragraphs"
    chosen = [paragraphs[i] for i in chunk_order(len(paragraphs), 0)[:n]]
    endings = [" ".join(words[BEGINNING : BEGINNING + ENDING]) for words in chosen]
    found = []
    for i, words in enumerate(chosen):
        order = chunk_order(4, i)
        others = [endings[(i + 1 + j) % n] for j in range(3)]
        answers = [[endings[i], *others][j] for j in order]
        found.append((" ".join(words[:BEGINNING]), answers, order.index(0)))
    return found


def sentences(text: str, n: int) -> list[tuple[str, list[str], int]]:
    """(sentence with a gap, two choices, the right one's number)."""
    found = re.findall(r"(?<=\. )[A-Z][^.\"_\n]{60,200}\.", text)
    split = [words for one in found if (words := one.split(" "))[GAP].isalpha()]
    assert len(split) > n, "the text has too few sentences"
    chosen = [split[i] for i in chunk_order(len(split), 1)[:n]]
    items = []
    for i, words in enumerate(chosen):
        other = next(one[GAP] for one in chosen[i + 1 :] + chosen if one[GAP] != words[GAP])
        right = i % 2
        items.append(
            (" ".join([*words[:GAP], "_", *words[GAP + 1 :]]), [words[GAP], other][:: 1 - 2 * right], right)
        )
    return items


def write_json_lines(items: list[tuple[str, list[str], int]], path: Path) -> None:
    lines = [json.dumps({"question": q, "choices": a, "answer": right}) for q, a, right in items]
    path.write_text("\n".join(lines) + "\n")


def write_hellaswag(items: list[tuple[str, list[str], int]], path: Path) -> None:
    path.write_text("".join(f"{q}\n{right}\n" + "".join(f"{one}\n" for one in a) for q, a, right in items))


def write_winogrande(items: list[tuple[str, list[str], int]], path: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for i, (sentence, choices, right) in enumerate(items):
        writer.writerow([i, sentence, *choices, right + 1])
    # an empty line more: without it llama-perplexity loses the last item
    path.write_text(out.getvalue() + "\n")


def write_multiple_choice(items: list[tuple[str, list[str], int]], path: Path) -> None:
    def string(text: str) -> bytes:
        return struct.pack("<I", len(text.encode())) + text.encode()

    parts = []
    for question, answers, right in items:
        labels = struct.pack(f"<{len(answers)}I", *(int(i == right) for i in range(len(answers))))
        one = struct.pack("<I", len(answers)) + b"".join(map(string, answers)) + labels
        parts.append(string(question) + one + struct.pack("<I", 0))
    at, places = 4 + 4 * len(parts), []
    for part in parts:
        places.append(at)
        at += len(part)
    path.write_bytes(struct.pack(f"<{1 + len(parts)}I", len(parts), *places) + b"".join(parts))


def write_lm_eval_task(items: Path, folder: Path, name: str) -> None:
    """A task of lm-eval's whose items are JSON lines."""
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {json.dumps(str(items))}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        "doc_to_target: answer\n"
        "doc_to_choice: choices\n"
        "metric_list:\n"
        "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n"
    )
