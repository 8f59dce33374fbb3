"""Byte-pair merging by the `tokenizers` library, made for all texts or for a given one.

Merging joins neighbours, so every token of a text, on the way too, is a substring of it. Made from those
tokens alone the library gives the same ids, and making it takes a small part of the time.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import GGUFStrings

from .vocabulary import TokenizerError, Vocabulary

SPACE = "\u2581"  # SPM's visible space
WINDOW = 1 << 14  # characters of a long word that are merged at once
# A cut that is a merge takes some 500 bytes; tokens of Llama 2, Gemma 3 and SmolLM2 have two on average.
_MAX_CUTS_PER_TOKEN, _ALWAYS_ALLOWED = 16, 1 << 18


class Merger(NamedTuple):
    """Text to ids. A character that is no token has an id past the vocabulary, which `stand_ins` replaces:
    it may be half of a token, and keeps its neighbours apart if it is not.

    bpe cuts its text into words, one_word does not. longest: of the tokens, in characters.
    """

    bpe: Any
    one_word: Any
    stand_ins: dict[int, list[int]]
    longest: int

    def ids(self, text: str) -> Sequence[int]:
        # The batch call is the one that skips character offsets: twice as fast.
        return self._real(self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def word_ids(self, word: str, limit: int | None = None) -> Sequence[int]:
        """Ids of one word of any length, at least the first `limit`, merged window by window.

        A sequence of tokens is what a text is merged to if and only if each two neighbours are what the two
        together are merged to: merges on the two sides of a place where nothing has merged yet take no
        notice of each other, and the first that reaches across does so in the two alone as well. So two
        sequences that share a token can be joined at it. A window begins at a token of the one before, and
        must begin with that same token; where its end reaches back that far, windows are made longer.
        """
        # A quarter is always left for the last window, which must not be a token as a whole.
        size = max(WINDOW, 4 * (self.longest + 1))
        while (found := self._joined(word, size, limit)) is None:
            size *= 2
        return self._real(found)

    def _joined(self, word: str, size: int, limit: int | None) -> array[int] | None:
        joined = array("i")
        start, first = 0, None
        while True:
            encoding = self.one_word.encode(word[start : start + size], add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
            if first is not None and ids[:1] != [first]:
                return None
            if start + size >= len(word) or (limit is not None and len(joined) >= limit):
                joined.extend(ids)
                return joined
            next_token = bisect_right(offsets, (size - size // 4, 0)) - 1
            # tokens that are parts of one character have its offsets
            while next_token > 0 and offsets[next_token - 1][1] > offsets[next_token][0]:
                next_token -= 1
            if next_token <= 0:
                return None
            joined.extend(ids[:next_token])
            first = ids[next_token]
            start += offsets[next_token][0]

    def _real(self, found: Sequence[int]) -> Sequence[int]:
        if self.stand_ins:
            found = array("i", (j for i in found for j in self.stand_ins.get(i, (i,))))
        return found


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes: {character: byte}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def merge_pair(merge: str) -> tuple[str, str]:
    """The two tokens; the left one may begin with a space, as in llama.cpp."""
    cut = merge.find(" ", 1)
    return (merge[:cut], merge[cut + 1 :]) if cut > 0 else (merge, "")


def byte_level_merger(
    vocabulary: Vocabulary,
    merges: GGUFStrings,
    patterns: Iterable[str],
    ignore_merges: bool,
    text: str | None = None,
) -> Merger:
    """A merger for byte-level BPE; for `text` alone unless it is None.

    merges: pairs of tokens, "left right", best first, whose unions are tokens. patterns: cut the text into
    words, one after another. ignore_merges: a word that is a token is taken whole.
    """
    from tokenizers import Regex, pre_tokenizers

    alphabet = byte_level_alphabet()
    if text is not None:
        characters = {byte: char for char, byte in alphabet.items()}
        text = "".join([characters[byte] for byte in text.encode()])
    vocab, pairs = _needed(vocabulary, merges, text)
    # Like llama.cpp, drop a byte that the vocabulary lacks.
    vocab, stand_ins = _with_stand_ins(vocab, alphabet, len(vocabulary), lambda char: [])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Sequence([*splits, byte_level])
    bpe = _bpe(vocab, pairs, words, ignore_merges=ignore_merges)
    return Merger(bpe, _of_model(bpe.model, byte_level), stand_ins, _longest(vocab))


def raw_merger(
    vocabulary: Vocabulary,
    merges: GGUFStrings,
    fallback: Callable[[str], list[int]],
    text: str | None = None,
) -> Merger:
    """A merger for BPE on characters, not bytes, each text one word; for `text` alone unless it is None.

    As `byte_level_merger`; spaces are `SPACE`, and fallback: ids of a character that is no token.
    """
    vocab, pairs = _needed(vocabulary, merges, text)
    characters = set("".join(vocab) if text is None else text)
    # the library falls back to all of a character's bytes or to none; here those that there are
    names = (f"<0x{byte:02X}>" for byte in range(256))
    vocab, of_bytes = _with_stand_ins(vocab, names, len(vocabulary), lambda name: [])
    vocab, stand_ins = _with_stand_ins(vocab, characters, len(vocabulary) + len(of_bytes), fallback)
    bpe = _bpe(vocab, pairs, None, byte_fallback=True)
    return Merger(bpe, bpe, of_bytes | stand_ins, _longest(vocab))


def _needed(
    vocabulary: Vocabulary, merges: GGUFStrings, text: str | None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens and pairs that a text can come to, all for None. A repeated pair keeps its first rank."""
    if text is None:
        return vocabulary.text_index, list(dict.fromkeys(map(merge_pair, merges[:])))
    vocab = vocabulary.inside(text)
    usable = {f"{left} {right}": (left, right) for left, right in _cuts(vocab, vocab, len(vocabulary))}
    return vocab, [usable[merge] for merge in merges.find(usable)]


