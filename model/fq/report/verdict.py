"""What a run says, in words: never more than its intervals and tests say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..measure.inference import ENOUGH_CHUNKS, LEVEL, MIN_CHUNKS
from ..measure.who_pays import is_carried_by_few
from . import formats
from .data import REALISATION, Group, capital, control_of, groups_of, is_finite, listed, plain
from .elsewhere import Elsewhere
from .layers import additivity, chunks_text, layers_text, who_costs_most
from .noise import noise_text
from .perplexity import in_short as perplexity_in_short
from .perplexity import perplexity_text
from .units import units_text
from .words import NAMED, count

MOST_CHOICES = 8  # whose statements stand on the page without being asked for


@dataclass(frozen=True)
class Statement:
    """tone is "bad" where the figures cannot be trusted, "warning" where they are not all there; of_choice
    where it is about one of the run's choices alone."""

    about: str
    lines: tuple[str, ...]
    tone: str = ""
    of_choice: bool = False


def _statement(about: str, *lines: str, tone: str = "", of_choice: bool = False) -> Statement:
    return Statement(about, tuple(line for line in lines if line), tone, of_choice)


def in_short_and_in_full(
    data: dict[str, Any], elsewhere: Elsewhere | None = None
) -> tuple[list[Statement], list[Statement]]:
    """The verdict; where it would be long, without what is said of each choice, which comes second."""
    said = verdict(data, elsewhere)
    of_choice = [statement for statement in said if statement.of_choice]
    if len(of_choice) <= MOST_CHOICES:
        return said, []
    return [statement for statement in said if not statement.of_choice], of_choice


def verdict(data: dict[str, Any], elsewhere: Elsewhere | None = None) -> list[Statement]:
    """``data`` as of `figures`; what must be known before all else comes first."""
    said = _partial(data)
    if not data["n_chunks"]:
        return said
    groups = [group for group in groups_of(data) if group.singles and not group.control]
    control, other = _control(data), bool(data.get("baseline") or data.get("base_model"))
    if control.tone:
        said.append(control)
    if data.get("base_model"):
        file = plain(os.path.basename(data["base_model"]))
        text = f"All is compared with another file, {file}: a figure holds what this one costs beside it."
        said.append(_statement("Baseline", text, tone="warning"))
    if data.get("baseline"):
        rules = listed([plain(rule) for rule in data["baseline"]])
        profile = plain(data.get("baseline_profile", ""))
        under = f"{profile} ({rules})" if profile else rules
        text = f"All is compared with the model under {under}, not with the unrounded one."
        said.append(_statement("Baseline", text, tone="warning"))
    said += _same_text(data)
    said += _not_finite(data)
    units = [group for group in groups_of(data) if group.parts]
    if groups or not units:
        said.append(_in_short(groups, control.tone == ""))
    for group in units:
        about, texts = units_text(group)
        said.append(_statement(about, *texts, of_choice=True))
    said += [_statement(about, text, of_choice=True) for about, text in formats.orders(groups)]
    for group in groups:
        name = f": {group.name}" if len(groups) > 1 else ""
        lines = layers_text(group), chunks_text(group), additivity(group), perplexity_text(group)
        # of noise beside another baseline most would be what the model itself costs
        noise = "" if other else noise_text(group)
        said.append(_statement(f"Which layers{name}", *lines, noise, of_choice=True))
    said += _few_tokens(data)
    if elsewhere is not None:
        said.append(_statement("Elsewhere", *elsewhere.lines()))
    if not control.tone:
        said.append(control)
    said.append(_how_sure(data))
    return [replace(one, lines=tuple(map(_of_baseline, one.lines))) for one in said] if other else said


def _of_baseline(text: str) -> str:
    """What is said of the unrounded model elsewhere, where the baseline is another."""
    return text.replace("the unrounded model", "the baseline").replace(" unrounded, changes", ", changes")


def _partial(data: dict[str, Any]) -> list[Statement]:
    if not data["partial"]:
        return []
    done, asked = data["n_chunks"], data["n_chunks_asked"]
    if not done:
        text = f"No chunk of {asked} has ended in every cell yet, so there are no figures."
    else:
        n = len(data["behind"])
        but = f" but {count(n)} that {'are' if n > 1 else 'is'} left out" if n else ""
        of_these = f"all figures here are of these {done}."
        text = f"{done} of {asked} chunks have ended in every cell{but}; {of_these}"
    return [
        _statement("Partial result", f"{text} The sweep's own command with --resume goes on.", tone="warning")
    ]


