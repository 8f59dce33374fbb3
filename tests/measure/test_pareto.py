"""Units by hardware's cost and KL: quantities, prices, what no other beats, and the command."""

from __future__ import annotations

import json

import pytest
from command_line import fq

from fq import FqError
from fq.measure.cells import unit_cells
from fq.measure.pareto import QUANTITIES, Priced, cheapest, pareto_set, priced, quantities, read_prices
from fq.report.pareto import picture
from fq_kernels import NormUnit

PRICES = "item,price\naccumulator_bits,1\ntable_entries,0.5\nexact_roots,400\n"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("", (64, 0, 0, 1, 24, 32)),
        ("x=bf16;acc=bf16;order=lanes=16;rsqrt=lut=6;out=f16", (256, 64, 0, 0, 8, 16)),
        ("x=f16;acc=e8m10;order=tree;rsqrt=newton=2,lut=4,linear;out=fp8_e4m3", (19, 17, 2, 0, 11, 8)),
        ("x=e5m3;acc=f32;rsqrt=newton=1", (32, 0, 1, 0, 4, 32)),
        ("rsqrt=bf16", (64, 0, 0, 1, 24, 32)),
        ("acc=f32;order=torch", (32 * 128, 0, 0, 1, 24, 32)),
        ("acc=bf16;order=chunk=8,f32", (48, 0, 0, 1, 24, 32)),
    ],
)
def test_what_a_unit_is_made_of(unit, expected):
    assert quantities(NormUnit.parse(unit)) == dict(zip(QUANTITIES, expected, strict=True))


def test_formats_whose_bits_are_not_known():
    with pytest.raises(FqError, match="format hif8: how many significant bits it has is not known"):
        quantities(NormUnit.parse("x=hif8"))
    assert quantities(NormUnit.parse("x=hif8"), ["newton_steps"]) == {"newton_steps": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be item,price"),
        ("item;price\n", "the first line must be item,price"),
        ("item,price\n", "there is no price in it"),
        ("item,price\nadders,1\n", "line 2: must be an item and its price; items are accumulator_bits"),
        ("item,price\ntable_entries\n", "line 2: must be an item and its price"),
        ("item,price\n\ntable_entries,x\n", "line 3: a price is a number from 0, not 'x'"),
        ("item,price\ntable_entries,-1\n", "a price is a number from 0"),
        ("item,price\ntable_entries,inf\n", "a price is a number from 0"),
        ("item,price\ntable_entries,1\ntable_entries,1\n", "line 3: table_entries is there twice"),
        ("\xff", "is no CSV file in UTF-8"),
    ],
)
def test_prices_that_are_none(tmp_path, text, message):
    path = tmp_path / "prices.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FqError, match=f"prices.csv.*{message}"):
        read_prices(path)


def entry(unit: str, kld: float, kind: str = "together", half: float = 0.1, lost: int = 0) -> dict:
    ends = None if half is None else [kld * (1 - half), kld * (1 + half)]
    return {
        "rules": [f"*[*]={unit}"],
        "kind": kind,
        "not_finite_tokens": lost,
        "comparison": {"mean_kld": kld, "mean_kld_ci95_chunks": ends},
    }


def test_what_no_other_beats():
    prices = {"accumulator_bits": 1.0, "table_entries": 0.5}
    cells = [
        entry("acc=f32;rsqrt=lut=4", 1e-3),
        entry("acc=bf16;rsqrt=lut=5", 5e-4),  # costs as much: 32
        entry("acc=bf16;rsqrt=lut=4", 4e-3),
        entry("acc=bf16;rsqrt=lut=6", 4.9e-4, half=0.2),
        entry("acc=bf16;rsqrt=lut=7", 4.8e-4, half=None),
        entry("acc=bf16;rsqrt=lut=8", 5e-4),  # beaten
        entry("acc=bf16;rsqrt=lut=1", 1e-9, kind="norm"),  # in one norm alone
        entry("acc=bf16;rsqrt=lut=1", 1e-9, kind="without"),  # a part of a unit
        entry("acc=bf16;rsqrt=lut=2", 1e-9, lost=3),
        {"rules": ["ffn_norm[*].raw=bf16"], "kind": "together"},
        {"rules": ["l_out=bf16", "*=acc=bf16"], "kind": "together"},
        {"rules": [], "kind": "control"},
    ]
    units = priced(cells, prices)
    assert [each.cost for each in units] == [24, 32, 40, 48, 80, 144]
    best = pareto_set(units)
    assert [each.kld for each in best] == [4e-3, 5e-4, 4.9e-4, 4.8e-4]
    assert cheapest(units, 5.6e-4).unit.endswith("lut=5")
    assert cheapest(units, 5.4e-4) is None, "what has no interval is not sure"
    with pytest.raises(FqError, match="no cell of the run is a unit"):
        priced(cells[-3:], prices)
    with pytest.raises(FqError, match=r"are of \*\[\*\] and of ffn_norm\[0\]: what these cost is not to be"):
        priced([*cells, entry("", 1e-3) | {"rules": ["ffn_norm[0]=acc=bf16"]}], prices)


