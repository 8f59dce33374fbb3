"""Sites that feel a change of scale alike: what evaluations under a factor at each of them say."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import TINY, write_tiny

from fq import Context, Model
from fq.arch.scaling import scaling_classes

IDS = np.arange(3, 24)


def layer_classes(model, layer):
    found = {}
    for site, key in scaling_classes(model.graph).items():
        if site.place.layer == layer:
            found.setdefault(key, []).append(str(site))
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_factor_has_the_same_effect_in_a_class(name, tmp_path, executor):
    model = Model(write_tiny(tmp_path / "m.gguf", TINY[name]))
    context = Context(model, 32, executor)

    def logits(rules=()):
        context.clear()
        with context.under(rules):
            return context.eval(IDS, slice(None)).astype(np.float64)

    plain = logits()
    classes: dict[int | None, list[np.ndarray]] = {}
    for site, key in scaling_classes(model.graph).items():
        if site.place.layer in (1, None):
            classes.setdefault(key, []).append(logits(f"{site}=gain") - plain)
    noise = 2e-6 * np.abs(plain).max()
    for key, changes in classes.items():
        if key is None:  # but for eps, a norm undoes it
            largest = max(np.abs(change).max() for some in classes.values() for change in some)
            assert all(np.abs(change).max() < 2e-3 * largest for change in changes)
            continue
        assert np.abs(changes[0]).max() > 10 * noise, "a site without an effect"
        assert all(np.abs(change - changes[0]).max() <= 2 * noise for change in changes[1:])
    several = [changes[0] for key, changes in classes.items() if key is not None]
    for i, one in enumerate(several):
        assert all(np.abs(one - other).max() > 2 * noise for other in several[:i]), "two classes are one"


def test_classes_of_llama(tiny):
    """Those that the graph shows to whoever reads it."""
    found = set(map(tuple, layer_classes(tiny, 0).values()))
    assert found == {
        ("attn_norm[0].in", "ffn_norm[0].in"),
        ("attn_norm[0].raw", "attn_norm[0].weighted"),
        ("q_proj[0]", "k_proj[0]", "q[0]", "k[0]"),
        ("v_proj[0]", "v[0]", "kqv_out[0]", "attn_out[0]"),
        ("ffn_inp[0]",),
        ("ffn_norm[0].raw", "ffn_norm[0].weighted"),
        ("ffn_gate[0]",),
        ("ffn_up[0]", "ffn_act[0]", "ffn_out[0]"),
        ("l_out[0]",),
    }