def _control(data: dict[str, Any]) -> Statement:
    control = control_of(data)
    if control is None:
        text = "This run has no control: the baseline was not compared with itself."
        return _statement("Control", text, tone="warning")
    if control["exactly_zero"]:
        text = (
            "The baseline run a second time differs from itself by exactly 0 in every figure, as it must: "
            "whatever is above 0 here is "
            + ("what the two files differ by." if data.get("base_model") else "the rounding's doing.")
        )
        return _statement("Control", text)
    text = "The baseline run a second time does NOT come out as 0: no figure of this run can be trusted."
    return _statement("Control", text, tone="bad")


def _same_text(data: dict[str, Any]) -> list[Statement]:
    files = [os.path.basename(each["file"]) for each in data.get("calibrations", []) if each["same_text"]]
    if not files:
        return []
    text = (
        f"The scales of {plain(listed(files))} were found on the text that is measured on: on other text "
        "they may cost more."
    )
    return [_statement("Static scales", text, tone="warning")]


def _not_finite(data: dict[str, Any]) -> list[Statement]:
    broken = [e for e in data["cells"] if e["kind"] != REALISATION and not is_finite(e)]
    if not broken:
        return []
    names = [plain(entry["name"]) for entry in broken]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    which = f"{', '.join(names[:NAMED])}{more}" if more else listed(names)
    text = f"Not every token of {which} has finite figures: these stand in no order."
    return [_statement("Not finite", text, tone="warning")]


def _few_tokens(data: dict[str, Any]) -> list[Statement]:
    """Cells whose mean KL divergence is that of few tokens."""
    cells = [e for e in data["cells"] if is_carried_by_few(e["comparison"].get("who_pays"))]
    if not cells:
        return []
    names = [plain(entry["name"]) for entry in cells]
    which = (
        f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more" if len(names) > NAMED else listed(names)
    )
    text = f"In {which} 1 % of the tokens have half of the KL divergence or more: the mean is theirs."
    return [_statement("Few tokens", text, tone="warning")]


def _how_sure(data: dict[str, Any]) -> Statement:
    n, ctx, scored = data["n_chunks"], data["n_ctx"], data["n_scored"]
    here, is_the_text = _which_chunks(data)
    if n < MIN_CHUNKS:
        text = (
            f"{capital(count(n))} chunk{'s' if n > 1 else ''} of {ctx} tokens, {scored} scored: fewer than "
            f"{count(MIN_CHUNKS)}, so there is no interval here and no rank, nothing is ordered or resolved."
        )
        return _statement("How sure", text, here, tone="warning")
    text = (
        f"Intervals are 95 %, by Student's t over {n} chunks of {ctx} tokens ({scored} scored), of a KL "
        "divergence on the logarithm; they are pointwise: each holds by itself, not all of them at once. "
        "Ordered, or resolved, is said by paired tests over the same chunks alone, all tests of a list "
        "adjusted together (Holm): the chance that any of them is falsely called so is about "
        f"{100 * LEVEL:.0f} %. That two intervals overlap says nothing of their order."
    )
    few = ""
    if n < ENOUGH_CHUNKS:
        few = f"Fewer than {count(ENOUGH_CHUNKS)} chunks: how much they scatter is itself hardly known."
    return _statement("How sure", text, few, here, tone="" if is_the_text and not few else "warning")


def _which_chunks(data: dict[str, Any]) -> tuple[str, bool]:
    """What of the text was measured, and whether it stands for the text."""
    n, of_text = data["n_chunks"], data["n_tokens"] // data["n_ctx"]
    if n >= of_text:
        return f"All {n} chunks of the text were measured, as a sample of text like it.", True
    if data.get("chunk_order", "first") == "random":
        return f"They were drawn at random from the text's {of_text} (seed {data.get('chunk_seed')}).", True
    return (
        f"They are the first of the text's {of_text}: all that is said is of these neighbouring chunks, not "
        "of the text.",
        False,
    )


def _in_short(groups: Sequence[Group], sound: bool) -> Statement:
    """The answer in a sentence for the formats, one for the layers, and one for the perplexity."""
    lines = formats.in_short(groups)
    layers: dict[str, list[str]] = {}
    for group in groups:
        name = group.name if _several_sites(groups) else group.spec
        layers.setdefault(who_costs_most(group), []).append(name)
    lines += [capital(f"{who}, in {listed(names)}.") for who, names in layers.items()]
    lines.append(perplexity_in_short(groups))
    if sound:
        lines.append("The control is exactly 0.")
    return _statement("In short", *lines)


def _several_sites(groups: Sequence[Group]) -> bool:
    return len({group.sites for group in groups}) > 1
