"""Why the original report's figures are what they are: the sentences between replicate's tables."""

from __future__ import annotations

import textwrap
from typing import Any

from ..measure.inference import ENOUGH_CHUNKS
from .replication import N_DECODED, N_HELLO, N_PROMPT, N_TIMED, REPORT

WIDTH = 110


def prose(text: str, first: str = "", rest: str = "") -> str:
    """A paragraph in lines, from one whose lines break anywhere."""
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def bullets(*texts: str) -> str:
    return "\n".join(prose(text, "- ", "  ") for text in texts)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %"


_CALLS, _ALL, _LAYERS = REPORT["calls_per_layer"], REPORT["calls"], REPORT["layers"]
_EACH = N_PROMPT + N_DECODED

INTRODUCTION = f"""
    The original report rounds the FFN norm's output of {REPORT["model"]} to BF16 inside llama.cpp, in layer
    {REPORT["layer"]} or in all, and has the tables below. Each stands here again: the report's figure,
    ours in the report's mode, ours in the right mode. Times, and what follows from them, and addresses are
    the machine's; all else comes out the same each time."""

RANDOM_WEIGHTS = """
    A model of random weights has a real one's shape, counts and times. What it writes and predicts means
    nothing, and neither does what rounding does to that."""

COUNTS = bullets(
    f"""A "call" of the report is a row: its counter sits inside the kernel's loop over rows, and a row is
    one token's. {REPORT["tensor_elements"]:,} elements are {N_PROMPT} rows of 2,048, a prompt of
    {N_PROMPT} tokens. With {N_DECODED} token decoded after it {_EACH} rows pass the attention norm and
    {_EACH} the FFN norm, together {_CALLS}. No tensor is split. (The load that the report names, "Hello
    world" and {N_HELLO} tokens, has other counts: the last column.)""",
    f"""All {_CALLS} had one data pointer because what is printed is the tensor's address, not the row's,
    and because memory is used again: whole tensors with other values come to lie at one place.""",
    f"""{_ALL} is {_LAYERS} × {_CALLS}, not a count. In the last layer llama.cpp, and this program as well,
    keeps after the attention only the rows whose logits are wanted, here one per evaluation; the FFN norm
    sees no others.""",
)


def rows(data: dict[str, Any]) -> str:
    """Of the quantisation statistics: coverage, the norm that was hit, the type, the fused norm."""
    types, one = data["type_numbers"], REPORT["quantisation"]["one"]["rounded"]
    found = [
        f"""The report's 100 % are {one} of the {_CALLS} rows of a layer, {percent(one / _CALLS)}, and
        {_LAYERS} of {_ALL} in all. It takes the other rows for more calls on the same data, which must not
        be rounded twice. They are other tokens' rows, and were not rounded once.""",
        """None of the rounded rows is the FFN norm's. llama.cpp names the raw output of every RMSNorm of
        layer 5 `norm-5`; the attention norm comes first, so the first row to reach the name is row 0 of
        the *attention* norm, the first token's. The column "first call on the FFN norm" is that mode on
        the norm that was meant.""",
        f"""The patch has {types["report"]} for BF16's number. In ggml {types["report"]} is
        {types["report_is"]}, and BF16 is {types["bf16"]}. Nothing came of it: the patch rounds to BF16
        whatever the number. `fq.replicate.interface` acts on the number, and refuses {types["report"]}.""",
    ]
    names = next((m["architecture"]["names"] for m in data["models"] if "architecture" in m), None)
    if names:
        found.append(
            f"""ggml now computes the norm and the multiply by its weight as one. The kernel then sees the
            multiply's name, `attn_norm-5` or `ffn_norm-5`, and neither of the patch's patterns,
            `blk.%d.ffn_norm` and `norm-%d`, matches it: of the {names["norms"]} norms of the first model
            here the patch knows {names["known_alone"]} alone and {names["known_fused"]} fused. The
            unchanged patch would round nothing today, and say nothing."""
        )
    return bullets(*found)


LOAD = f"""
    {N_PROMPT} tokens of prompt, then {N_TIMED} one by one, on one thread: the report's load. The report
    has one run of each configuration. Ours take turns at every evaluation; the overhead is the median
    ratio to the baseline beside it, with its 95 % interval over rounds, as in `fq bench`. One such
    interval in twenty leaves out the truth. Throughput is that of the total."""


