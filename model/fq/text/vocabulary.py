"""The tokens of a vocabulary, by id and by text.

A text of some words meets some hundred of 10^5 tokens, so an index of all of them is made only when it is
needed: until then the tokens are searched for the given ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from fq_kernels import GGUFStrings

from ..errors import FqError


class TokenizerError(FqError):
    """A vocabulary, a chat template, a text or a token id that cannot be used. Names the metadata key."""


class Vocabulary:
    """The tokens in the order of their ids; empty ones are named by their id, as llama.cpp names them.

    longest: of the tokens, in bytes. Raises TokenizerError if a token occurs twice.
    """

    def __init__(self, tokens: GGUFStrings) -> None:
        self._tokens = tokens
        self.longest = tokens.longest
        hashes = np.sort(tokens.hashes())
        if (hashes[1:] == hashes[:-1]).any():
            _ = self.index  # knows whether the tokens are equal too

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int) -> str:
        return self._tokens[i] or f"[EMPTY_{i}]"

    def __iter__(self) -> Iterator[str]:
        return (token or f"[EMPTY_{i}]" for i, token in enumerate(self._tokens[:]))

    @cached_property
    def index(self) -> dict[str, int]:
        """All tokens, ids ascending."""
        n = len(self)
        index = dict(zip(self, range(n), strict=True))
        if len(index) != n:
            i, token = next((i, token) for i, token in enumerate(self) if index[token] != i)
            raise TokenizerError(f"tokenizer.ggml.tokens: token {i} ({token!r:.60}) occurs twice")
        return index

    @cached_property
    def text_index(self) -> dict[str, int]:
        """Those that are UTF-8, ids ascending: others match no text, and the library takes none."""
        if is_utf8("".join(self.index)):
            return self.index
        return {token: i for token, i in self.index.items() if is_utf8(token)}

    def ids(self, texts: Iterable[str]) -> dict[str, int]:
        """Of some texts, those that are tokens, ids ascending."""
        wanted = {*texts}
        if "index" not in self.__dict__:
            found = self._tokens.find(wanted | {""})
            if "" not in found:
                return found
        found = {text: self.index[text] for text in wanted & self.index.keys()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def inside(self, text: str) -> dict[str, int]:
        """The tokens that are substrings of a text, ids ascending."""
        n, longest = len(text), self.longest
        return self.ids(text[i:j] for i in range(n) for j in range(i + 1, min(i + longest, n) + 1))


def is_utf8(text: str) -> bool:
    """Whether a str holds no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
