"""Tokenizer: known token lists, round trips, special tokens, streaming, chat templates, hostile metadata.

The vocabularies are made here. The expected lists, for them and for SmolLM2, are llama.cpp's.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from fq.errors import FqError
from fq.text.pre_tokenizers import _ROWS, PRE_TOKENIZERS
from fq.text.segments import _Words, byte_level_segments
from fq.text.tokenizer import _N_SHORT_TEXTS, Tokenizer, TokenizerError
from fq.text.vocabulary import Vocabulary
from fq_kernels import GGUFStrings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
NEEDS_ALL_MERGES = "a " * 30_000  # a text too long for a merger of its own

# x, y and z are no tokens by themselves.
SPM_PIECES = [
    *"\u2581 h e l o w r d a b ll he or ld \u2581w llo \u2581h \u2581he hello \u2581hello \u2581wor".split(),
    *"\u2581world ab aa ba aba aaa \u2581\u2581 \u2581\u2581\u2581\u2581 yz xyz abyz".split(),
]
# \u0120 is a space, \u010a a line feed; the last two make the first three bytes of an emoji.
BPE_MERGES = (
    "h e|l l|he ll|hell o|\u0120 w|o r|\u0120w or|l d|\u0120wor ld|\u0120 hello|1 2|12 3|\u010a \u010a|"
    "\u0120 \u0120|\u0120\u0120 \u0120\u0120|' s|\xf0 \u0141|\xf0\u0141 \u013a"
).split("|")
CHATML = (
    "{% for m in messages %}\n  {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spm_metadata(**changes: object) -> dict[str, object]:
    """259 + len(SPM_PIECES) + 2 tokens: unk, bos, eos, bytes, pieces in falling score, [tag], <|eot_id|>."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens = [*head, *SPM_PIECES, "[tag]", "<|eot_id|>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(SPM_PIECES), USER_DEFINED, CONTROL]
    scores = np.zeros(len(tokens), np.float32)
    scores[259:-2] = -np.arange(len(SPM_PIECES))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def bpe_metadata(**changes: object) -> dict[str, object]:
    """256 byte characters in code point order, the merged tokens, then the special tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in BPE_MERGES]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[tag]"]
    types = [NORMAL] * len(tokens) + [CONTROL] * 3 + [USER_DEFINED]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + special,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": BPE_MERGES,
        "tokenizer.ggml.bos_token_id": len(tokens) + 1,
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
        "tokenizer.chat_template": CHATML,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


# Line feeds of 2 and 3 are tokens that no merge makes.
RAW_MERGES = (
    "h e|l l|he ll|hell o|\u2581 w|o r|\u2581w or|l d|\u2581wor ld|"
    "\u2581 \u2581|\u2581\u2581 \u2581\u2581|é é"
).split("|")


def raw_metadata(**changes: object) -> dict[str, object]:
    """unk, bos, eos, 255 bytes (of é the second is missing), characters, merged tokens, line feeds, [tag]."""
    merged = [m.replace(" ", "") for m in RAW_MERGES]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256) if b != 0xA9)]
    tokens += [*"\u2581helowrd\n", "é", *merged, "\n\n", "\n\n\n", "[tag]"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 255]
    types += [NORMAL] * (len(tokens) - len(types) - 1) + [USER_DEFINED]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": RAW_MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def without(metadata: dict[str, object], key: str) -> dict[str, object]:
    return {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}


def without_bytes() -> dict[str, object]:
    """A vocabulary of six tokens, so that most characters are unknown."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]
    types = np.array([UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL], np.int32)
    return spm_metadata(tokens=tokens, scores=np.arange(6, dtype=np.float32), token_type=types)


SPM = Tokenizer.from_metadata(spm_metadata())
RAW = Tokenizer.from_metadata(raw_metadata())
BPE = Tokenizer.from_metadata(bpe_metadata())