def spm_merger(
    vocabulary: Vocabulary,
    scores: np.ndarray,
    fallback: Callable[[str], list[int]],
    unk: str | None,
    text: str | None = None,
) -> Merger:
    """A merger for SentencePiece's BPE; for `text` alone unless it is None. Spaces are `SPACE`.

    scores: (n_vocab,) float64; the pair whose union scores highest comes first. fallback: ids of a
    character that is no token. unk: the unknown token.
    """
    from tokenizers import Regex, pre_tokenizers

    vocab = vocabulary.text_index if text is None else vocabulary.inside(text)
    tokens = list(vocab)
    order = np.argsort(-scores[list(vocab.values())], kind="stable")
    ranked = [tokens[i] for i in order.tolist()]
    characters = set("".join(vocab) if text is None else text)
    vocab, stand_ins = _with_stand_ins(vocab, characters, len(vocabulary), fallback)
    # Every cut of a token into two known pieces is a merge, ranked by the score of the whole.
    merges = list(_cuts(ranked, vocab, len(vocabulary)))
    # Where no token goes on past the end of a word, words can be merged (and cached) one by one.
    by_word = not any(SPACE in t.lstrip(SPACE) for t in ranked)
    split = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*"), "isolated") if by_word else None
    unk = unk if unk in vocab else None
    bpe = _bpe(vocab, merges, split, unk_token=unk, byte_fallback=True)
    return Merger(bpe, bpe, stand_ins, _longest(vocab))  # as words do not merge, cutting changes nothing


def _longest(vocab: Iterable[str]) -> int:
    return max(map(len, vocab), default=0)


def _cuts(tokens: Iterable[str], vocab: Container[str], n_vocab: int) -> Iterator[tuple[str, str]]:
    """Each token's cuts into two that are known, the longest left part first.

    Raises TokenizerError where there are more than a vocabulary of n_vocab tokens can be meant to have.
    """
    left = most = max(_ALWAYS_ALLOWED, _MAX_CUTS_PER_TOKEN * n_vocab)
    for token in tokens:
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in vocab and token[cut:] in vocab:
                if not left:
                    raise TokenizerError(f"tokenizer.ggml.tokens: over {most} cuts of tokens into two tokens")
                left -= 1
                yield token[:cut], token[cut:]


def _with_stand_ins(
    vocab: dict[str, int], characters: Iterable[str], n_vocab: int, fallback: Callable[[str], list[int]]
) -> tuple[dict[str, int], dict[int, list[int]]]:
    """The vocabulary with those of the characters that it lacks, and what replaces their ids."""
    missing = [char for char in characters if char not in vocab]
    ids = range(n_vocab, n_vocab + len(missing))
    return vocab | dict(zip(missing, ids, strict=True)), dict(zip(ids, map(fallback, missing), strict=True))


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], pre_tokenizer: Any, **options: Any) -> Any:
    """A `tokenizers.Tokenizer` of the kind BPE."""
    import tokenizers

    return _of_model(tokenizers.models.BPE(vocab, merges, **options), pre_tokenizer)


def _of_model(model: Any, pre_tokenizer: Any) -> Any:
    import tokenizers

    bpe = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        bpe.pre_tokenizer = pre_tokenizer
    return bpe
