"""Items: what the files of llama-perplexity say, and that a bad one is one clear error."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fq import FqError
from fq.text.items import MAX_ANSWERS, read_items


@pytest.fixture
def read(tmp_path):
    def of(content, kind):
        path = tmp_path / "items"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_items(str(path), kind)

    return of


def string(text):
    return struct.pack("<I", len(text.encode())) + text.encode()


def binary(*items, places=True):
    """Of (question, answers, labels)."""
    parts = []
    for question, answers, labels in items:
        one = struct.pack("<I", len(answers)) + b"".join(map(string, answers))
        one += struct.pack(f"<{len(labels)}I", *labels)
        parts.append(string(question) + one + struct.pack("<I", 0))
    return struct.pack("<I", len(parts)) + bytes(4 * len(parts)) * places + b"".join(parts)


def test_hellaswag(read):
    first, second = read("A man sits.\n2\nzero\none\ntwo\nthree\n\rAgain\n0\na\nb\nc\nd\n", "hellaswag")
    assert first.contexts == ("A man sits.",) * 4 and first.rests == (" zero", " one", " two", " three")
    assert first.right == {2} and second.right == {0} and not first.follows
    assert first.where == "items: line 1" and second.where == "items: line 7"


def test_winogrande(read):
    text = '0,Ann thanked Mary since _ had helped.,Ann,Mary,2\n1,"Well, _ fell, again.",it,he,1\n\n'
    first, second = read(text, "winogrande")
    assert first.contexts == ("Ann thanked Mary since Ann", "Ann thanked Mary since Mary")
    assert first.rests == (" had helped.",) * 2 and first.right == {1} and first.follows
    assert second.contexts == ("Well, it", "Well, he") and second.rests == (" fell, again.",) * 2


def test_multiple_choice(read):
    data = binary(("Où?", ["ici", "là"], [0, 1]), ("Why?", ["so", "no", "yes"], [1, 0, 0]))
    first, second = read(data, "multiple-choice")
    assert first.contexts == ("Où?", "Où?") and first.rests == (" ici", " là") and first.right == {1}
    assert len(second.contexts) == 3 and second.right == {0} and second.where == "items: item 2"


def test_json_lines(read):
    lines = [
        {"question": "Q?", "choices": ["a", "b c"], "answer": 1},
        {"question": "R", "choices": ["x", "y"], "answer": 0},
    ]
    text = "\n\n".join(map(json.dumps, lines)) + "\n"
    for before in ("\ufeff", "\n", "  "):
        assert [item.rests for item in read(before + text, "multiple-choice")] == [
            (" a", " b c"),
            (" x", " y"),
        ]
    first, second = read(text, "multiple-choice")
    assert first.rests == (" a", " b c") and first.right == {1} and second.right == {0}
    assert second.where == "items: line 3"


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("", "hellaswag", "there is no item in it"),
        ("a\n0\nb\nc\n", "hellaswag", "4 lines; HellaSwag's file has six for each item"),
        ("a\n4\nb\nc\nd\ne\n", "hellaswag", "line 2: the right answer's number must be from 0 to 3, not '4'"),
        ("a\n²\nb\nc\nd\ne\n", "hellaswag", "line 2: the right answer's number"),
        ("a\n0\nb\n \nd\ne\n", "hellaswag", "line 1: an answer is empty"),
        (" \n0\nb\nc\nd\ne\n", "hellaswag", "line 1: the question is empty"),
        (b"a\n0\n\xff\nc\nd\ne\n", "hellaswag", "not UTF-8 at byte 4"),
        ("0,a _ b,c,d\n", "winogrande", "line 1: 4 fields; there must be five"),
        ("0,a _ b,c,d,1\n1,a b,c,d,1\n", "winogrande", "line 2: there is no gap _"),
        ("0,a _ b,c,d,3\n", "winogrande", "line 1: the right answer's number must be from 1 to 2"),
        ('0,"a _ b,c,d,1\n', "winogrande", "line 1: unexpected end of data"),
        ('{"question": "q"}', "multiple-choice", "line 1: an object with question, choices and answer"),
        ("{nothing", "multiple-choice", "line 1: no JSON"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "multiple-choice", "answer must be a"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "multiple-choice", "answer must be"),
        ('{"question": "q", "choices": ["a", 2], "answer": 0}', "multiple-choice", "choices must be texts"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', "multiple-choice", "question must be a text"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "multiple-choice", "1 answers; there must be 2"),
        ("{" * 100_000, "multiple-choice", "no JSON"),
        (b"\x01\x00", "multiple-choice", "the file ends before it does"),
        (struct.pack("<I", 2**24 - 1), "multiple-choice", "the file ends before it does"),
        (struct.pack("<III", 1, 8, 2**32 - 1), "multiple-choice", "item 1: the file ends before it does"),
        (binary(("q", ["a", "b"], [0, 0])), "multiple-choice", "item 1: no answer, or one that there is not"),
        (binary(("q", ["a"] * (MAX_ANSWERS + 1), [1] * (MAX_ANSWERS + 1))), "multiple-choice", "101 answers"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_clear_error(read, content, kind, words):
    with pytest.raises(FqError) as caught:
        read(content, kind)
    assert "items" in str(caught.value) and words in str(caught.value)


@given(st.data())
def test_no_file_does_more_than_that(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "items"
    content = bytearray(binary(("Where?", ["here", "there"], [1, 0]), ("When?", ["now", "then"], [0, 1])))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for kind in ("multiple-choice", "hellaswag", "winogrande"):
        try:
            read_items(str(path), kind)
        except FqError:
            continue


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("fq.text.items.MAX_BYTES", 10)
    path = tmp_path / "items"
    path.write_bytes(bytes(11))
    with pytest.raises(FqError, match="larger than"):
        read_items(str(path), "hellaswag")