def test_what_is_exact_is_below_any_budget():
    exact = Priced("u", 1.0, 0.0, (0.0, 0.0), {})
    picture([exact, Priced("v", 2.0, 1e-3, (1.1e-3, 1.2e-3), {})], [exact], exact, 1e-4, "svg")
    assert cheapest([exact], 1e-300) is exact and pareto_set([exact, exact]) == [exact]


def test_alternatives_are_units_of_their_own(tiny):
    cells = unit_cells(tiny, ["*=acc={bf16|f32};rsqrt={lut=4|newton=1,lut=4}"], whole=True)
    assert [cell.name for cell in cells] == [
        "*[*]=acc=bf16;rsqrt=lut=4", "*[*]=acc=bf16;rsqrt=newton=1,lut=4",
        "*[*]=acc=f32;rsqrt=lut=4", "*[*]=acc=f32;rsqrt=newton=1,lut=4",
    ]  # fmt: skip
    assert {(cell.kind, cell.group) for cell in cells} == {("unit", "units")}
    with pytest.raises(FqError, match="is asked for twice"):
        unit_cells(tiny, ["*=acc={bf16|f32}", "*=acc=bf16"], whole=True)
    with pytest.raises(FqError, match="more than 4096 units"):
        unit_cells(tiny, ["*=" + "{a|b}" * 13])
    with pytest.raises(FqError, match="is for fq sweep, with both braces"):
        unit_cells(tiny, ["*=acc={bf16"])


def test_the_command(tiny_path, packed_path, tmp_path):
    text, prices, store = tmp_path / "t.txt", tmp_path / "prices.csv", tmp_path / "s.sqlite"
    text.write_text("Words of a text, and more of them: one, two, three. " * 60)
    prices.write_text(PRICES)
    sweep = ("sweep", "-m", tiny_path, "-f", text, "-c", 24, "--chunks", 4, "--store", store)
    fq(*sweep, "--whole-units", "--norm-unit", "*=acc={e8m4|bf16|f32};rsqrt={exact|lut=3|lut=8}")
    for name in ("a.png", "b.svg"):
        fq("pareto", "--store", store, "--prices", prices, "-o", tmp_path / name)
        assert (tmp_path / name).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    out, _ = fq("pareto", "--store", store, "--prices", prices, "--budget", 10, "--json", tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    assert len(data["units"]) == 9 and data["cheapest"] == "*[*]=acc=e8m4;rsqrt=lut=3"
    assert "the cheapest whose mean KL is below 10, interval and all: *[*]=acc=e8m4;rsqrt=lut=3" in out
    assert "without a price, and so free: newton steps, multiplier bits, output bits" in out
    fq(
        *sweep[:-4],
        "--store",
        tmp_path / "one.sqlite",
        "--chunks",
        1,
        "--whole-units",
        "--norm-unit",
        "*=acc=bf16",
    )
    few, _ = fq("pareto", "--store", tmp_path / "one.sqlite", "--prices", prices, "--budget", 10)
    assert "there are no intervals: below 4 chunks nothing is surely within a budget" in few
    assert "cost 17\n" in out.replace(", mean", "\n") and "of 9 units are beaten by no other" in out
    for options, message in (
        (["--budget", 0], "--budget must be above 0"),
        (["-o", tmp_path / "a.pdf"], "must end in .png or .svg"),
        (["--json", prices], "is the prices"),
        ([7], "there is no run 7"),
    ):
        assert message in fq("pareto", "--store", store, "--prices", prices, *options, status=2)[1]
    assert "no-such" in fq("pareto", "--store", store, "--prices", tmp_path / "no-such.csv", status=2)[1]
    for other in (
        ("--profile", "te", "--baseline", "hf"),
        ("--whole-units", "--norm-unit", "*=acc=bf16", "--base-model", packed_path),
    ):
        fq(*sweep, *other)
        assert "beside another baseline" in fq("pareto", "--store", store, "--prices", prices, status=2)[1]