def spm_reference(text: str) -> list[int]:
    """llama.cpp's rule in its plainest form: join the best, then leftmost, neighbours until none do."""
    metadata = spm_metadata()
    ids = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(("\u2581" + text).replace(" ", "\u2581")) if text else []
    while True:
        pairs = [(a + b, i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        whole, i = max(pairs, key=lambda pair: (scores[ids[pair[0]]], -pair[1]))
        symbols[i : i + 2] = [whole]
    found = [[ids[s]] if s in ids else [ids[f"<0x{b:02X}>"] for b in s.encode()] for s in symbols]
    return [i for part in found for i in part]


def raw_reference(text: str) -> list[int]:
    """llama.cpp's rule of Gemma 4: in each line the merge of lowest rank, leftmost first, till none is."""
    ids = {t: i for i, t in enumerate(raw_metadata()["tokenizer.ggml.tokens"])}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(RAW_MERGES)}
    found: list[int] = []
    for line in re.findall("\n+|[^\n]+", text.replace(" ", "\u2581")):
        symbols = [line] if line in ids and line[0] == "\n" else list(line)
        while pairs := [(rank[p], i) for i, p in enumerate(pairwise(symbols)) if p in rank]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for s in symbols:
            found += (
                [ids[s]] if s in ids else [ids[b] for b in map("<0x{:02X}>".format, s.encode()) if b in ids]
            )
    return found


SPM_KNOWN = [
    ("", False, [1]),
    (" ", False, [1, 286]),
    ("hello", False, [1, 278]),
    ("hello world", False, [1, 278, 280]),
    (" hello  world", False, [1, 259, 278, 259, 280]),
    ("aaaaa", False, [1, 259, 282, 285]),
    ("ababa abaab", False, [1, 259, 281, 284, 259, 284, 281]),
    ("xyz", False, [1, 259, 289]),
    ("x", False, [1, 259, 123]),
    ("yz y", False, [1, 259, 288, 259, 124]),
    ("abyz xab", False, [1, 259, 290, 259, 123, 281]),
    ("\xe9", False, [1, 259, 198, 172]),
    ("\U0001f600 a", False, [1, 259, 243, 162, 155, 131, 259, 267]),
    ("a\nb", False, [1, 259, 267, 13, 268]),
    ("hello</s>", False, [1, 278, 63, 50, 118, 65]),
    ("hello</s>", True, [1, 278, 2]),
    ("<s>hello", False, [1, 259, 63, 118, 65, 277]),
    ("<s>hello", True, [1, 1, 278]),
    ("[tag]hello", False, [1, 291, 278]),
    ("hello[tag] world", False, [1, 278, 291, 259, 280]),
    ("a<|eot_id|>b<s>", True, [1, 259, 267, 292, 259, 268, 1]),
    ("      a", False, [1, 287, 286, 259, 267]),
    ("\u2581hello", False, [1, 259, 278]),
    ("<unk>a", True, [1, 0, 259, 267]),
]
BPE_KNOWN = [
    ("", False, []),
    ("hello world hello", False, [259, 264, 265]),
    ("12345 123", False, [16, 17, 18, 19, 20, 220, 16, 17, 18]),
    ("a12\u0662b", False, [64, 16, 17, 149, 95, 65]),
    ("\n\n\na", False, [268, 198, 64]),
    ("a \n\n b", False, [64, 220, 268, 220, 65]),
    ("     hello", False, [270, 265]),
    ("it's 's", False, [72, 83, 271, 220, 6, 82]),
    ("\U0001f600", False, [273, 222]),
    ("\U0001f601x", False, [273, 223, 87]),
    ("<|im_end|>hello", False, [27, 91, 72, 76, 62, 68, 77, 67, 91, 29, 259]),
    ("<|im_end|>hello", True, [276, 259]),
    ("hello[tag] world", False, [259, 277, 264]),
    ("<|im_start|>user\n[tag]<|im_end|>", True, [275, 84, 82, 68, 81, 198, 277, 276]),
    ("a\u2028b", False, [64, 158, 222, 101, 65]),
    ("HELLO'S hello's", False, [39, 36, 43, 43, 46, 6, 50, 265, 271]),
]
PRE_KNOWN = [
    ("gpt-2", "$hello+12.123", [3, 259, 10, 266, 13, 267]),
    ("gpt-2", "12345 123", [267, 19, 20, 220, 267]),
    ("default", "12345 123", [267, 19, 20, 220, 267]),
    ("default", "HELLO'S hello's", [39, 36, 43, 43, 46, 6, 50, 265, 6, 82]),
    ("llama-bpe", "12345 123", [275, 267, 19, 20, 220, 267]),
    ("llama-bpe", "HELLO'S hello's", [275, 39, 36, 43, 43, 46, 6, 50, 265, 271]),
    ("qwen2", "12345 123", [16, 17, 18, 19, 20, 220, 16, 17, 18]),
    ("qwen2", "$hello+12.123", [3, 259, 10, 16, 17, 13, 16, 17, 18]),
]
SMOLLM2_KNOWN = [
    ("", False, []),
    ("Hello world", False, [19556, 905]),
    (" Hello, World!\n\n", False, [38699, 28, 2260, 17, 1116]),
    (
        "In 2024 it cost 1234567.89",
        False,
        [788, 216, 34, 32, 34, 36, 357, 1708, 216, 33, 34, 35, 36, 37, 38, 39, 30, 40, 41],
    ),
    ("  two  spaces\t\ttabs\r\n", False, [216, 827, 216, 5600, 197, 197, 100, 7366, 2738]),
    ("don't I'LL we're", False, [12420, 982, 339, 23, 16421, 392, 2316]),
    (
        "\U0001f600 \U0001f469\u200d\U0001f467",
        False,
        [10813, 242, 218, 15107, 235, 119, 321, 231, 10813, 235, 117],
    ),
    ("cafe\u0301 caf\xe9", False, [83, 9980, 151, 219, 37366]),
    ("\u4f60\u597d", False, [18645, 250, 48392, 138]),
    # The vocabulary has no token for the byte 0x16: it is dropped, and keeps its neighbours apart.
    ("a\x16)b", False, [81, 25, 82]),
    (")\x16)", False, [25, 25]),
    (
        "<|im_start|>user\nhi<|im_end|>",
        False,
        [44, 108, 306, 79, 3738, 108, 46, 4093, 198, 6004, 44, 108, 306, 79, 486, 108, 46],
    ),
    ("<|im_start|>user\nhi<|im_end|>", True, [1, 4093, 198, 6004, 2]),
    (
        "x = {'a': [1, 2]}  # ok",
        False,
        [104, 446, 7353, 81, 1539, 933, 33, 28, 216, 34, 28852, 216, 907, 10907],
    ),
]


@pytest.mark.parametrize(("text", "parse_special", "ids"), SPM_KNOWN)
def test_spm_known_ids(text, parse_special, ids):
    assert SPM.encode(text, parse_special=parse_special) == ids


@pytest.mark.parametrize(("text", "parse_special", "ids"), BPE_KNOWN)
def test_bpe_known_ids(text, parse_special, ids):
    assert BPE.encode(text, parse_special=parse_special) == ids


@pytest.mark.parametrize(("pre", "text", "ids"), PRE_KNOWN)
def test_pre_tokenizers_differ_as_they_should(pre, text, ids):
    assert Tokenizer.from_metadata(bpe_metadata(pre=pre)).encode(text) == ids


@pytest.mark.parametrize(("pre", "text", "words"), [
    ("gpt-2", "I'm X'S 12345.\nabCd", "I|'m| X|'|S| 12345|.|\n|abCd"),
    ("olmo", "I'm X'S 12345.\nabCd", "I|'m| X|'|S| 12345|.|\n|abCd"),
    ("exaone4", "12345", "12345"),
    ("smollm", "X'S 12345.\nabCd", "X|'|S| |1|2|3|4|5|.|\n|abCd"),
    ("command-r", "a 12", "a| |1|2"),
    ("llama-bpe", "I'm X'S 12345.\nabCd", "I|'m| X|'S| |123|45|.\n|abCd"),
    ("glm4", "X'S 12345", "X|'S| |123|45"),
    ("qwen2", "X'S 123.\n", "X|'S| |1|2|3|.\n"),
    ("qwen35", "a\u0301b 12", "a\u0301b| |1|2"),
    ("minicpm5", "12345", "123|45"),
    ("falcon", "a `b 12345", "a| |`|b| |123|45"),
    ("default", "a `b 12345", "a| `|b| |123|45"),
    ("gpt-4o", "abCd X's 1234.\n/E", "ab|Cd| X's| |123|4|.\n/|E"),
    ("tekken", "abCd X's 12./\nE", "ab|Cd| X|'s| |1|2|./\n|E"),
    ("deepseek-llm", "ab!\r\n 中文12 я.", "ab|!|\r|\n| |中文|12| я|."),
    ("deepseek-llm", "  \u3000\u2003\u3002中\u2003文", "  \u3000|\u2003|\u3002|中|\u2003|文"),
    ("deepseek-coder", "ab! 中文12", "ab|!| |中文|1|2"),
    ("deepseek-coder", "中\u2003文\u3000", "中|\u2003|文|\u3000"),
    ("deepseek-v3", "a!b 中文12345.\n", "a|!b| |中文|123|45|.\n"),
    ("spark2_5", "a!b 中文12345.\n", "a|!b| |中文|1|2|3|4|5|.|\n"),
    ("bloom", "a, , b1 (c) d", "a|, ,| b1| (|c|)| d"),
    ("viking", "a, , b1 (c) d", "a|, ,| b|1| (|c|)| d"),
    ("jais-2", "a" + " " * 7 + "b1234", "a|    |  | b|123|4"),
    ("bailingmoe", "a'Ll b\n\nc", "a|'Ll| b|\n\n|c"),
    ("seed-coder", "a!!\n12", "a|!!|\n|1|2"),
    ("ufakzeka", "a's 12", "a|'s| |1|2"),
    ("laguna", "a  \n\n b", "a|  |\n\n| b"),
])  # fmt: skip
def test_what_pre_tokenizers_cut(pre, text, words):
    """By the library, which merges what is inside of a word alone, and by the search in long texts."""
    patterns = PRE_TOKENIZERS[pre].patterns
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    found = pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
    assert [word for word, _ in found] == words.split("|")
    assert [text[b:e] for b, e in _Words(text, patterns)._spans(0, len(text))] == words.split("|")


def test_pre_tokenizers_are_each_named_once():
    assert len(PRE_TOKENIZERS) == sum(len(names) for names, _ in _ROWS)


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    from fq.gguf.file import GGUFFile

    with GGUFFile(smollm2_path) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.mark.parametrize(("text", "parse_special", "ids"), SMOLLM2_KNOWN)
def test_smollm2_known_ids(smollm2, text, parse_special, ids):
    assert smollm2.encode(text, parse_special=parse_special) == ids


def test_smollm2_attributes(smollm2):
    assert (smollm2.kind, smollm2.n_vocab, smollm2.bos_id, smollm2.eos_id) == ("gpt2", 49152, 1, 2)
    assert (smollm2.add_bos, smollm2.add_eos, smollm2.eog_ids) == (False, False, {0, 2, 4})


def test_smollm2_chat(smollm2):
    prompt = smollm2.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    )
    assert prompt == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode(prompt, add_special=False, parse_special=True)
    assert ids == [1, 9690, 198, 67, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert smollm2.decode(ids, skip_special=False) == prompt


def test_the_libraries_are_imported_when_used():
    code = "import sys, fq.text.tokenizer; sys.exit(bool({'tokenizers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_attributes():
    assert (SPM.kind, SPM.n_vocab, SPM.bos_id, SPM.eos_id, SPM.unk_id) == ("llama", 293, 1, 2, 0)
    assert (SPM.add_bos, SPM.add_eos, SPM.add_space_prefix, SPM.chat_template) == (True, False, True, None)
    assert (BPE.kind, BPE.n_vocab, BPE.bos_id, BPE.eos_id, BPE.unk_id) == ("gpt2", 278, 275, 276, None)
    assert (BPE.add_bos, BPE.add_eos, BPE.add_space_prefix) == (False, False, False)
    assert BPE.chat_template == CHATML
    # eos, what the metadata names, and what is known by its text
    assert (SPM.eog_ids, BPE.eog_ids) == ({2, 292}, {274, 276})
    assert Tokenizer.from_metadata(spm_metadata(eot_token_id=5, eom_token_id=6)).eog_ids == {2, 5, 6, 292}


def test_a_token_known_as_an_end_is_special_whatever_its_type():
    metadata = bpe_metadata(token_type=np.full(BPE.n_vocab, NORMAL, np.int32))
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("hello<|im_end|>", parse_special=True) == [259, 276]
    assert tokenizer.decode([259, 276]) == "hello"


def with_texts(*texts: str, **changes: object) -> Tokenizer:
    """The BPE vocabulary and more tokens, which are NORMAL."""
    metadata = bpe_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], *texts]
    types = [*metadata["tokenizer.ggml.token_type"], *[NORMAL] * len(texts)]
    return Tokenizer.from_metadata(
        bpe_metadata(tokens=tokens, token_type=np.array(types, np.int32), **changes)
    )


