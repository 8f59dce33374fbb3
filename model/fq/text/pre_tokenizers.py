"""How byte-level BPE vocabularies cut text into words: ``tokenizer.ggml.pre`` by llama.cpp's names.

The patterns are those of the models' own tokenizer.json, as llama.cpp (src/llama-vocab.cpp) applies them: one
after another, each to what the ones before it left, where what no pattern matches is a word too. So the names
that share a row share a vocabulary's rule, whoever made it.
"""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """patterns       applied one after another
    ignore_merges  a word that is a token is taken whole
    add_bos        when the file does not say
    breaks         where words surely end: "lines", at spaces and line feeds and between a letter or digit and
                   punctuation; "spaces", only between something else and a space; "line ends", only after
                   a line feed or carriage return; "never", nowhere
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    breaks: str = "lines"


# 's, 't and so on, in lower case or in any
_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _llama3(
    digits: str,
    word: str = r"\p{L}+",
    rest: str = r"\p{L}\p{N}",
    spaces: str = _SPACES,
    short: str = _SHORT + "|",
) -> str:
    """Llama 3's and its kin: how many digits make a word, what a word is, and what punctuation is not."""
    return rf"{short}[^\r\n\p{{L}}\p{{N}}]?{word}|{digits}| ?[^\s{rest}]+[\r\n]*|{spaces}"


def _cased(digits: str, short: str) -> str:
    """GPT-4o's and Tekken's: a word is cut where a small letter meets a capital."""
    upper, lower = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{short}|{start}{upper}+{lower}*{short}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3 = _llama3(r"\p{N}{1,3}")
_QWEN2 = _llama3(r"\p{N}")
# the letters that DeepSeek LLM names one by one
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370"
    "-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-"
    "\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-"
    "\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a"
    "-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-"
    "\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-"
    "\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-"
    "\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_ASCII_MARKS = r"""!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"""
# without the spaces among them, as in the marks below: llama.cpp shows them to \s alone
_EAST_ASIAN = (
    "[\u4e00-\u9fa5\u0800-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    "\u3001-\u4e00\uac00-\ud7ff]+"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
    r"\s+$",
    _EAST_ASIAN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"[{_ASCII_MARKS}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_SPARK = (
    rf"[{_ASCII_MARKS}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2_SPACES = (
    r"\s*[\r\n]+|"
    + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
    + r"|\s{1}"
)
# BLOOM's words; what lies between them is a word too
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DIGIT_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2))

_ROWS: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (("default",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
         "jina-v5-nano"),
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    (("dbrx", "smaug-bpe", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    (("glm4", "glm5"), PreTokenizer((_LLAMA3,), ignore_merges=True)),
    (
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open",
         "grok-2"),
        PreTokenizer((_QWEN2,)),
    ),
    (("qwen35",), PreTokenizer((_llama3(r"\p{N}", r"[\p{L}\p{M}]+", r"\p{L}\p{M}\p{N}"),))),
    (("minicpm5",), PreTokenizer((r"\p{N}{1,3}", _llama3(r"\p{N}+")), ignore_merges=True)),
    (
        ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
         "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
        PreTokenizer((_GPT2,)),
    ),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _DIGIT_THEN_GPT2,
    ),
    (("falcon",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    (
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        PreTokenizer((_cased(r"\p{N}{1,3}", f"{_SHORT}?"),), breaks="spaces"),
    ),
    (
        ("tekken",),
        PreTokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True, breaks="spaces"),
    ),
    (("poro-chat", "bloom", "gpt3-finnish"), PreTokenizer((_BLOOM,), breaks="never")),
    (("viking",), PreTokenizer((_BLOOM, r"\p{N}"), breaks="never")),
    (
        ("jais-2",),
        PreTokenizer((_llama3(r"\p{N}{1,3}", spaces=_JAIS2_SPACES),)),
    ),
    (
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        PreTokenizer(
            (_llama3(r"\p{N}", short=r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|",
                     spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),)
        ),
    ),
    (
        ("seed-coder",),
        PreTokenizer((_QWEN2.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+"),)),
    ),
    (("ufakzeka",), PreTokenizer((_llama3(r"\p{N}", short=""),))),
    (("laguna",), PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    (("spark2_5",), PreTokenizer((*_DEEPSEEK3[:2], _SPARK, r"\p{N}"), breaks="spaces")),
    (("deepseek-llm",), PreTokenizer(_DEEPSEEK_LLM, breaks="line ends")),
    (("deepseek-coder",), PreTokenizer(_DEEPSEEK_CODER, breaks="line ends")),
    (
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        PreTokenizer(_DEEPSEEK3, breaks="spaces"),
    ),
)  # fmt: skip

PRE_TOKENIZERS = {name: rule for names, rule in _ROWS for name in names}
