"""What makes two kept runs alike: to go on with one, to merge them and to compare them."""

from dataclasses import replace

import pytest
from stored_runs import RUN

from fq.results.compare import not_paired, otherwise_unlike
from fq.results.merge import difference
from fq.results.run import OF_A_CHUNK, OF_AN_EXPERIMENT


def changed(key, value="another"):
    return replace(RUN, settings=RUN.settings | {key: value})


@pytest.mark.parametrize("key", OF_AN_EXPERIMENT)
def test_a_setting_that_decides_figures_parts_runs(key):
    other = changed(key)
    assert other.identity != RUN.identity
    assert difference(RUN, other).startswith(f"{key}: ")
    assert bool(not_paired(RUN, other)) == (key in OF_A_CHUNK)
    assert bool(otherwise_unlike(RUN, other)) == (key == "activations")


@pytest.mark.parametrize(("key", "was"), [("scored", "second-half"), ("baseline", None), ("batch", 512)])
def test_a_run_of_before_there_was_a_choice_is_alike(key, was):
    settings = {name: value for name, value in RUN.settings.items() if name != key}
    before, now = replace(RUN, settings=settings), changed(key, was)
    assert before.identity == now.identity
    assert difference(before, now) is None and not_paired(before, now) is None


def test_identities_that_are_kept_stay():
    """Else what was kept could not be gone on with."""
    baseline = replace(
        changed("baseline", ["ffn_norm=bf16"]), numerics={"contract": 7, "isa": "x", "threads": 1}
    )
    other = changed("base_model_sha256", "c" * 64)
    other.settings["sensitivity"] = {"formats": ["bf16"]}
    identities = [run.identity[:12] for run in (RUN, changed("scored", "all"), baseline, other)]
    assert identities == ["471d03013a63", "d2b54def4250", "8d80d2f2e851", "f829a041d5fd"]
