"""Cuts a long text into segments whose ids, put together, are those of the whole.

The `tokenizers` library takes some 200 bytes of memory per byte of what it is given, and does not listen to
Ctrl-C. A segment is a stretch of whole words, or, where a word alone is long, that word, marked as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .bpe import SPACE

Span = tuple[int, int]
_LOOK_AHEAD = 4  # characters that decide a word at most ('re), but for what it and space run on to

# Places where pre-tokenizers cut, by their `breaks`, and whose left side is cut alike without the right: of
# those that break at spaces no word has one after something else; of those that break at lines, besides, none
# goes on after a line feed, or has punctuation after a letter or digit; of those that break at line ends each
# is a word. Only of spaces does it matter what follows them, and one line feed alone is a word either way.
# Compiled where a text is long enough for them: a start is for a short one.
_BREAKS = {
    "lines": r"(?<=\S)(?= )|(?<=\S\n)(?=\S)"
    r"|(?<=[0-9A-Za-z\u4e00-\u9fa5])(?=[!-/:-@[-`{-~\u3001\u3002\uff0c])",
    "spaces": r"(?<=\S)(?= )",
    "line ends": r"(?<=[\r\n])",
    "never": r"(?!)",
}
_SPM_BREAK = f"(?<=[^{SPACE}])(?={SPACE})"


def spm_segments(text: str, by_word: bool, size: int) -> Iterator[tuple[str, bool]]:
    """Segments of a text whose spaces are SPACE, and whether each is a long word. by_word: no token has a
    SPACE after something else. size: characters from which on a cut is looked for."""
    start = 0
    while len(text) - start > size:
        found = re.compile(_SPM_BREAK).search(text, start + size) if by_word else None
        end = found.start() if found else len(text)
        yield text[start:end], end - start > 2 * size
        start = end
    if start < len(text):
        yield text[start:], False


def line_segments(line: str, size: int) -> Iterator[tuple[str, bool]]:
    """A line is one word; whether it is a long one."""
    yield line, len(line) > 2 * size


def byte_level_segments(
    text: str, patterns: Sequence[str], size: int, breaks: str = "lines"
) -> Iterator[tuple[str, bool]]:
    """Segments of a text, and whether each is a long word; patterns, breaks: `PreTokenizer`'s."""
    start, words = 0, None
    while len(text) - start > size:
        found = re.compile(_BREAKS[breaks]).search(text, start + size, start + 2 * size)
        if found:
            yield text[start : found.start()], False
            start = found.start()
            continue
        words = words or _Words(text, patterns)
        cut, alone = words.cut(start, size)
        if cut > start:
            yield text[start:cut], False
        for begin, end in alone:
            yield text[begin:end], True
        start = alone[-1][1] if alone else cut
    if start < len(text):
        yield text[start:], False


class _Words:
    """The words that patterns cut a text into, found one by one.

    `re` has no character classes of Unicode's categories. They are made from the characters of the text,
    each asked for at the library itself, which may know another version of Unicode than Python.
    """

    def __init__(self, text: str, patterns: Sequence[str]) -> None:
        from tokenizers import Regex, pre_tokenizers

        characters = "".join(sorted({*text, *"a0! "}))  # so that no class is empty

        def members(name: str) -> str:
            others = pre_tokenizers.Split(Regex(name), "removed").pre_tokenize_str(characters)
            return "".join(sorted(set(characters).difference(*(part for part, _ in others))))

        named = {name for pattern in patterns for name in re.findall(r"\\p\{\w\}", pattern)}
        self._spaces = members(r"\s")
        classes = {name: re.escape(members(name)) for name in named} | {r"\s": re.escape(self._spaces)}

        def translated(found: re.Match[str]) -> str:
            piece = found[0]
            if piece.startswith("["):
                return re.sub(r"\\p\{\w\}|\\s", lambda inner: classes[inner[0]], piece)
            return f"[^{classes[piece.lower()]}]" if piece == r"\S" else f"[{classes[piece]}]"

        self._text = text
        self._patterns = [
            re.compile(re.sub(r"\[(?:\\.|[^]\\])*\]|\\p\{\w\}|\\[sS]", translated, p)) for p in patterns
        ]
        # in a word cut off, such a pattern would match the spaces at its end
        self._takes_last_spaces = any(pattern.endswith("$") for pattern in patterns)

    def cut(self, start: int, size: int) -> tuple[int, list[Span]]:
        """An end, `size` characters on, of words that can be cut off, or an end before that and the words
        after it, of which the last is long."""
        n, reach = len(self._text), 4 * size
        while True:
            stop = min(start + reach, n)
            # words up to here end there whatever follows; space, and what is before it, may go on
            sure = n
            if stop < n:
                sure = min(stop - _LOOK_AHEAD, start + len(self._text[start:stop].rstrip(self._spaces)) - 1)
            cut, alone = start, []
            for begin, end in self._spans(start, stop):
                if end > sure:
                    break
                last = end - 1 if self._takes_last_spaces else begin
                if not self._text[last:end].strip(self._spaces) or end - begin > size:
                    # space alone: without what follows, it might take more of it
                    alone.append((begin, end))
                    if end - begin > size:
                        return cut, alone
                else:
                    cut, alone = end, []
                    if cut - start >= size:
                        return cut, alone
            else:
                return n, []
            reach *= 2

    def _spans(self, begin: int, end: int, level: int = 0) -> Iterator[Span]:
        """Begin and end of each word of text[begin:end]; each pattern cuts what those before it left."""
        if level == len(self._patterns):
            yield begin, end
            return
        for found in self._patterns[level].finditer(self._text, begin, end):
            if found.start() > begin:
                yield from self._spans(begin, found.start(), level + 1)
            yield from self._spans(*found.span(), level + 1)
            begin = found.end()
        if begin < end:
            yield from self._spans(begin, end, level + 1)
