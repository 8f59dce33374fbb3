"""Perplexity by llama.cpp's definition, with the baseline, the rules and the control side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fq_kernels import Executor, default_fpu, exp
from fq_kernels.rules import FakeQuant

from ..errors import FqError
from ..run.model import Model, check_same_vocabulary
from ..run.trace import Trace
from .base_file import BaseFile, check_base
from .chunks import SCORED, Settings
from .realisations import adjust, fallen_anew, has_none, summary
from .statistics import Paired, chunk_means, is_exactly_zero, ppl_interval, ppl_se, summarise
from .streams import Stream, Streams


class Perplexity(Streams):
    """One measurement; iterate over it to run it, chunk by chunk.

    model, tokens  the text, tokenised once; as far as the chunks go is enough for the first ones
    settings       on which chunks, and how; they may be given by name too, as in ``n_ctx=64``
    fake_quant     the rules of the quantised stream; None: the baseline alone
    baseline       with rules, also run the model without them and compare
    control        also run the baseline a second time; every difference must be exactly 0
    trace          gets the kernel calls, labelled with stream and chunk: its place in the text, from 0
    baseline_activations
                   the baseline's, where they differ from the settings': then the stream is compared
                   with it, with or without rules
    base_model     another file of the same vocabulary, whose the baseline is; then the model is compared with
                   it, with or without rules
    base_fake_quant
                   the rules of the baseline, on its model's values; None: it has none
    base_file      log-probabilities that are the baseline's, as another program has written them; the tokens
                   are then the file's
    realisations   how often the rules' rounding is made to fall anew, its own time included, for
                   what it does to the perplexity

    ``for chunk in run: ...`` yields each chunk's position in the run as it ends; ``run.result()``
    gives the figures of the chunks that ended so far, so an interrupted run loses at most one chunk.
    Raises FqError for a text that is too short or a context that does not fit, and NotFiniteError
    where the baseline's logits are not finite; a stream's that are not are in `Streams.not_finite`.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        *,
        fake_quant: FakeQuant | None = None,
        baseline: bool = True,
        control: bool = False,
        executor: Executor,
        trace: Trace | None = None,
        baseline_activations: str | None = None,
        base_model: Model | None = None,
        base_fake_quant: FakeQuant | None = None,
        base_file: BaseFile | None = None,
        realisations: int = 1,
        settings: Settings | None = None,
        **changes: Any,
    ) -> None:
        settings = Settings.changed(settings, changes)
        self.fake_quant = fake_quant
        self.activations = activations = settings.activations
        self.baseline_activations = baseline_activations or activations
        # whether there is a stream beside the baseline
        other = base_model is not None or base_fake_quant is not None or base_file is not None
        if other and not baseline:
            raise FqError("a baseline of its own needs the baseline")
        if base_model is not None:
            check_same_vocabulary(model, base_model)
            if settings.n_ctx > (most := base_model.hparams.n_ctx_train):
                raise FqError(f"{base_model.path}: context of {settings.n_ctx} tokens: it allows 1 to {most}")
        if base_file is not None:
            check_base(base_file, model.hparams.n_vocab, model.path)
            if settings.scored != SCORED[0]:
                raise FqError(
                    f"{base_file.path} has the second half of each chunk: nothing else can be scored"
                )
        self.base_model, self.base_fake_quant, self.base_file = base_model, base_fake_quant, base_file
        self.with_stream = other or fake_quant is not None or self.baseline_activations != activations
        self.with_baseline = not self.with_stream or baseline
        self.with_control = control
        if control and not self.with_baseline:
            raise FqError("the control is a second baseline: it needs the baseline")
        streams = [Stream("quantised", fake_quant)] if self.with_stream else []
        if realisations < 1:
            raise FqError(f"there must be 1 realisation at least, not {realisations}")
        self.n_realisations = realisations
        if realisations > 1:
            if fake_quant is None or not baseline:
                raise FqError("realisations are of a rule, and compared with the baseline")
            if has_none([str(rule) for rule in fake_quant.rules]):
                raise FqError("a noise control has no other realisations")
            streams += [
                Stream(
                    f"realisation {number + 1}",
                    FakeQuant(
                        model.values, [fallen_anew(r, number) for r in fake_quant.rules], count_errors=False
                    ),
                )
                for number in range(1, realisations)
            ]
        if control:
            again = (
                None if base_fake_quant is None else FakeQuant(base_fake_quant.values, base_fake_quant.rules)
            )
            streams.append(self._base("control", again))
        super().__init__(
            model,
            tokens,
            streams,
            baseline=self._base("baseline", base_fake_quant) if self.with_baseline else None,
            executor=executor,
            trace=trace,
            settings=settings,
        )

    def _base(self, name: str, rules: FakeQuant | None) -> Stream:
        logits = None if self.base_file is None else self.base_file.log_p
        return Stream(name, rules, self.baseline_activations, self.base_model, logits)

    @property
    def nll(self) -> list[np.ndarray]:
        """Of the stream asked for, per chunk."""
        return self.nll_of(0) if self.with_stream else self.nll_base

    @property
    def paired(self) -> list[Paired]:
        return self.paired_of(0) if self.with_stream else []

    @property
    def control_paired(self) -> list[Paired]:
        return self.paired_of(-1) if self.with_control else []

    @property
    def ppl(self) -> float:
        """Of the chunks so far, of the stream asked for."""
        return ppl_se(np.concatenate(self.nll))[0]

    @default_fpu()
    def result(self) -> dict[str, Any]:
        """The figures of the chunks that ended, as written to JSON.

        chunks[].index is a chunk's place in the text, chunks[].nll a mean in nats; largest_tokens has for
        each of the comparison's ``who_pays.largest`` the text before it, some of it, and the token that came.
        """
        cumulative, total, count = [], 0.0, 0
        for nll in self.nll:
            total += float(nll.sum())
            count += len(nll)
            cumulative.append(exp(total / count))
        chunks: list[dict[str, float]] = [
            {"index": index, "nll": float(nll.mean()), "ppl_cumulative": ppl}
            for index, nll, ppl in zip(self.text.indices, self.nll, cumulative, strict=False)
        ]
        ppl, se = ppl_se(np.concatenate(self.nll)) if self.nll else (math.nan, math.nan)
        for chunk, paired in zip(chunks, self.paired, strict=False):
            chunk["nll_base"] = float(paired.nll_base.mean())
            chunk["mean_kld"] = float(paired.kld.mean())
        result: dict[str, Any] = {
            **self.about(),
            "activations": self.activations,
            "ppl": ppl,
            "ppl_se": se,
            "ppl_ci95_chunks": ppl_interval(self.nll),
            "chunks": chunks,
            "not_finite": self.not_finite.get(0) if self.with_stream else None,
            "not_finite_tokens": int(sum((~np.isfinite(nll)).sum() for nll in self.nll)),
        }
        if self.fake_quant is not None:
            result["fake_quant"] = self.fake_quant.as_dict()
        if self.base_model is not None:
            result["base_model"] = self.base_model.path
        if self.base_file is not None:
            result["base_file"] = self.base_file.path
        if self.base_fake_quant is not None:
            result["base_fake_quant"] = self.base_fake_quant.as_dict()
        if self.paired:
            result["baseline_activations"] = self.baseline_activations
            result["comparison"] = summarise(self.paired, self.settings.first_scored)
            result["largest_tokens"] = [
                self.text.words(token["chunk"], token["token"])
                for token in (result["comparison"]["who_pays"] or {}).get("largest", [])
            ]
        if self.paired and self.n_realisations > 1:
            found = summary(
                [chunk_means(self.paired_of(i))["ln_ppl_ratio"].tolist() for i in range(self.n_realisations)]
            )
            adjust([found])
            result["realisations"] = found
        if self.control_paired:
            control = summarise(self.control_paired, self.settings.first_scored)
            result["control"] = control | {"exactly_zero": is_exactly_zero(control)}
        return result
