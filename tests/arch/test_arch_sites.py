"""What rules round and count in every architecture: against its float64 model, held against it."""

from __future__ import annotations

import numpy as np
import pytest
from held_reference import hold
from tiny_models import TINY, some_tokens, write_tiny

from fq import Context, FakeQuant, Model
from fq.run.fork import Fork
from fq_kernels.rules import Place

N_TOKENS = 24
# what is small beside the largest value of its kind is off by more of itself than logits are
RTOL = 2e-5
RULES = {
    "norms, raw": ["*=bf16"],
    "norms, what they read and give": ["*.in=f16", "*.weighted=bf16"],
    "activations": ["activation=bf16"],
}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("tiny"), {}

    def path_of(name: str):
        if name not in paths:
            paths[name] = write_tiny(folder / f"{name}.gguf", TINY[name])
        return paths[name]

    return path_of


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", TINY)
def test_the_path_is_that_of_a_float64_model(path_of, executor, name, rules):
    path = path_of(name)
    hold(path, Model(path), some_tokens(N_TOKENS), rules, executor, RTOL)


@pytest.mark.parametrize("name", TINY)
def test_rows_are_counted_by_tokens_and_heads(path_of, executor, name):
    """A norm of heads has a row for each; from the last layer's attention on only outputs have rows."""
    model, tiny = Model(path_of(name)), TINY[name]
    fake_quant = FakeQuant(model.values, ["*=bf16", "activation=bf16"])
    context = Context(model, 128, executor, fake_quant)
    tokens = some_tokens(N_TOKENS)
    context.eval(tokens[:20])
    context.eval(tokens[20:])
    of_heads = {"q": tiny.n_head, "k": tiny.n_head_kv, "v": tiny.n_head_kv}
    if tiny.arch != "olmo2":
        of_heads |= {"q_norm": tiny.n_head, "k_norm": tiny.n_head_kv}
    late = {"attn_post_norm", "ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_act", "ffn_out"}
    late |= {"ffn_post_norm", "l_out"}
    for counter in fake_quant.matched:
        kind, layer = counter.site.place
        last = kind == "output_norm" or (layer == tiny.n_layer - 1 and kind in late)
        rows = (2 if last else N_TOKENS) * of_heads.get(kind, 1)
        assert (counter.rows_seen, counter.rows_quantised) == (rows, rows), counter.site
        assert counter.changed > 0


def test_a_norm_of_heads_scales_each_head_by_itself(path_of, executor):
    """int8's scale, of a row, is a head's."""
    model = Model(path_of("qwen3"))
    fake_quant = FakeQuant(model.values, "q_norm[1].weighted=int8")
    Context(model, 128, executor, fake_quant).eval(some_tokens(N_TOKENS))
    (counter,) = fake_quant.matched
    assert counter.elements == N_TOKENS * TINY["qwen3"].n_head * TINY["qwen3"].head_dim
    # each row's largest element is on the grid, but for a unit in its last place: few of them change
    assert counter.changed <= counter.elements - 0.9 * counter.rows_quantised


def test_rows_that_pass_by_are_rows_of_heads(path_of, executor):
    """In an evaluation that is shared up to layer 2, and in one of its own."""
    model, tokens = Model(path_of("qwen3")), some_tokens(N_TOKENS)
    shared, alone = (FakeQuant(model.values, "l_out[2]=bf16") for _ in range(2))
    for _ in Fork(model, N_TOKENS, executor, N_TOKENS).logits(tokens, 12, [shared]):
        pass
    Context(model, N_TOKENS, executor, alone).eval(tokens, slice(12, None))
    rows = {str(norm): shared.rows_seen(norm) for norm in model.norms}
    assert rows == {str(norm): alone.rows_seen(norm) for norm in model.norms}
    assert rows["q_norm[0]"] == N_TOKENS * TINY["qwen3"].n_head


ROLES = {
    "llama": ["attn_norm", "ffn_norm"],
    "qwen3": ["attn_norm", "q_norm", "k_norm", "ffn_norm"],
    "gemma2": ["attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"],
    "gemma3": ["attn_norm", "q_norm", "k_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"],
    "olmo2": ["q_norm", "k_norm", "attn_post_norm", "ffn_post_norm"],
    "exaone4": ["q_norm", "k_norm", "attn_post_norm", "ffn_post_norm"],
    "glm4": ["attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"],
}


@pytest.mark.parametrize("name", TINY)
def test_norms_by_role(path_of, name):
    model, tiny = Model(path_of(name)), TINY[name]
    roles = ROLES.get(tiny.arch, ["attn_norm", "ffn_norm"])
    expected = [Place(role, il) for il in range(tiny.n_layer) for role in roles]
    assert model.norms == [*expected, Place("output_norm")]
    # llama.cpp calls all of a layer norm-N, but for those that it builds without the layer
    without = {"ffn_post_norm"} if tiny.arch != "glm4" else set()
    named = {value.place.kind for value in model.values if value.norm_n}
    assert named == set(roles) - without


def test_first_call_under_norm_takes_the_first_of_a_layer(path_of, executor):
    """As the original report's pattern does: of five norms of a layer that llama.cpp calls so."""
    model = Model(path_of("gemma3"))
    fake_quant = FakeQuant(model.values, "norm[2]=bf16:first-call")
    Context(model, 128, executor, fake_quant).eval(np.asarray(some_tokens(N_TOKENS)))
    rounded = {c.site.place.kind: c.rows_quantised for c in fake_quant.matched}
    assert rounded == {"attn_norm": 1, "q_norm": 0, "k_norm": 0, "attn_post_norm": 0, "ffn_norm": 0}
