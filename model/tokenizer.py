"""Text to token ids and back, from the vocabulary that a GGUF file carries.

Two kinds of vocabulary are read, named as `tokenizer.ggml.model` names them: `gpt2` (byte-level BPE) and
`llama` (SentencePiece BPE, "SPM"). The ids are those of llama.cpp for the same file and text; the merging
itself is done by the `tokenizers` library.

SPM limit: llama.cpp merges the pair whose union scores highest and, among equal scores, the leftmost one.
`tokenizers` has no equal ranks, so a vocabulary with equal scores can give another, equally scored, split.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from model.errors import FqError

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_SPACE = "\u2581"  # SPM's visible space
_SEGMENT = 1 << 16  # characters
# Every cut of an SPM token is tried when its merges are made; real ones have some tens of characters.
_MAX_SPM_TOKEN = 1024


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """How a BPE vocabulary cuts text into words: the patterns are applied one after another."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # when the file does not say


_LLAMA3_PRE = _Pre((_LLAMA3,), ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Pre((_GPT2,)),
    "smollm": _Pre((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "qwen2": _Pre((_LLAMA3.replace("{1,3}", ""),)),
}

# Files often name one end token only; llama.cpp knows the others by their text, whatever their type.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    # fill-in-the-middle tokens that close a file or a repository
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip


class TokenizerError(FqError):
    """A vocabulary, a chat template, a text or a token id that cannot be used. Names the metadata key."""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes: {character: byte}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class _Keys:
    """Checked look-up of `tokenizer.*` metadata. What is absent is None, but for the tokens."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def _get(self, key: str, kinds: tuple[type, ...], what: str) -> Any:
        value = self._metadata.get(f"tokenizer.{key}")
        number_wanted = bool not in kinds  # a bool is an int in Python, not in GGUF
        if value is not None and (
            not isinstance(value, kinds) or (number_wanted and isinstance(value, bool))
        ):
            raise TokenizerError(f"tokenizer.{key} must be {what}, not {type(value).__name__}")
        return value

    def text(self, key: str) -> Any:
        return self._get(key, (str,), "a string")

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, (bool, np.bool_), "true or false")
        return default if value is None else bool(value)

    def token_id(self, key: str, n_vocab: int, default: int | None = None) -> int | None:
        value = self._get(key, (int, np.integer), "a token id")
        if value is None:
            return default if default is not None and default < n_vocab else None
        if not 0 <= value < n_vocab:
            raise TokenizerError(f"tokenizer.{key} is {value}, outside the vocabulary of {n_vocab} tokens")
        return int(value)

    def strings(self, key: str) -> list[str]:
        value: list[str] | None = self._get(key, (list,), "an array of strings")
        if value is None or not all(type(item) is str for item in value):
            fault = "is missing" if value is None else "must be an array of strings"
            raise TokenizerError(f"tokenizer.{key} {fault}")
        return value

    def numbers(self, key: str, kinds: str, n: int) -> np.ndarray | None:
        """(n,) array of one of the numpy dtype kinds."""
        value: np.ndarray | None = self._get(key, (np.ndarray,), "an array of numbers")
        if value is not None and (value.dtype.kind not in kinds or value.ndim != 1 or len(value) != n):
            found = f"{value.dtype} in the shape {value.shape}"
            raise TokenizerError(f"tokenizer.{key} must be {n} numbers, one per token, not {found}")
        return value


class StreamDecoder:
    """Turns generated ids into text piece by piece, holding back bytes that do not yet end a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became complete with this id; often empty inside an emoji or a CJK character."""
        return self._decoder.decode(self._tokenizer._joined([token], self._skip_special))

    def finish(self) -> str:
        """What was held back, as U+FFFD when it never became a character. The decoder can be used again."""
        return self._decoder.decode(b"", True)


class Tokenizer:
    """Built by `Tokenizer.from_metadata`; immutable afterwards.

    kind: "llama" (SPM) or "gpt2" (BPE). n_vocab: number of tokens. bos_id, eos_id, unk_id: id or None.
    eog_ids: ids that end a generation. add_bos, add_eos: whether `encode` adds them around a text.
    add_space_prefix: SPM only, a space is put before the text. chat_template: Jinja source or None.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        keys = _Keys(metadata)
        kind = keys.text("ggml.model")
        if kind not in ("llama", "gpt2"):
            raise TokenizerError(f"tokenizer.ggml.model {kind!r:.60} is not supported, llama and gpt2 are")
        self.kind: str = kind
        spm = kind == "llama"

        self._tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(keys.strings("ggml.tokens"))]
        self.n_vocab = n = len(self._tokens)
        self._ids = dict(zip(self._tokens, range(n), strict=True))
        if n == 0:
            raise TokenizerError("tokenizer.ggml.tokens is empty")
        if len(self._ids) != n:
            i = next(i for i, t in enumerate(self._tokens) if self._ids[t] != i)
            raise TokenizerError(f"tokenizer.ggml.tokens: token {i} ({self._tokens[i]!r:.60}) occurs twice")

        self.bos_id = keys.token_id("ggml.bos_token_id", n, 1 if spm else None)
        self.eos_id = keys.token_id("ggml.eos_token_id", n, 2 if spm else None)
        self.unk_id = keys.token_id("ggml.unknown_token_id", n, 0 if spm else None)
        self.chat_template = keys.text("chat_template")
        self.add_space_prefix = spm and keys.flag("ggml.add_space_prefix", True)

        ends = {self._ids[t] for t in _END_TEXTS if t in self._ids}
        named = {keys.token_id(key, n) for key in ("ggml.eot_token_id", "ggml.eom_token_id")} | {self.eos_id}
        self.eog_ids = frozenset(ends | {i for i in named if i is not None})

        types = keys.numbers("ggml.token_type", "iu", n)
        self._types: list[int] = [_NORMAL] * n if types is None else types.tolist()
        for i in ends:
            self._types[i] = _CONTROL
        for i, t in enumerate(self._types):
            if t == _BYTE and not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self._tokens[i]):
                raise TokenizerError(
                    f"tokenizer.ggml.token_type: token {i} ({self._tokens[i]!r:.60}) is no byte"
                )
        self._special = frozenset(i for i, t in enumerate(self._types) if t in (_CONTROL, _UNKNOWN))
        # Longest first (in bytes), as llama.cpp looks for them in a text.
        whole = [i for i, t in enumerate(self._types) if t in (_CONTROL, _UNKNOWN, _USER_DEFINED)]
        self._whole = sorted(whole, key=lambda i: -len(_utf8(self._tokens[i])))

        self._stand_ins: dict[int, list[int]] = {}
        # The library takes no lone surrogates, and a token that is not UTF-8 matches no text: leave it out.
        vocab = {t: i for t, i in self._ids.items() if t.isascii() or _is_utf8(t)}
        pre = None if spm else _pre_tokenizer(keys)
        self._library = self._build_spm(vocab, keys) if pre is None else self._build_bpe(vocab, keys, pre)

        self.add_bos = keys.flag("ggml.add_bos_token", pre is None or pre.add_bos)
        self.add_eos = keys.flag("ggml.add_eos_token", False)
        for wanted, token, word in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if wanted and token is None:
                raise TokenizerError(f"tokenizer.ggml.add_{word}_token is set without a {word}_token_id")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata: string arrays as list[str] (bytes that are not UTF-8 as surrogate
        escapes), number arrays as numpy arrays. Raises TokenizerError naming the key at fault."""
        return cls(metadata)

    def _build_bpe(self, vocab: dict[str, int], keys: _Keys, pre: _Pre) -> Any:
        from tokenizers import Regex, pre_tokenizers

        merges: dict[tuple[str, str], None] = {}  # a repeated pair keeps its first rank
        for i, merge in enumerate(keys.strings("ggml.merges")):
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
                raise TokenizerError(
                    f"tokenizer.ggml.merges: entry {i} ({merge!r:.60}) is no pair of known tokens"
                )
            merges[left, right] = None
        for char in _byte_level_alphabet().keys() - vocab.keys():
            self._add_stand_in(vocab, char, [])  # like llama.cpp, drop a byte that the vocabulary lacks
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Sequence([*splits, byte_level])
        return _library(vocab, list(merges), words, ignore_merges=pre.ignore_merges)

    def _build_spm(self, vocab: dict[str, int], keys: _Keys) -> Any:
        from tokenizers import Regex, pre_tokenizers

        scores = keys.numbers("ggml.scores", "fiu", self.n_vocab)
        if scores is None:
            raise TokenizerError("tokenizer.ggml.scores is missing")
        if np.isnan(scores).any():
            raise TokenizerError("tokenizer.ggml.scores holds a NaN")
        for char in set("".join(vocab)) - vocab.keys():
            self._add_stand_in(vocab, char, self._fallback(char))
        # Every cut of a token into two known pieces is a merge, ranked by the score of the whole.
        merges = []
        for i in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
            token = self._tokens[i]
            if len(token) > _MAX_SPM_TOKEN:
                raise TokenizerError(f"tokenizer.ggml.tokens: token {i} has {len(token)} characters")
            for cut in range(len(token) - 1, 0, -1):
                if token[:cut] in vocab and token[cut:] in vocab and token in vocab:
                    merges.append((token[:cut], token[cut:]))
        # Where no token goes on past the end of a word, words can be merged (and cached) one by one.
        by_word = not any(_SPACE in t.lstrip(_SPACE) for t in vocab)
        split = pre_tokenizers.Split(Regex(f"{_SPACE}+[^{_SPACE}]*"), "isolated") if by_word else None
        unk = None if self.unk_id is None else self._tokens[self.unk_id]
        return _library(vocab, merges, split, unk_token=unk if unk in vocab else None, byte_fallback=True)

    def _add_stand_in(self, vocab: dict[str, int], char: str, ids: list[int]) -> None:
        """Give a character that is no token an id past the vocabulary, which `encode` replaces by `ids`:
        it may be half of a token, and keeps its neighbours apart if it is not."""
        vocab[char] = self.n_vocab + len(self._stand_ins)
        self._stand_ins[vocab[char]] = ids

    def _fallback(self, char: str) -> list[int]:
        """Ids of a character that is no token: its bytes, else the unknown token."""
        ids = [self._ids.get(f"<0x{byte:02X}>") for byte in _utf8(char)]
        if None in ids:
            ids = [self.unk_id]
        return [i for i in ids if i is not None]

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, limit: int | None = None
    ) -> list[int]:
        """Ids of a text. `add_special` adds BOS/EOS where the vocabulary asks for them; `parse_special`
        reads control tokens written in the text (`<|im_end|>`), which otherwise are plain text. With a
        `limit` only that many of the ids, without the work for the others.
        Raises TokenizerError for a text with lone surrogates."""
        if not text.isascii() and not _is_utf8(text):
            raise TokenizerError("the text holds lone surrogates, so it is not Unicode text")
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        for part in self._parts(text, parse_special):
            if limit is not None and len(ids) >= limit:
                break
            if isinstance(part, int):
                ids.append(part)
                continue
            if self.kind == "llama":
                # The start of a text, and what follows a token matched whole, is the start of a word.
                part = _SPACE * self.add_space_prefix + part.replace(" ", _SPACE)
            for segment in self._segments(part):
                if limit is not None and len(ids) >= limit:
                    break
                # The batch call is the one that skips character offsets: twice as fast.
                found: list[int] = self._library.encode_batch_fast([segment], add_special_tokens=False)[0].ids
                if self._stand_ins:
                    found = [j for i in found for j in self._stand_ins.get(i, (i,))]
                ids += found
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids[:limit]

    def _segments(self, text: str) -> Iterator[str]:
        """The text cut where no token can reach across: the library takes some 200 bytes of memory per byte
        of text, and does not listen to Ctrl-C."""
        start = 0
        while self._word_break and len(text) - start > _SEGMENT:
            found = self._word_break.search(text, start + _SEGMENT)
            if found is None:
                break
            yield text[start : found.start()]
            start = found.start()
        yield text[start:]

    @cached_property
    def _word_break(self) -> re.Pattern[str] | None:
        """Between a letter and the space before a letter. Every pre-tokenizer here cuts there; SPM has none,
        but merges across it only if the vocabulary has a token with such a place inside."""
        if self.kind == "gpt2":
            return re.compile("(?<=[a-z])(?= [a-z])")
        inner = re.compile(f"[^{_SPACE}]{_SPACE}")
        if any(inner.search(token) for token in self._tokens):
            return None
        return re.compile(f"(?<=[a-z])(?={_SPACE}[a-z])")

    def _parts(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at the tokens that are matched whole: stretches of text, and their ids."""
        parts: list[str | int] = [text] if text else []
        for i in self._whole:
            token = self._tokens[i]
            if (i in self._special and not parse_special) or token not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                for k, piece in enumerate(part.split(token)):
                    cut += [i] * (k > 0)
                    cut += [piece] * (piece != "")
            parts = cut
        return parts

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of every token."""
        alphabet = _byte_level_alphabet()
        pieces = []
        for token, kind in zip(self._tokens, self._types, strict=True):
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
                pieces.append(_utf8(token))
            elif kind == _BYTE:
                pieces.append(bytes([int(token[3:5], 16)]))
            elif self.kind == "llama":
                pieces.append(_utf8(token.replace(_SPACE, " ")))
            else:
                try:
                    pieces.append(bytes([alphabet[char] for char in token]))
                except KeyError:  # not byte-level text: it stands for itself
                    pieces.append(_utf8(token))
        return pieces

    def _joined(self, ids: Iterable[int], skip_special: bool) -> bytes:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            bad = next(i for i in ids if not 0 <= i < self.n_vocab)
            raise TokenizerError(f"token id {bad} is outside the vocabulary of {self.n_vocab} tokens")
        pieces, special = self._pieces, self._special
        return b"".join([pieces[i] for i in ids if not (skip_special and i in special)])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for; a control token's are its name. TokenizerError: no such id."""
        return self._joined([token], False)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of the ids, without the space that SPM put in front; bytes that are no UTF-8 become U+FFFD.
        Raises TokenizerError for an id outside the vocabulary."""
        text = self._joined(ids, skip_special).decode("utf-8", "replace")
        return text[1:] if self.add_space_prefix and text.startswith(" ") else text

    def stream_decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for the continuation of a text: unlike `decode` it keeps a leading space."""
        return StreamDecoder(self, skip_special=skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation, [{"role": ..., "content": ...}, ...], to be encoded with
        `add_special=False, parse_special=True`. The template is the file's, so it runs in a sandbox;
        whatever goes wrong in it is a TokenizerError."""
        if self.chat_template is None:
            raise TokenizerError("tokenizer.chat_template is missing: the model has no chat template")
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.filters["tojson"] = lambda value, indent=None: json.dumps(
                value, ensure_ascii=False, indent=indent
            )
            environment.globals["raise_exception"] = _raise_exception
            return environment.from_string(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token="" if self.bos_id is None else self._tokens[self.bos_id],
                eos_token="" if self.eos_id is None else self._tokens[self.eos_id],
            )
        except Exception as error:  # a hostile template can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TokenizerError(f"tokenizer.chat_template failed: {reason}") from error


def _pre_tokenizer(keys: _Keys) -> _Pre:
    name = keys.text("ggml.pre") or "default"
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(f"tokenizer.ggml.pre {name!r:.60} is not a known pre-tokenizer")
    return _PRE_TOKENIZERS[name]


def _raise_exception(message: object) -> None:
    raise TokenizerError(str(message))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _library(vocab: dict[str, int], merges: list[tuple[str, str]], pre_tokenizer: Any, **options: Any) -> Any:
    """A `tokenizers.Tokenizer` of the kind BPE."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, **options))
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    return library
