"""fq's models in lm-evaluation-harness (pip install 'fq[lm-eval]').

    python -m fq.lm_eval run --model fq --model_args "model=smollm2,fake_quant=l_out[*]=bf16" --tasks ...

registers the model ``fq`` and runs lm-eval's own command; where lm-eval is called from Python, importing
this module registers it. Log-likelihoods are made by the same sums as all of fq's figures, so that they
depend on neither batch nor threads nor machine; under stochastic and first-call rules on what came before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as e:
    raise ImportError(
        f"fq.lm_eval needs lm-evaluation-harness: pip install 'fq[lm-eval]' ({e})", name=e.name
    ) from e

from fq_kernels import Executor

from .commands.rules import add_fake_quant, fake_quant_of
from .errors import BAD_INPUT, NOT_FINITE, FqError, NotFiniteError
from .gguf.cache import find
from .machine import default_threads
from .measure.likelihood import Likelihoods
from .run.context import Context
from .run.finite import not_finite_text
from .run.generation import Sampler, generate
from .run.model import Model

MAX_LENGTH = 2048  # tokens, of a model whose context is longer
MAX_GENERATED = 256  # tokens, where a task does not say, or half of the context
MAX_TOGETHER = 64  # requests of one context, after which lm-eval's cache is told


@register_model("fq")
class FqLM(TemplateLM):  # type: ignore[misc]
    """A GGUF file under rules, as lm-eval's ``--model fq``; ``--model_args`` are

    model        a file or an alias (smollm2)
    fake_quant   rules, as --fake-quant has them, with ; between them, or @FILE
    profile, norm_unit
                 as the options of the same name
    max_length   tokens of context: the model's, up to 2048
    threads      the processors that this process may use
    activations  "exact" or "ggml" (see Context)
    seed         of stochastic rounding and dither

    Raises FqError for what is wrong with them.
    """

    def __init__(
        self,
        model: str = "smollm2",
        fake_quant: str | Sequence[str] | None = None,
        profile: str | None = None,
        norm_unit: str | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        activations: str = "exact",
        seed: int = 0,
        offline: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """batch_size, max_batch_size and device, which lm-eval gives every model, change nothing."""
        super().__init__()
        numbers = {"max_length": max_length, "threads": threads, "seed": seed}
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise FqError(f"{name} must be a whole number, not {value!r}")
        texts: dict[str, Any] = {"profile": profile, "norm_unit": norm_unit, "fake_quant": fake_quant}
        for name, given in texts.items():  # lm-eval makes a number of what looks like one
            for text in given if name == "fake_quant" and isinstance(given, (list, tuple)) else [given]:
                if text is not None and not isinstance(text, str):
                    raise FqError(f"{name} must be text, not {text!r}")
        self.model = Model(find(str(model), offline=offline))
        most = self.model.hparams.n_ctx_train
        self.max_length = min(most, MAX_LENGTH) if max_length is None else max_length
        parser = argparse.ArgumentParser()
        add_fake_quant(parser)
        args = parser.parse_args([])
        args.seed, args.profile, args.norm_unit = seed, profile, [norm_unit] if norm_unit else None
        rules = fake_quant.split(";") if isinstance(fake_quant, str) else fake_quant
        args.fake_quant = [rule.strip() for rule in rules or () if rule.strip()]
        self.fake_quant = fake_quant_of(args, self.model)
        try:
            self.executor = Executor(default_threads() if threads is None else threads)
        except ValueError as e:
            raise FqError(f"threads: {e}") from None
        self._likelihoods = Likelihoods(
            self.model, self.max_length, self.executor, self.fake_quant, activations=activations
        )
        self._seed = seed
        self._samplers: dict[tuple[float, int, float], Sampler] = {}  # which draw on from text to text

    @property
    def context(self) -> Context:
        return self._likelihoods.context

    @property
    def eot_token_id(self) -> int:
        token = self.model.tokenizer.eos_id
        if token is None:
            raise FqError(f"{self.model.path}: the vocabulary has no token that ends a text")
        return token

    @property
    def prefix_token_id(self) -> int:
        """Before a text of which nothing is given."""
        token = self.model.tokenizer.bos_id
        return self.eot_token_id if token is None else token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Control tokens written in the text are read as such; BOS comes before it where the vocabulary adds
        one, unless it is written there."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(string, add_special=False, parse_special=True)
        add = tokenizer.add_bos if add_special_tokens is None else add_special_tokens and tokenizer.add_bos
        if add and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids]
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Of continuations in tokens, whose context is cut at its beginning where both are too long."""
        results: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="fq: log-likelihoods", disable=disable_tqdm) as bar:
            self._likelihoods.on_step = bar.update
            # answers to one question come one after the other, and share it
            for _, group in groupby(requests, key=lambda request: request[1]):
                while some := list(islice(group, MAX_TOGETHER)):
                    results += self._of_one_context(some)
        return results

    def _of_one_context(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]]
    ) -> Iterable[tuple[float, bool]]:
        wholes = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise FqError(
                    f"a continuation of {len(continuation)} tokens; the context has {self.max_length}"
                )
            given = context or [self.prefix_token_id]
            wholes.append([*given, *continuation][-(self.max_length + 1) :])
        firsts = [len(whole) - len(c) for whole, (_, _, c) in zip(wholes, requests, strict=True)]
        scored = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        some = [wholes[i] for i in scored], [firsts[i] for i in scored]
        found = dict(zip(scored, self._likelihoods.of(*some) if scored else [], strict=True))
        for i, (key, _, _) in enumerate(requests):
            one = found.get(i)
            if one is not None and not one.finite:
                raise NotFiniteError(not_finite_text(f"{self.model.path}, request {key}", {}))
            answer = (0.0, True) if one is None else (float(one.log_p.sum()), one.greedy)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            yield answer

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context's length that do not overlap in what they score."""
        totals = []
        for request in tqdm(requests, desc="fq: texts", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found = [self._of_one_context([pair]) for pair in pairs]
            totals.append(sum(log_p for each in found for log_p, _ in each))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of the stop sequences, which is not in it; greedy unless asked otherwise."""
        return [
            self._generated(*request.args)
            for request in tqdm(requests, desc="fq: generated texts", disable=disable_tqdm)
        ]

    def _generated(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        usual = min(MAX_GENERATED, self.max_length // 2)
        n = next((int(length) for length in lengths if length is not None), usual)
        if not 0 < n < self.max_length:
            raise FqError(f"{n} tokens to generate do not fit a context of {self.max_length}")
        sampler = self._sampler(options)
        ids = self.tok_encode(prompt)[-(self.max_length - n) :]
        context = self.context
        context.clear()
        tokenizer = self.model.tokenizer
        decoder, text = tokenizer.stream_decoder(), ""
        stop = frozenset(tokenizer.eog_ids)
        for token in generate(context, ids or [self.prefix_token_id], n, sampler, stop=stop):
            text += decoder.push(token)
            if any(end in text for end in until if end):
                break
        else:
            text += decoder.finish()
        text = text[: min((text.index(end) for end in until if end and end in text), default=len(text))]
        self.cache_hook.add_partial("generate_until", (prompt, options), text)
        return text

    def _sampler(self, options: dict[str, Any]) -> Sampler:
        """The same for the same options, so that a text that is asked for again is drawn anew.

        Greedy where neither a temperature nor do_sample asks for another; with do_sample alone at 1.0.
        """

        def given(name: str, default: float) -> float:
            value = options.get(name)
            return default if value is None else float(value)

        wanted = options.get("do_sample")
        temp = 0.0 if wanted is False else given("temperature", 1.0 if wanted else 0.0)
        if not temp:
            return Sampler()
        key = temp, max(int(given("top_k", 0)), 0), given("top_p", 1.0)
        return self._samplers.setdefault(key, Sampler(*key, self._seed))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.model.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.tokenizer.chat_template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Of caches: what a text is tokenised to is the file's."""
        return f"fq:{self.model.path}"


def main() -> int:
    """lm-eval's own command, with the model."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (FqError, OSError) as e:
        print(f"fq: error: {e}", file=sys.stderr)
        return NOT_FINITE if isinstance(e, NotFiniteError) else BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