@pytest.mark.parametrize("end", ["<|return|>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["])
def test_ends_by_their_text(end):
    tokenizer = with_texts(end)
    assert tokenizer.eog_ids == BPE.eog_ids | {278}
    assert tokenizer.encode(f"hello{end}", parse_special=True) == [259, 278]
    assert 278 not in tokenizer.encode(end)
    assert tokenizer.decode([259, 278]) == "hello"


def test_fill_in_tokens_by_their_text():
    texts = [
        "<|fim_prefix|>",
        "<fim-suffix>",
        "<\uff5cfim\u2581end\uff5c>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    ]
    tokenizer = with_texts(*texts)
    assert tokenizer.encode("".join(texts), parse_special=True) == [*range(278, 284)]
    assert not {*range(278, 284)} & {*tokenizer.encode("".join(texts))}
    assert tokenizer.eog_ids == BPE.eog_ids | {281, 282, 283}
    # a token that a key names is it, and its type stays; by text none is looked for
    named = with_texts(*texts, fim_pad_token_id=1, prefix_token_id=2)
    assert named.eog_ids == BPE.eog_ids | {1, 282, 283}
    assert named.encode("<|fim_pad|>", parse_special=True) == BPE.encode("<|fim_pad|>")
    assert named.encode("<|fim_prefix|>", parse_special=True) == BPE.encode("<|fim_prefix|>")
    assert named.decode([1, 2]) == BPE.decode([1, 2]) != ""


def test_families_in_which_a_text_is_no_end():
    harmony = with_texts("<|end|>", "<|return|>", "<|call|>", "<|channel|>")
    assert harmony.eog_ids == BPE.eog_ids | {279, 280}
    assert harmony.encode("<|end|><|channel|>") == [278, 281]  # user defined: parsed anywhere, and shown
    assert harmony.decode([278, 281]) == "<|end|><|channel|>"
    assert with_texts("<|end|>", "<|calls|>", "<|flush|>").eog_ids == BPE.eog_ids | {279, 280}
    assert with_texts("<|end|>", "<|call|>").eog_ids == BPE.eog_ids | {278, 279}
    gemma = with_texts("</s>", "<|tool_response>")
    assert gemma.eog_ids == BPE.eog_ids | {279}
    assert gemma.decode([278]) == "</s>"


def test_tokens_of_phi_3_take_the_space_after_them():
    for name, plain in (("Phi-3 mini", False), ("phi3", False), ("Phi-2", True)):
        tokenizer = Tokenizer.from_metadata(bpe_metadata() | {"general.name": name})
        spaced = tokenizer.encode("<|im_end|> \nhello<|endoftext|> world", parse_special=True)
        assert spaced == ([276, 220, 198] if plain else [276]) + [259, 274, 264]


OUT_OF_RANGE = [
    ("bos_token_id", 293, (1, 2, 0)),
    ("eos_token_id", 2**32 - 1, (1, 2, 0)),
    ("unknown_token_id", 293, (1, 2, 0)),
    ("eot_token_id", 293, (1, 2, 0)),
    ("fim_pad_token_id", 999, (1, 2, 0)),
]


@pytest.mark.parametrize(("key", "value", "ids"), OUT_OF_RANGE)
def test_ids_out_of_range_fall_back(key, value, ids):
    with pytest.warns(
        UserWarning, match=rf"tokenizer\.ggml\.{key} is {value}, outside the vocabulary of 293"
    ):
        spm = Tokenizer.from_metadata(spm_metadata(**{key: value}))
    assert (spm.bos_id, spm.eos_id, spm.unk_id) == ids and spm.eog_ids == SPM.eog_ids
    with pytest.warns(UserWarning, match="taken as not given"):
        bpe = Tokenizer.from_metadata(bpe_metadata(eos_token_id=2**20))
    assert (bpe.eos_id, bpe.eog_ids) == (None, BPE.eog_ids)


def test_defaults_when_the_metadata_says_nothing():
    bare = spm_metadata()
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        bare = without(bare, key)
    spm = Tokenizer.from_metadata(bare)
    assert (spm.bos_id, spm.eos_id, spm.unk_id, spm.add_bos) == (1, 2, 0, True)
    bpe = Tokenizer.from_metadata(without(without(bpe_metadata(), "bos_token_id"), "pre"))
    assert (bpe.bos_id, bpe.add_bos) == (None, False)


def test_bos_eos_and_space_prefix_follow_the_metadata():
    changed = Tokenizer.from_metadata(
        spm_metadata(add_bos_token=False, add_eos_token=True, add_space_prefix=False)
    )
    assert changed.encode("hello") == [277, 2]
    assert changed.encode("hello", add_special=False) == [277]
    assert changed.decode([278]) == " hello"
    assert Tokenizer.from_metadata(bpe_metadata(add_bos_token=True)).encode("hello") == [275, 259]


def test_ignore_merges_takes_a_whole_word():
    metadata = bpe_metadata(pre="llama-bpe", merges=BPE_MERGES[:3], add_bos_token=False)
    assert Tokenizer.from_metadata(metadata).encode("hello") == [259]
    metadata["tokenizer.ggml.pre"] = "smollm"
    assert Tokenizer.from_metadata(metadata).encode("hello") == [258, 78]


def test_spm_tokens_that_span_words():
    metadata = spanning_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    spanning = Tokenizer.from_metadata(metadata)
    assert [tokens[i] for i in spanning.encode("a b", add_special=False)] == ["\u2581", "a\u2581b"]
    # so a text must not be cut between its words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fq.text.tokenizer._SEGMENT", 1)
        assert [tokens[i] for i in spanning.encode("a b", add_special=False)] == ["\u2581", "a\u2581b"]


def spanning_metadata() -> dict[str, object]:
    """As spm_metadata, with tokens that span words."""
    metadata = spm_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("aaa")] = "a\u2581"
    tokens[tokens.index("xyz")] = "a\u2581b"
    return metadata


