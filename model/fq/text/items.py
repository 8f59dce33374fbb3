"""Questions with answers to choose from, read from the files that llama-perplexity takes, and JSON lines.

A file is untrusted: it is read whole, up to 256 MiB, and what is wrong with it is said with its place.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FqError

MAX_BYTES = 256 << 20
MAX_ANSWERS = 100


@dataclass(frozen=True)
class Item:
    """Whole texts, one by answer, and what of them is scored.

    where     of its file, for messages
    contexts  of each text its beginning, which is given: the question, or up to the end of the answer where
              what follows that is scored
    rests     of each text what follows, a space before it where one belongs there
    right     of the answers, from 0
    follows   what is scored follows the answer, which is in the context
    """

    where: str
    contexts: tuple[str, ...]
    rests: tuple[str, ...]
    right: frozenset[int]
    follows: bool = False


def _question(where: str, question: str, answers: list[str], right: frozenset[int]) -> Item:
    if not question.strip():
        raise FqError(f"{where}: the question is empty")
    if not 2 <= len(answers) <= MAX_ANSWERS:
        raise FqError(f"{where}: {len(answers)} answers; there must be 2 to {MAX_ANSWERS}")
    for answer in answers:
        if not answer.strip():
            raise FqError(f"{where}: an answer is empty")
    if not right or max(right) >= len(answers):
        raise FqError(f"{where}: no answer, or one that there is not, is right")
    return Item(where, (question,) * len(answers), tuple(f" {answer}" for answer in answers), right)


def _hellaswag(name: str, content: bytes) -> Iterator[Item]:
    """Six lines each: the context, the right ending's number, four endings."""
    lines = _text(name, content).split("\n")
    if lines and not lines[-1]:
        del lines[-1]
    if len(lines) % 6:
        raise FqError(f"{name}: {len(lines)} lines; HellaSwag's file has six for each item")
    for i in range(0, len(lines), 6):
        where = f"{name}: line {i + 1}"
        context, label, *endings = (line.removesuffix("\r") for line in lines[i : i + 6])
        yield _question(where, context, endings, frozenset({_number(f"{name}: line {i + 2}", label, 0, 3)}))


def _winogrande(name: str, content: bytes) -> Iterator[Item]:
    """CSV lines without a heading: number, sentence with a gap _, two choices, the right one's number."""
    reader = csv.reader(io.StringIO(_text(name, content), newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise FqError(f"{name}: line {reader.line_num}: {e}") from None
        where = f"{name}: line {reader.line_num}"
        if not row:
            continue
        if len(row) != 5:
            raise FqError(
                f"{where}: {len(row)} fields; there must be five: number, sentence, two choices, answer"
            )
        _, sentence, *choices, answer = row
        before, gap, after = sentence.partition("_")
        if not gap:
            raise FqError(f"{where}: there is no gap _ in the sentence")
        right = _number(where, answer, 1, 2) - 1
        yield Item(where, tuple(before + one for one in choices), (after, after), frozenset({right}), True)


def _multiple_choice(name: str, content: bytes) -> Iterator[Item]:
    """llama-perplexity's binary file, or a line of JSON each: question, choices, answer."""
    # a number of items has a byte of 0, which no text has
    if b"\0" not in content[:4]:
        yield from _json_lines(name, content)
        return
    reader = _Reader(name, content)
    (n,) = reader.numbers(1)
    reader.take(4 * n)  # where each begins, which follows from the rest
    for i in range(n):
        where = reader.where = f"{name}: item {i + 1}"
        question = reader.string()
        answers, labels = reader.answers()
        reader.answers()  # a second list, which has several right answers and no score
        right = frozenset(j for j, label in enumerate(labels) if label == 1)
        yield _question(where, question, answers, right)


def _json_lines(name: str, content: bytes) -> Iterator[Item]:
    for i, line in enumerate(_text(name, content).split("\n")):
        where = f"{name}: line {i + 1}"
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            question, choices, answer = found["question"], found["choices"], found["answer"]
        except (ValueError, RecursionError) as e:
            raise FqError(f"{where}: no JSON: {e}") from None
        except (KeyError, TypeError):
            raise FqError(f"{where}: an object with question, choices and answer is wanted") from None
        if not (isinstance(question, str) and isinstance(choices, list)):
            raise FqError(f"{where}: question must be a text, and choices a list of texts")
        if not all(isinstance(choice, str) for choice in choices):
            raise FqError(f"{where}: choices must be texts")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise FqError(f"{where}: answer must be a choice's number, from 0")
        yield _question(where, question, choices, frozenset({answer}))


class _Reader:
    """Little-endian numbers and strings, each looked at before it is taken."""

    def __init__(self, name: str, content: bytes) -> None:
        self.where, self._content, self._at = name, content, 0

    def take(self, n: int) -> bytes:
        if n > len(self._content) - self._at:
            raise FqError(f"{self.where}: the file ends before it does")
        self._at += n
        return self._content[self._at - n : self._at]

    def numbers(self, n: int) -> tuple[int, ...]:
        return struct.unpack(f"<{n}I", self.take(4 * n))

    def string(self) -> str:
        (n,) = self.numbers(1)
        return _text(self.where, self.take(n))

    def answers(self) -> tuple[list[str], tuple[int, ...]]:
        (n,) = self.numbers(1)
        if n > MAX_ANSWERS:
            raise FqError(f"{self.where}: {n} answers; there must be at most {MAX_ANSWERS}")
        return [self.string() for _ in range(n)], self.numbers(n)


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise FqError(f"{where}: not UTF-8 at byte {e.start}") from None


def _number(where: str, text: str, low: int, high: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 9 and low <= int(text) <= high):
        raise FqError(f"{where}: the right answer's number must be from {low} to {high}, not {text[:20]!r}")
    return int(text)


KINDS: dict[str, Callable[[str, bytes], Iterator[Item]]] = {
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "multiple-choice": _multiple_choice,
}


def read_items(path: str, kind: str) -> list[Item]:
    """Of a file in the form that KINDS names. Raises FqError naming the file and the place in it."""
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise FqError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    items = list(KINDS[kind](Path(path).name, content))
    if not items:
        raise FqError(f"{path}: there is no item in it")
    return items
