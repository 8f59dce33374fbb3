"""Text to token ids and back, from the vocabulary that a GGUF file carries.

Three kinds of vocabulary are read, named as `tokenizer.ggml.model` names them: `gpt2` (byte-level BPE),
`llama` (SentencePiece BPE, "SPM") and `gemma4` (BPE by merges on SPM's characters, line by line). The ids
are those of llama.cpp for the same file and text; the merging itself is done by the `tokenizers` library
(bpe.py).

SPM limit: llama.cpp merges the pair whose union scores highest and, among equal scores, the leftmost one.
`tokenizers` has no equal ranks, so a vocabulary with equal scores can give another, equally scored, split.
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fq_kernels import GGUFStrings

from ..errors import FqError
from .bpe import SPACE, Merger, byte_level_alphabet, byte_level_merger, merge_pair, raw_merger, spm_merger
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .segments import byte_level_segments, line_segments, spm_segments
from .vocabulary import TokenizerError, Vocabulary, is_utf8

_BYTE_OF = byte_level_alphabet()
# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_SEGMENT = 1 << 16  # characters
# The first texts, while they are short, get mergers of their own: for a long text, or for many, that would
# cost more than the one for all texts.
_SHORT_TEXT = 50_000  # in substrings that can be a token
_N_SHORT_TEXTS = 8
# Every cut of an SPM token is tried when its merges are made; real ones have some tens of characters.
_MAX_SPM_TOKEN = 1024


# Files often name one end only, or give it the type of plain text; llama.cpp knows these by their text.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
# Fill-in-the-middle tokens by the name of their key, looked for by their text where no key names one. (Of
# several llama.cpp takes the first in its hash table.) The last three end a file or a repository.
_FILL_IN_TEXTS = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>",
                "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>",
                "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>",
                "\u2581<MID>", "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_OLDER_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
_FILE_ENDS = ("fim_pad", "fim_rep", "fim_sep")
# Tokens of a reply's structure, which are shown.
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_C_SPACE = " \t\n\v\f\r"


# Of `tokenizer.*`: what is read here, and what is of other kinds of vocabulary or of a classifier's head.
_KEYS = {
    *(f"ggml.{name}_token_id" for name in (
        "bos", "eos", "eot", "eom", "unknown", "padding", "fim_pre", "fim_suf", "fim_mid", "fim_pad",
        "fim_rep", "fim_sep", "prefix", "suffix", "middle", "seperator", "separator", "cls", "mask")),
    *(f"ggml.{name}" for name in (
        "model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token",
        "add_space_prefix", "token_type_count", "add_sep_token", "remove_extra_whitespaces",
        "precompiled_charsmap", "normalizer.lowercase", "normalizer.strip_accents")),
    "chat_template", "huggingface.json", "rwkv.world",
}  # fmt: skip


def is_known_key(key: str) -> bool:
    """Whether a key `tokenizer.*` is one whose meaning is known here."""
    return key.removeprefix("tokenizer.") in _KEYS


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
        if value is not None and value < 0:
            raise TokenizerError(f"tokenizer.{key} is {value}, which is no token id")
        if value is not None and value < n_vocab:
            return int(value)
        fallback = default if default is not None and default < n_vocab else None
        if value is not None:
            warnings.warn(
                f"tokenizer.{key} is {value}, outside the vocabulary of {n_vocab} tokens: taken as "
                + ("not given" if fallback is None else str(fallback)),
                stacklevel=2,
            )
        return fallback

    def strings(self, key: str) -> GGUFStrings:
        value: GGUFStrings | list[str] | None = self._get(key, (GGUFStrings, list), "an array of strings")
        if isinstance(value, GGUFStrings):
            return value
        if value is None:
            raise TokenizerError(f"tokenizer.{key} is missing")
        if not all(type(item) is str for item in value):
            raise TokenizerError(f"tokenizer.{key} must be an array of strings")
        try:
            return GGUFStrings.of(value)
        except UnicodeEncodeError as e:
            raise TokenizerError(f"tokenizer.{key}: {e.object!r:.60} holds lone surrogates") from None

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
    """Built by `Tokenizer.from_metadata`; its attributes do not change afterwards.

    kind: "llama" (SPM), "gpt2" or "gemma4" (BPE). n_vocab: number of tokens. bos_id, eos_id, unk_id: id or
    None. eog_ids: ids that end a generation. add_bos, add_eos: whether `encode` adds them around a text.
    add_space_prefix: SPM only, a space is put before the text. chat_template: Jinja source or None.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        keys = _Keys(metadata)
        kind = keys.text("ggml.model")
        if kind not in ("llama", "gpt2", "gemma4"):
            raise TokenizerError(
                f"tokenizer.ggml.model {kind!r:.60} is not supported; llama, gpt2 and gemma4 are"
            )
        self.kind: str = kind
        spm = kind == "llama"

        self._tokens = tokens = Vocabulary(keys.strings("ggml.tokens"))
        self.n_vocab = n = len(tokens)
        if n == 0:
            raise TokenizerError("tokenizer.ggml.tokens is empty")

        # What is missing, or out of range, is llama.cpp's default for SPM. For BPE that is 11, Falcon's end
        # of text: a plain character elsewhere, at which a reply would end, so there it is none.
        self.bos_id = keys.token_id("ggml.bos_token_id", n, 1 if spm else None)
        self.eos_id = keys.token_id("ggml.eos_token_id", n, 2 if spm else None)
        self.unk_id = keys.token_id("ggml.unknown_token_id", n, 0 if spm else None)
        self.chat_template = keys.text("chat_template")
        self.add_space_prefix = spm and keys.flag("ggml.add_space_prefix", True)

        types = keys.numbers("ggml.token_type", "iu", n)
        types = np.full(n, _NORMAL) if types is None else types.astype(np.int64)
        self.eog_ids = self._known_by_text(keys, types)
        for i in np.flatnonzero(types == _BYTE).tolist():
            if not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self._tokens[i]):
                raise TokenizerError(
                    f"tokenizer.ggml.token_type: token {i} ({self._tokens[i]!r:.60}) is no byte"
                )
        self._types = types
        special = (types == _CONTROL) | (types == _UNKNOWN)
        self._special = frozenset(np.flatnonzero(special).tolist())
        # Longest first (in bytes), as llama.cpp looks for them in a text.
        whole = np.flatnonzero(special | (types == _USER_DEFINED)).tolist()
        self._whole = sorted(whole, key=lambda i: -len(_utf8(self._tokens[i])))

        # llama.cpp knows Phi-3 by its name: there these tokens take the space after them.
        name = metadata.get("general.name")
        phi3 = isinstance(name, str) and re.search("phi-?3", name.lower())
        not_these = {"<unk>", "<s>", "<|endoftext|>"}
        strips = {i for i in whole if self._tokens[i] not in not_these} if phi3 else set()
        self._strips_right = frozenset(strips)

        self._pre = pre = _pre_tokenizer(keys) if kind == "gpt2" else None
        self._new_merger = self._spm(keys) if spm else self._by_merges(keys, pre)
        self._merger: Merger | None = None  # for all texts, made when it is needed
        self._n_short_texts = 0
        self._pieces: dict[int, bytes] = {}

        # of Gemma 4, llama.cpp overrides a file that says no
        self.add_bos = kind == "gemma4" or keys.flag("ggml.add_bos_token", pre is None or pre.add_bos)
        self.add_eos = keys.flag("ggml.add_eos_token", False)
        for wanted, token, word in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if wanted and token is None:
                raise TokenizerError(f"tokenizer.ggml.add_{word}_token is set without a {word}_token_id")

    def __repr__(self) -> str:
        return f"<Tokenizer {self.kind}: {self.n_vocab} tokens, BOS {self.bos_id}, EOS {self.eos_id}>"

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata: string arrays as GGUFStrings or list[str] (bytes that are not UTF-8 as
        surrogate escapes), number arrays as numpy arrays. Raises TokenizerError naming the key at fault."""
        return cls(metadata)

    def _known_by_text(self, keys: _Keys, types: np.ndarray) -> frozenset[int]:
        """Gives the tokens that llama.cpp knows by their text the types (n_vocab,) that it gives them, and
        returns the ids that end a generation."""

        known_ids = self._tokens.ids({*_END_TEXTS, *_SHOWN_TEXTS}.union(*_FILL_IN_TEXTS.values()))

        def ids_of(texts: Iterable[str]) -> set[int]:
            return {known_ids[text] for text in texts if text in known_ids}

        ends = {keys.token_id(f"ggml.{name}_token_id", self.n_vocab) for name in ("eot", "eom")} | {
            self.eos_id
        }
        for name, texts in _FILL_IN_TEXTS.items():
            names = [_OLDER_KEYS[name], name] if name in _OLDER_KEYS else [name]
            values = [keys.token_id(f"ggml.{n}_token_id", self.n_vocab) for n in names]
            named = {i for i in values if i is not None}
            found = named or ids_of(texts)
            if not named:
                types[list(found)] = _CONTROL
            if name in _FILE_ENDS:
                ends |= found
        known = ids_of(_END_TEXTS)
        types[list(known)] = _CONTROL
        types[list(ids_of(_SHOWN_TEXTS))] = _USER_DEFINED
        ends |= known
        # Families in which these are no ends.
        end_texts = {self._tokens[i]: i for i in ends if i is not None}
        plain = {}
        if end_texts.keys() & {"<|call|>", "<|calls|>"} and end_texts.keys() & {"<|return|>", "<|flush|>"}:
            plain["<|end|>"] = _USER_DEFINED
        if end_texts.keys() & {"<|tool_response>", "<|plamo:eos|>"}:
            plain["</s>"] = _NORMAL
        for text in plain.keys() & end_texts.keys():
            types[end_texts[text]] = plain[text]
            ends.remove(end_texts[text])
        return frozenset(i for i in ends if i is not None)

    def _by_merges(self, keys: _Keys, pre: PreTokenizer | None) -> Callable[[str | None], Merger]:
        """Byte-level with a pre-tokenizer, else on characters."""
        vocab, merges = self._tokens, keys.strings("ggml.merges")

        def merger(text: str | None) -> Merger:
            if text is None:  # else those of the text's own tokens are taken, a start's time less
                _check_merges(merges[:], vocab.text_index)
            if pre is None:
                return raw_merger(vocab, merges, self._fallback, text)
            return byte_level_merger(vocab, merges, pre.patterns, pre.ignore_merges, text)

        return merger

    def _spm(self, keys: _Keys) -> Callable[[str | None], Merger]:
        scores = keys.numbers("ggml.scores", "fiu", self.n_vocab)
        if scores is None:
            raise TokenizerError("tokenizer.ggml.scores is missing")
        if np.isnan(scores).any():
            raise TokenizerError("tokenizer.ggml.scores holds a NaN")
        ranked = scores.astype(np.float64)
        if self._tokens.longest > _MAX_SPM_TOKEN:
            for i, token in enumerate(self._tokens):
                if len(token) > _MAX_SPM_TOKEN:
                    raise TokenizerError(f"tokenizer.ggml.tokens: token {i} has {len(token)} characters")
        unk = None if self.unk_id is None else self._tokens[self.unk_id]
        return lambda text: spm_merger(self._tokens, ranked, self._fallback, unk, text)

    def _fallback(self, char: str) -> list[int]:
        """Ids of a character that is no token: its bytes; in SPM the unknown token if one is missing."""
        ids = [self._byte_ids.get(f"<0x{byte:02X}>") for byte in _utf8(char)]
        if None in ids and self.kind == "llama":
            ids = [self.unk_id]
        return [i for i in ids if i is not None]

    @cached_property
    def _byte_ids(self) -> dict[str, int]:
        return self._tokens.ids(f"<0x{byte:02X}>" for byte in range(256))

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, limit: int | None = None
    ) -> list[int]:
        """Ids of a text. `add_special` adds BOS/EOS where the vocabulary asks for them; `parse_special`
        reads control tokens written in the text (`<|im_end|>`), which otherwise are plain text. With a
        `limit` only that many of the ids, without the work for the others.
        Raises TokenizerError for a text with lone surrogates."""
        if not text.isascii() and not is_utf8(text):
            raise TokenizerError("the text holds lone surrogates, so it is not Unicode text")
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        parts = self._parts(text, parse_special)
        if self.kind == "llama":
            # The start of a text, and what follows a token matched whole, is the start of a word.
            prefix = SPACE * self.add_space_prefix
            parts = [p if isinstance(p, int) else prefix + p.replace(" ", SPACE) for p in parts]
        elif self.kind == "gemma4":
            parts = [line for p in parts for line in ([p] if isinstance(p, int) else self._lines(p))]
        texts = [part for part in parts if isinstance(part, str)]
        merger = self._merger_for(texts) if texts else None
        for part in parts:
            if limit is not None and len(ids) >= limit:
                break
            if isinstance(part, int):
                ids.append(part)
                continue
            assert merger is not None
            for segment, is_word in self._segments(part):
                left = None if limit is None else limit - len(ids)
                if left is not None and left <= 0:
                    break
                found = merger.word_ids(segment, left) if is_word else merger.ids(segment)
                # the same int each time: one of its own for each token takes four times the list's memory
                ids += map(self._ints.__getitem__, found) if len(part) > _SEGMENT else found
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids if limit is None else ids[:limit]

    def _lines(self, text: str) -> list[str | int]:
        """The lines of a text and the line feeds between them, which are one token where there is one."""
        lines = [line for line in re.split("(\n+)", text.replace(" ", SPACE)) if line]
        ids = self._tokens.ids(line for line in lines if line[0] == "\n")
        return [ids.get(line, line) for line in lines]

    def _merger_for(self, texts: list[str]) -> Merger:
        if self._merger is None:
            if sum(map(len, texts)) <= _SHORT_TEXT and self._n_short_texts < _N_SHORT_TEXTS:
                # as it is merged: byte-level BPE has a character for each byte
                n = sum(len(_utf8(t) if self.kind == "gpt2" else t) for t in texts) + len(texts)
                if n * min(n, self._tokens.longest) <= _SHORT_TEXT:
                    self._n_short_texts += 1
                    return self._new_merger("\n".join(texts))
            self._merger = self._new_merger(None)
        return self._merger

    def _segments(self, text: str) -> Iterator[tuple[str, bool]]:
        if self.kind == "gemma4":
            return line_segments(text, _SEGMENT)
        if self._pre is None:
            return spm_segments(text, len(text) > _SEGMENT and self._by_word, _SEGMENT)
        return byte_level_segments(text, self._pre.patterns, _SEGMENT, self._pre.breaks)

    @cached_property
    def _by_word(self) -> bool:
        inner = re.compile(f"[^{SPACE}]{SPACE}")
        return not any(inner.search(token) for token in self._tokens)

    @cached_property
    def _ints(self) -> list[int]:
        return list(range(self.n_vocab))

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
                    if k and i in self._strips_right:
                        piece = piece.lstrip(_C_SPACE)
                    cut += [piece] * (piece != "")
            parts = cut
        return parts

    def _piece(self, i: int) -> bytes:
        """The bytes of a token."""
        piece = self._pieces.get(i)
        if piece is None:
            piece = self._pieces[i] = self._read_piece(self._tokens[i], int(self._types[i]))
        return piece

    def _read_piece(self, token: str, kind: int) -> bytes:
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            return _utf8(token)
        if kind == _BYTE:
            return bytes([int(token[3:5], 16)])
        if self.kind != "gpt2":
            return _utf8(token.replace(SPACE, " "))
        try:
            return bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # not byte-level text: it stands for itself
            return _utf8(token)

    def _joined(self, ids: Iterable[int], skip_special: bool) -> bytes:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            bad = next(i for i in ids if not 0 <= i < self.n_vocab)
            raise TokenizerError(f"token id {bad} is outside the vocabulary of {self.n_vocab} tokens")
        return b"".join([self._piece(i) for i in ids if not (skip_special and i in self._special)])

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
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for a conversation, [{"role": ..., "content": ...}, ...], to be encoded with
        `add_special=False, parse_special=True`. The template is the file's, so a process with limits renders
        it (chat.py); whatever goes wrong there is a TokenizerError."""
        if self.chat_template is None:
            raise TokenizerError("tokenizer.chat_template is missing: the model has no chat template")
        from .chat import render

        names: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None if documents is None else [dict(document) for document in documents],
            "add_generation_prompt": add_generation_prompt,
        }
        for word, token in (("bos", self.bos_id), ("eos", self.eos_id), ("unk", self.unk_id)):
            names[f"{word}_token"] = "" if token is None else self._tokens[token]
        try:
            return render(self.chat_template, names)
        except FqError as error:
            raise TokenizerError(f"tokenizer.chat_template failed: {error}") from None


def _pre_tokenizer(keys: _Keys) -> PreTokenizer:
    name = keys.text("ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(f"tokenizer.ggml.pre {name!r:.60} is not a known pre-tokenizer")
    return PRE_TOKENIZERS[name]


def _check_merges(merges: Iterable[str], vocab: Mapping[str, int]) -> None:
    for i, merge in enumerate(merges):
        left, right = merge_pair(merge)
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"tokenizer.ggml.merges: entry {i} ({merge!r:.60}) is no pair of known tokens"
            )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