ALPHABETS = [
    "helowrd  '1\n\u00e9", "ab x", "xyz\u2581", "абвгд  ,.\n", "的一是了不，。", "0123456789,.-\n",
    "  \n\r\t\x0b\x1c\u2028\u3000a", "'s'll're .\n\n", "१२३٣٤৪\ua7cf\U0001df25\u0903",
    "£ 1中a\n", "😀👩‍👧é🏳️‍🌈", "def f(x):\n\t return x_1 + '#", "$hello+12.123",
]  # fmt: skip
# runs of one character too, which st.text hardly ever makes
LONG = st.sampled_from(ALPHABETS).flatmap(
    lambda alphabet: st.lists(
        st.tuples(st.sampled_from(alphabet), st.sampled_from([1, 1, 1, 2, 3, 30])), max_size=60
    ).map(lambda runs: "".join(char * n for char, n in runs))
)


@pytest.mark.parametrize("pre", {rule: name for name, rule in PRE_TOKENIZERS.items()}.values())
@given(text=LONG)
@example(text="a.\n/b, c;\n/d x1 " * 5)
@example(text="£ " * 30)
@example(text="£ 1£ 中£ a£ \n" * 5)
@example(text="aa£" + " " * 30 + "1")
def test_segments_have_the_words_of_the_whole(pre, text):
    """Whatever the vocabulary is: also of rules whose words hold spaces, or go on after a line feed."""
    rule = PRE_TOKENIZERS[pre]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    by_all = pre_tokenizers.Sequence(splits)

    def words(part: str, is_word: bool) -> list[str]:
        return [part] if is_word else [word for word, _ in by_all.pre_tokenize_str(part)]

    whole = words(text, False) if text else []
    for size in (1, 2, 3, 17):
        segments = byte_level_segments(text, rule.patterns, size, rule.breaks)
        assert [word for segment in segments for word in words(*segment)] == whole


