"""The real Gemma 3 270M: what llama.cpp writes, and its vocabulary."""

from __future__ import annotations

from fq import Context, FakeQuant, Perplexity

# llama.cpp, greedy, after "The capital of France is"; the model dequantised to F32, F32 KV cache
PROMPT = [2, 818, 5279, 529, 7001, 563]
GREEDY = [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563]


def test_it_writes_what_llama_cpp_does(gemma3, executor):
    assert gemma3.tokenizer.encode("The capital of France is") == PROMPT  # no space before the text
    context, found = Context(gemma3, 32, executor), []
    logits = context.eval(PROMPT)
    while len(found) < len(GREEDY):
        found.append(int(logits[0].argmax()))
        logits = context.eval(found[-1:])
    assert found == GREEDY


def test_every_norm_of_every_role(gemma3, executor):
    assert len(gemma3.norms) == 18 * 6 + 1
    tokens = gemma3.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 4)
    run = Perplexity(
        gemma3,
        tokens,
        n_ctx=16,
        chunks=1,
        fake_quant=FakeQuant(gemma3.values, ["*=bf16", "k=fp8_e4m3fn"]),
        control=True,
        executor=executor,
    )
    for _ in run:
        pass
    result = run.result()
    assert result["control"]["exactly_zero"] and 0 < result["comparison"]["mean_kld"] < 1
    rows = {site["kind"]: site["rows_seen"] for site in result["fake_quant"]["sites"] if site["layer"] == 3}
    assert rows == {
        "attn_norm": 15, "q_norm": 60, "k_norm": 15, "attn_post_norm": 15, "ffn_norm": 15,
        "ffn_post_norm": 15, "k": 15,
    }  # fmt: skip