def times() -> str:
    """Of the performance table, from the report's own figures."""
    theirs = REPORT["performance"]
    total = theirs["total"]
    n = REPORT["quantisation"]["all"]["rounded"]
    row_ms = (total[2] - total[0]) / n
    tokens = [ms * rate / 1e3 for ms, rate in zip(total, theirs["tokens_per_second"], strict=True)]
    decoded = [round(t) - N_PROMPT for t in tokens]
    each = [f"{ms / d:.0f}" for ms, d in zip(theirs["eval"], decoded, strict=True)]
    return bullets(
        f"""The report's {change(total[2], total[0])} of the total time for all layers cannot be rounding:
        its mode rounds {n} rows of 2,048 numbers, so that each row would have taken {row_ms:.1f} ms, and
        each number {1e3 * row_ms / 2048:.0f} µs. One run of each configuration, one after the other, shows
        what else the machine did.""",
        f"""The report's layer-5 run has an eval time
        {percent(1 - theirs["eval"][1] / theirs["eval"][0], 0)} *below* the baseline's because it evaluated
        fewer tokens. Total time × throughput gives {tokens[0]:.1f}, {tokens[1]:.1f} and {tokens[2]:.1f}
        tokens for its three runs; without {N_PROMPT} of prompt {decoded[0]}, {decoded[1]} and
        {decoded[2]}, which took {each[0]}, {each[1]} and {each[2]} ms each. The three runs did not do the
        same work.""",
    )


def unit_value(found: dict[str, Any]) -> str:
    """Of a value that the report's unit test truncates, where ggml does not."""
    even = found["nearest-even"]
    return f"""
        For {found["value"]} the report has {found["report"]["result"]}: the value with its low 16 bits cut
        off. ggml's rule, to nearest with ties to even, gives {even["result"]}, and the difference
        {even["difference"]}. `ggml_compute_fp32_to_bf16`, which the patch calls, follows that rule: the
        unit test did not call it."""


def differences(found: dict[str, Any]) -> str:
    runs = found["runs"]
    rows = {(run["modes"]["report"]["first"][0], run["modes"]["report"]["last"][0]) for run in runs}
    tokens = {run["first_token"] for run in runs}
    if len(tokens) == 1:
        why = f"""All {len(runs)} prompts begin with the same token, which the tokenizer puts there, and
            the first row depends on no other: it is one row each time, but for what the order of a sum of
            products changes."""
    else:
        why = f"The {len(runs)} prompts have {len(tokens)} first tokens, which give {len(rows)} rows."
    return f"""
        Layer {found["layer"]}, each prompt with {N_DECODED} token decoded after it. In the report's mode a
        run rounds one row: it has one difference of the first element and one of the last, and no range.
        Of what runs, layers or rows its ranges are the report does not say. {why} Those are rows of the
        attention norm, the right mode's are the FFN norm's: other numbers. Of both, ggml's rule changes an
        element by at most 2^-8 of its power of two."""


TEXT = """
    The report's text is one sample, at llama-cli's default temperature, with no baseline beside it. That a
    model goes on writing says little: the likeliest token can stay the same while every probability moves.
    The last column is a measure of that, and section 7 one with an interval."""


def perplexity(found: dict[str, Any]) -> str:
    """What this model's figures say."""
    lines = []
    klds = found["report"]["chunk_mean_kld"]
    if len(klds) > 1 and klds[0] > 0 and not any(klds[1:]):
        lines.append(
            f"""In the report's mode all of the difference is in the first chunk, whose mean KL is
            {klds[0]:.3e}. Once each layer has had its row nothing more is rounded, and the other chunks
            equal the baseline's exactly."""
        )
    right = found["right"]["comparison"]
    if right["ln_ppl_ratio"]:
        lines.append(
            """Of the perplexity's change there is one rounding's figure: whether another, by dither or in
            another order of summation, would share its sign takes --realisations to say."""
        )
    interval = right["mean_kld_ci95_chunks"]
    if interval is not None and right["mean_kld"] > 0:
        low, high = (end / right["mean_kld"] - 1 for end in interval)
        lines.append(
            f"""The 95 % interval of the right mode's mean KL divergence goes from {percent(-low, 0)} below
            the figure to {percent(high, 0)} above it."""
        )
    if found["n_chunks"] < ENOUGH_CHUNKS:
        lines.append(f"These are fewer than {ENOUGH_CHUNKS} chunks: intervals are wide, or there are none.")
    return " ".join(lines)


PERPLEXITY = """
    The report broke its measurement off, and infers from the generated text that perplexity does not
    suffer. In its mode, which rounds one row per layer, next to nothing could. llama-perplexity could not
    have shown the right mode's effect either: to compare two runs it keeps the first one's
    log-probabilities in 16 bits, with the least of them cut off, which is coarser than the effect. And
    llama.cpp has more than the norm's rounding in its figures: ggml rounds the input of every quantised
    matrix product to 8 bits, which changes more. Here activations stay float32 and the two streams are
    compared token by token in float64."""