@given(LONG | st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "replace")), st.data())
def test_long_texts_have_the_ids_of_the_whole(text, data):
    """However short the segments and the windows are."""
    limit = data.draw(st.integers(0, 2 * len(text)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fq.text.tokenizer._N_SHORT_TEXTS", 0)
        for tokenizer in CUTTING:
            patch.setattr("fq.text.tokenizer._SEGMENT", 1 << 40)
            whole = tokenizer.encode(text)
            patch.setattr("fq.text.bpe.WINDOW", 1)
            for size in (1, 3, 17):
                patch.setattr("fq.text.tokenizer._SEGMENT", size)
                assert tokenizer.encode(text) == whole
                assert tokenizer.encode(text, limit=limit) == whole[:limit]


CUTTING = [
    Tokenizer.from_metadata(metadata) for metadata in (
        *(bpe_metadata(pre=pre) for pre in {rule: name for name, rule in PRE_TOKENIZERS.items()}.values()),
        spm_metadata(), without_bytes(), spanning_metadata(), raw_metadata(),
    )
]  # fmt: skip


def test_a_window_whose_end_reaches_back_to_its_beginning():
    """A chain of pairs, each of which goes before the one on its left: the last character decides how all
    others pair, so that no window but the whole is right."""
    chars = [chr(0x4E00 + i) for i in range(400)]
    tokens = ["<unk>", "<s>", "</s>", *chars, *(a + b for a, b in pairwise(chars))]
    types = np.array([UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 3)], np.int32)
    scores = np.arange(len(tokens), dtype=np.float32)  # the rightmost pair is the best
    chain = Tokenizer.from_metadata(
        spm_metadata(tokens=tokens, scores=scores, token_type=types, add_space_prefix=False)
    )
    for n in (399, 400):
        expected = [tokens.index(c) for c in chars[: n % 2]]
        expected += [tokens.index(chars[i] + chars[i + 1]) for i in range(n % 2, n, 2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fq.text.bpe.WINDOW", 16)
            patch.setattr("fq.text.tokenizer._SEGMENT", 8)
            assert chain.encode("".join(chars[:n]), add_special=False) == expected


MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
from test_tokenizer import BPE, RAW, SPM
n, kind, part = 500_000 // len(sys.argv[2].encode()), sys.argv[1], sys.argv[2]
tokenizer = {{"gpt2": BPE, "llama": SPM, "gemma4": RAW}}[kind]
text = part * n
tokenizer.encode("hello " * 20_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = tokenizer.encode(text)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 // len(text.encode()))
"""


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("gpt2", "и не на "), ("gpt2", "12.5,-7\n"), ("gpt2", "的一是"), ("gpt2", "a"),
        ("llama", "и не на "), ("llama", "a"), ("gemma4", "hello\n"), ("gemma4", "a"),
    ],
    ids=["words", "csv", "chinese", "one word", "spm words", "spm word", "lines", "one line"],
)  # fmt: skip
def test_memory_per_byte_of_text(kind, part):
    program = MEMORY.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program, kind, part], capture_output=True, text=True)
    assert int(done.stdout) < 60, done.stderr


def test_spm_without_byte_tokens_uses_the_unknown_token():
    spm = Tokenizer.from_metadata(without_bytes())
    assert spm.encode("ab a") == [1, 5, 0, 5]
    assert spm.decode([1, 5, 0, 5], skip_special=False) == "<s> a<unk> a"


@given(st.text(alphabet="helowrdabxyz \u00e9", max_size=30))
def test_spm_equals_the_plain_rule(text):
    assert SPM.encode(text, add_special=False) == spm_reference(text)


@given(st.lists(st.sampled_from(["\n", "\n\n\n", "hello world", "©é", "éé"]) | st.text("helowrd é\u20ac\n")))
def test_bpe_on_characters_equals_the_plain_rule(parts):
    text = "".join(parts)
    assert RAW.encode(text, add_special=False) == raw_reference(text)


def test_bpe_on_characters():
    known = [RAW._tokens.index[t] for t in ("hello", "\u2581world", "\n\n", "\u2581", "é")]
    assert RAW.encode("hello world\n\n é") == [1, *known]
    assert RAW.decode(known) == "hello world\n\n é"
    # the Euro sign's bytes
    assert RAW.decode(RAW.encode("\u20ac")) == "\u20ac" and len(RAW.encode("\u20ac")) == 1 + 3
    assert Tokenizer.from_metadata(raw_metadata(add_bos_token=False)).add_bos  # as llama.cpp overrides it


MIXED = st.lists(
    st.sampled_from(["hello", " world", "\u2581", "[tag]", "aba", "xyz", " ", "\n"]) | st.text(max_size=3)
)


@given(MIXED.map("".join), st.booleans())
def test_a_merger_for_one_text_gives_the_ids_of_the_one_for_all(text, parse_special):
    made = spm_metadata(), bpe_metadata(), without_bytes(), bpe_metadata(pre="llama-bpe"), raw_metadata()
    for metadata in made:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fq.text.tokenizer._SHORT_TEXT", 1 << 40)
            one = Tokenizer.from_metadata(metadata)
            ids = one.encode(text, parse_special=parse_special)
            patch.setattr("fq.text.tokenizer._N_SHORT_TEXTS", 0)
            assert one.encode(text, parse_special=parse_special) == ids


def test_which_texts_get_a_merger_of_their_own():
    tokenizer = Tokenizer.from_metadata(bpe_metadata())
    tokenizer.encode("[tag]", parse_special=True)
    assert tokenizer._n_short_texts == 0  # no text is left to merge
    for i in range(_N_SHORT_TEXTS + 1):
        assert (tokenizer._n_short_texts, tokenizer._merger) == (i, None)
        tokenizer.encode("hello")
    assert tokenizer._merger is not None
    tokenizer = Tokenizer.from_metadata(bpe_metadata())
    assert len(tokenizer.encode("hello" * 10_000)) == 10_000
    assert tokenizer._n_short_texts == 0


@given(st.text())
def test_bpe_round_trip(text):
    assert BPE.decode(BPE.encode(text)) == text


@given(st.text())
def test_bpe_bytes_are_the_text(text):
    assert b"".join(BPE.token_bytes(i) for i in BPE.encode(text)) == text.encode()


@given(st.text().filter(lambda s: "\u2581" not in s and "[tag]" not in s))
def test_spm_round_trip(text):
    assert SPM.decode(SPM.encode(text)) == text


@given(st.text())
def test_control_tokens_never_come_from_plain_text(text):
    ids = BPE.encode(f"{text}<|im_end|>{text}<|endoftext|>", add_special=False)
    assert not {274, 275, 276} & set(ids)


def test_long_runs_are_not_quadratic():
    # A quadratic merge of these would run for hours.
    assert SPM.encode(" " * 1_000_003, add_special=False) == [287] * 250_001
    assert len(BPE.encode(" " * 1_000_000)) == 250_000
    assert len(BPE.encode("\n" * 1_000_001)) == 500_001


def test_decode_skips_or_shows_special_tokens():
    assert SPM.decode([1, 278, 291, 280, 2]) == "hello[tag] world"
    assert SPM.decode([1, 278, 2], skip_special=False) == "<s> hello</s>"
    assert BPE.decode([275, 259, 276]) == "hello"
    assert BPE.decode(np.array([275, 259, 276]), skip_special=False) == "<|im_start|>hello<|im_end|>"
    assert BPE.decode([]) == ""
    assert BPE.decode([273]) == "\ufffd"


def test_token_bytes():
    assert SPM.token_bytes(3 + 0xF0) == b"\xf0"
    assert SPM.token_bytes(280) == b" world"
    assert SPM.token_bytes(1) == b"<s>"
    assert BPE.token_bytes(273) == b"\xf0\x9f\x98"


@pytest.mark.parametrize("token", [-1, 278, 2**40])
def test_ids_outside_the_vocabulary(token):
    for call in (BPE.token_bytes, lambda i: BPE.decode([259, i]), BPE.stream_decoder().push):
        with pytest.raises(TokenizerError, match=f"token id {token} "):
            call(token)


def test_lone_surrogates_are_an_error():
    with pytest.raises(TokenizerError, match="surrogates"):
        BPE.encode("a\udc80b")


def test_tokens_that_are_not_utf8_or_empty():
    metadata = bpe_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens += ["\udcff\udcfe", ""]
    types = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED, NORMAL]
    metadata["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.token_bytes(278) == b"\xff\xfe"
    assert tokenizer.token_bytes(279) == b"[EMPTY_279]"
    assert tokenizer.decode(tokenizer.encode("hello [EMPTY_27]")) == "hello [EMPTY_27]"


def test_empty_tokens_are_found_by_their_name():
    """By the search for given texts as by the index of all."""
    tokens = Vocabulary(GGUFStrings.of(["a", "", "b"]))
    for _ in range(2):
        assert tokens.ids(["b", "[EMPTY_1]", "[EMPTY_2]", "c"]) == {"[EMPTY_1]": 1, "b": 2}
        assert list(tokens.index) == list(tokens) == ["a", "[EMPTY_1]", "b"]


def test_longer_special_tokens_win():
    metadata = bpe_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[-4:] = ["<a>", "<a><b>", "<b>", "[tag]"]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("<a><a><b><b>", parse_special=True) == [274, 275, 276]


@pytest.mark.parametrize("tokenizer", [SPM, BPE], ids=["spm", "bpe"])
def test_stream_decoder_holds_back_half_characters(tokenizer):
    stream = tokenizer.stream_decoder()
    ids = tokenizer.encode("a\U0001f600b", add_special=False)
    shown = [stream.push(i) for i in ids]
    assert "".join(shown).strip() == "a\U0001f600b"
    assert not any("\ufffd" in text for text in shown)
    assert "" in shown
    assert stream.finish() == ""


def test_stream_decoder_ends_in_the_middle_of_a_character():
    stream = BPE.stream_decoder()
    assert [stream.push(273), stream.finish()] == ["", "\ufffd"]
    assert stream.push(259) == "hello"
    assert stream.push(276) == ""
    assert BPE.stream_decoder(skip_special=False).push(276) == "<|im_end|>"


@given(st.lists(st.integers(0, BPE.n_vocab - 1)))
def test_stream_equals_decode(ids):
    stream = BPE.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.finish() == BPE.decode(ids)


# Malformed metadata.

SPM_FAULTS = [
    ("model", "bert"),
    ("model", None),
    ("model", 3),
    ("tokens", None),
    ("tokens", []),
    ("tokens", "abc"),
    ("tokens", np.arange(3)),
    ("tokens", ["a", 3]),
    ("tokens", ["a", "b", "a"]),
    ("scores", None),
    ("scores", "high"),
    ("scores", np.zeros(5, np.float32)),
    ("scores", np.zeros((293, 1), np.float32)),
    ("scores", np.full(293, np.nan, np.float32)),
    ("scores", ["1"] * 293),
    ("token_type", np.ones(292, np.int32)),
    ("token_type", np.ones(293, np.float32)),
    ("token_type", np.full(293, BYTE, np.int32)),
    ("bos_token_id", -1),
    ("bos_token_id", "1"),
    ("bos_token_id", True),
    ("bos_token_id", 1.0),
    ("fim_pad_token_id", -1),
    ("eot_token_id", "1"),
    ("add_bos_token", 1),
    ("add_eos_token", "yes"),
    ("add_space_prefix", 0.5),
]
BPE_FAULTS = [
    ("pre", "no-such-thing"),
    ("pre", 7),
    ("merges", None),
    ("merges", "h e"),
    ("merges", ["h e", 3]),
    ("merges", ["he"]),
    ("merges", [""]),
    ("merges", [" "]),
    ("merges", ["h "]),
    ("merges", ["h e l"]),
    ("merges", ["h zzz"]),
    ("merges", ["zzz h"]),
    ("merges", ["h h"]),  # both known, their union is not
    ("merges", ["\udcff h"]),
]


def test_tokens_that_are_all_parts_of_one_text():
    """Too many cuts to make merges of, for all texts as for one."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 130)))
    parts = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    tokens = ["<unk>", "<s>", "</s>", *parts]
    types = np.array([UNKNOWN, CONTROL, CONTROL, *[NORMAL] * len(parts)], np.int32)
    scores = np.zeros(len(tokens), np.float32)
    tokenizer = Tokenizer.from_metadata(spm_metadata(tokens=tokens, scores=scores, token_type=types))
    assert tokenizer.encode(text[:3]) == [1, 0, tokens.index(text[:3])]
    for whole in (text, NEEDS_ALL_MERGES):
        with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens: over 262144 cuts of tokens"):
            tokenizer.encode(whole)


@pytest.mark.parametrize(("key", "value"), SPM_FAULTS)
def test_malformed_spm_metadata(key, value):
    with pytest.raises(TokenizerError, match=rf"tokenizer\.ggml\.{key}\b") as caught:
        Tokenizer.from_metadata(spm_metadata(**{key: value}))
    assert isinstance(caught.value, FqError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), BPE_FAULTS)
def test_malformed_bpe_metadata(key, value):
    for make in (bpe_metadata, raw_metadata) if key == "merges" else (bpe_metadata,):
        with pytest.raises(TokenizerError, match=rf"tokenizer\.ggml\.{key}\b"):
            Tokenizer.from_metadata(make(**{key: value})).encode(NEEDS_ALL_MERGES)


def test_more_malformed_metadata():
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model"):
        Tokenizer.from_metadata({})
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template"):
        Tokenizer.from_metadata(bpe_metadata() | {"tokenizer.chat_template": 5})
    with pytest.raises(TokenizerError, match="add_bos_token"):
        Tokenizer.from_metadata(without(bpe_metadata(add_bos_token=True), "bos_token_id"))
    huge = spm_metadata()
    huge["tokenizer.ggml.tokens"][-3] = "a" * 100_000
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens: token 290 has 100000 characters"):
        Tokenizer.from_metadata(huge)


junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.text(max_size=3)),
    st.lists(st.integers(-9, 9)).map(np.array), st.just(np.ones(293)), st.just(np.full(278, 6)),
)  # fmt: skip


@given(st.sampled_from([spm_metadata, bpe_metadata, raw_metadata]), st.data())
def test_junk_metadata_raises_nothing_else(make, data):
    metadata = make()
    for key in data.draw(st.sets(st.sampled_from(sorted(metadata)), min_size=1, max_size=3)):
        metadata[key] = data.draw(junk)
    with contextlib.suppress(TokenizerError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ids out of range
        Tokenizer.from_metadata(metadata).encode("hello")


# Chat templates: they come with the model file, from anyone.


def with_template(template: str) -> Tokenizer:
    return Tokenizer.from_metadata(bpe_metadata() | {"tokenizer.chat_template": template})


HELLO = [{"role": "user", "content": "hello"}]


def test_chat_template():
    prompt = "<|im_start|>user\nhello<|im_end|>\n"
    assert BPE.apply_chat_template(HELLO, add_generation_prompt=False) == prompt
    assert BPE.apply_chat_template(HELLO) == prompt + "<|im_start|>assistant\n"
    assert BPE.apply_chat_template([]) == "<|im_start|>assistant\n"


def test_chat_template_is_given_the_usual_names():
    template = "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}{{ nothing }}{{ messages[0].name }}"
    shown = '<|im_start|>[{"role": "user", "content": "<\u00e9>"}]<|im_end|>'
    assert with_template(template).apply_chat_template([{"role": "user", "content": "<\u00e9>"}]) == shown


def test_chat_template_refuses_by_raise_exception():
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template.*no tools here"):
        BPE.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include 'secrets.txt' %}",
        "{% import 'os' as os %}",
        "{{ nothing.at_all }}",
        "{{ messages[0]['name'] + 'x' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for m in messages %}",
        "{{ no_such_function() }}",
        "{{ 1 | no_such_filter }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "\udcff{{ '\udcff'.encode() }}",
        "{{ messages | tojson(indent=[]) }}",
        "{% generation %}{{ bos_token }}",
        # more time than there is
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set x = namespace(a=[1]) %}{% for i in range(99999) %}{% set x.a = x.a + x.a %}{% endfor %}",
        # more memory
        "{{ 'a' * 10 ** 10 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{% for i in range(99999) %}{{ 'a' * 10 ** 5 }}{% endfor %}",
        "{% set x = namespace(a='aa') %}{% for i in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
        # more text, in the result and in an error
        "{{ 'a' * 10 ** 7 }}",
        "{{ raise_exception('a' * 10 ** 7) }}",
        # deeper than the stack
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
        "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
        "x" * 10_000_000 + "{{ nothing.at_all }}",
        "{{ raise_exception('two\nlines') }}",
    ],
)
def test_hostile_chat_templates(template):
    with pytest.raises(TokenizerError, match=r"^tokenizer\.chat_template failed: .") as caught:
        with_template(template).apply_chat_template(HELLO)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert HELLO == [{"role": "user", "content": "hello"}]


# in a process of its own: what other tests started would count too
LIMITED = """
import resource, sys
sys.path.insert(0, {folder!r})
from test_tokenizer import HELLO, TokenizerError, with_template
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for template in sys.argv[1:]:
    try:
        with_template(template).apply_chat_template(HELLO)
    except TokenizerError as error:
        print(error)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def test_chat_templates_are_limited():
    """In memory and in time, the processor's or the clock's, whichever ends first."""
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    doubled = "{% set x = namespace(a=[1]) %}{% for i in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}"
    program = LIMITED.format(folder=str(Path(__file__).parent))
    run = [sys.executable, "-c", program, forever, "{{ 'a' * 10 ** 10 }}", doubled]
    done = subprocess.run(run, capture_output=True, text=True)
    time, large, larger, used = done.stdout.splitlines()
    assert re.search(r"more than (2 s of processor time|4\.5 s)$", time)
    assert large.endswith("more than 400 MB of memory") and larger.endswith("more than 400 MB of memory")
    seconds, kib = used.split()
    assert float(seconds) < 6 and int(kib) < 500 * 1000


def test_chat_template_sees_what_transformers_gives():
    shown = (
        "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ unk_token }}|"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}|"
        "{{ strftime_now('%Y') | length }}|{{ {'b': '\u00e9<', 'a': [1]} | tojson(sort_keys=True) }}|"
        "{{ {'b': '\u00e9'} | tojson(ensure_ascii=True, separators=(',', ':')) }}|"
        "{{ [1] | tojson(indent=1) }}"
    )
    expected = 'True True True |hello|4|{"a": [1], "b": "\u00e9<"}|{"b":"\\u00e9"}|[\n 1\n]'
    assert with_template(shown).apply_chat_template([*HELLO, *HELLO]) == expected
    given = "{{ tools[0].name }} {{ documents | length }}"
    assert with_template(given).apply_chat_template(HELLO, tools=[{"name": "f"}], documents=[]) == "f 0"


def test_long_messages_make_long_prompts():
    message = {"role": "user", "content": "\U0001f600\u00e9 " * 2_000_000}
    assert with_template("{{ messages[0].content }}").apply_chat_template([message]) == message["content"]


def test_messages_that_are_no_json():
    with pytest.raises(TokenizerError, match="not JSON"):
        BPE.apply_chat_template([{"role": "user", "content": b"hello"}])


def test_no_chat_template():
    with pytest.raises(TokenizerError, match="no chat template"):
        SPM.apply_chat_template(HELLO)


def test_a_merge_is_cut_at_its_second_character_at_the_earliest():
    """As in llama.cpp, since a token may begin with a space."""
    tokens = [*bpe_metadata()["tokenizer.ggml.tokens"], " ", "  a"]
    types = np.array([NORMAL] * len(tokens), np.int32)
    merges = [*BPE_MERGES, "  a"]
    good = bpe_metadata(tokens=[*tokens[:-1], " a"], token_type=types, merges=merges)
    Tokenizer.from_metadata(good).encode(NEEDS_ALL_MERGES)
    bad = Tokenizer.from_metadata(bpe_metadata(tokens=tokens, token_type=types, merges=[*BPE_MERGES, " a"]))
    with pytest.raises(TokenizerError, match="no pair of known tokens"):
        bad.encode(NEEDS_ALL_MERGES)
    assert bad.encode("a") == Tokenizer.from_metadata(good).encode("a")
