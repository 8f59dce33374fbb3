"""The look of the report's charts, and matplotlib's SVG as a part of a page.

A chart is drawn once in stand-in colours, for which the page's CSS variables are put: the same
SVG follows the page into the dark and onto paper. Palette: Okabe and Ito's hues, which people
with any colour vision tell apart, each with a contrast of at least 3 to 1 against the ground.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ..errors import FqError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = {
    "ground": "#ffffff",
    "text": "#1b1f24",
    "muted": "#59626d",
    "grid": "#dfe3e8",
    "s0": "#0072b2",
    "s1": "#c04f00",
    "s2": "#00805e",
    "s3": "#a8447f",
    "s4": "#8a6100",
    "s5": "#3f4a9e",
    "s6": "#8f1d2c",
    "s7": "#5d6b16",
}
DARK = {
    "ground": "#15181d",
    "text": "#e6e9ee",
    "muted": "#a3acb8",
    "grid": "#333a44",
    "s0": "#56b4e9",
    "s1": "#f08a4b",
    "s2": "#35c79b",
    "s3": "#e39bc7",
    "s4": "#e6b84d",
    "s5": "#a5adf5",
    "s6": "#ff8f9b",
    "s7": "#bfce5e",
}
N_SERIES = sum(name[0] == "s" for name in LIGHT)
SERIES = "series-"
_STAND_INS = {name: f"#fe01{i:02x}" for i, name in enumerate(LIGHT)}
SVG = "{http://www.w3.org/2000/svg}"
_STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "hatch.linewidth": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "ytick.minor.size": 0,
    "text.parse_math": False,  # a name from the store may hold a $
    "svg.fonttype": "none",
    "svg.hashsalt": "fq",
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Ink:
    """Colours by name, of LIGHT."""

    colours: dict[str, str]

    def __getattr__(self, name: str) -> str:
        return self.colours[name]

    def series(self, i: int) -> str:
        return self.colours[f"s{i % N_SERIES}"]


FOR_PAGE, FOR_PNG = Ink(_STAND_INS), Ink(LIGHT)


@dataclass
class Chart:
    """One figure of the page.

    key      file name and id; section is the part of the page that it stands in
    alt      what it shows, for those who do not see it
    data     the numbers that are drawn, as rows of a table, the first its head
    tips     by gid of an artist: what a mouse over it says
    series   (mark, colour, name) of those that a reader may hide: artists whose gid is SERIES and its place
    on_demand  whether the page shows it only when it is asked for
    """

    key: str
    section: str
    title: str
    caption: str
    alt: str
    figure: Figure
    data: list[list[Any]]
    tips: dict[str, str] = field(default_factory=dict)
    series: list[tuple[str, str, str]] = field(default_factory=list)
    on_demand: bool = False


@contextlib.contextmanager
def style(ink: Ink) -> Iterator[None]:
    """Draw in ``ink`` in the block, whatever the user's own matplotlibrc says.

    Raises FqError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise FqError(
            "fq report draws with matplotlib, which is not installed: pip install 'fq[report]'"
        ) from None
    colours: dict[Any, Any] = {
        "text.color": ink.text,
        "axes.labelcolor": ink.muted,
        "axes.edgecolor": ink.muted,
        "xtick.color": ink.muted,
        "ytick.color": ink.muted,
        "grid.color": ink.grid,
        "axes.facecolor": "none",
        "figure.facecolor": ink.ground if ink is FOR_PNG else "none",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | colours)
        yield


def png(chart: Chart) -> bytes:
    """Within `style` of FOR_PNG. The file says what it shows, too."""
    out = io.BytesIO()
    chart.figure.savefig(
        out, format="png", metadata={"Title": chart.title, "Description": chart.alt, "Software": None}
    )
    return out.getvalue()


def svg(chart: Chart) -> str:
    """The chart, drawn within `style` of FOR_PAGE, as an element of an HTML page."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    chart.figure.savefig(out, format="svg", metadata=nothing)
    root = ElementTree.fromstring(out.getvalue())
    _clean(root, chart)
    _thin(root)
    _join(root)
    _hoist(root)
    for at, tag, text in ((0, "title", chart.title), (1, "desc", chart.alt)):
        element = ElementTree.Element(tag, {"id": f"{chart.key}-{tag}"})
        element.text = text
        root.insert(at, element)
    width, height = (float(root.attrib.pop(name)[:-2]) for name in ("width", "height"))
    root.attrib.pop("version", None)
    root.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{chart.key}-title {chart.key}-desc")
    text = ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")
    return re.sub(r"<[^>]*>", _with_variables, text)  # in tags alone: a name may say anything


def _with_variables(tag: re.Match[str]) -> str:
    text = tag[0]
    for name, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _clean(root: Any, chart: Chart) -> None:
    """Plain names, ids of this chart alone and only where something refers to them, short numbers."""
    text = ElementTree.tostring(root, encoding="unicode")
    found = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    wanted = {name: f"{chart.key}-{i}" for i, name in enumerate(found)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.replace(SVG, "")
        element.text = (element.text or "").strip() or None
        element.tail = None
        identity = element.attrib.pop("id", None)
        if identity in chart.tips:
            title = ElementTree.Element("title")
            title.text = chart.tips[identity]
            element.insert(0, title)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if not value.startswith("rotate(-0 "):
                element.set(name.replace("{http://www.w3.org/1999/xlink}", ""), _value(name, value, wanted))
        if identity in wanted:
            element.set("id", wanted[identity])
        if identity and identity.startswith(SERIES):
            element.set("class", identity)


def _thin(root: Any) -> None:
    """Without what draws nothing, and groups around one element that say nothing of it."""
    for parent in reversed(list(root.iter())):
        for at, child in reversed(list(enumerate(parent))):
            if child.tag == "path" and child.get("style") == "fill:none" and "id" not in child.attrib:
                parent.remove(child)
            elif child.tag == "g" and not child.attrib and not len(child):
                parent.remove(child)
            elif child.tag == "g" and not child.attrib and len(child) == 1:
                parent[at] = child[0]


def _join(root: Any) -> None:
    """Lines that follow each other and look alike are one path."""
    for parent in root.iter():
        before: Any = None
        for child in list(parent):
            if not _is_line(child):
                before = None
            elif before is not None and child.attrib | {"d": ""} == before.attrib | {"d": ""}:
                before.set("d", before.get("d", "") + child.get("d", ""))
                parent.remove(child)
            else:
                before = child


def _is_line(path: Any) -> bool:
    """Whether one path may hold it and others: where lines cross, nothing shows it."""
    style = path.get("style", "")
    plain = path.tag == "path" and not len(path) and "id" not in path.attrib
    return plain and "fill:none" in style and "opacity" not in style and "dasharray" not in style


def _hoist(root: Any) -> None:
    """What all children of a group share is said once, at the group."""
    for group in root.iter("g"):
        if len(group) < 2:
            continue
        for name in ("style", "clip-path"):
            values = {child.get(name) for child in group}
            # opacity is of a whole group; a transform moves what clips
            if len(values) > 1 or None in values or group.get(name) or "opacity" in (value := values.pop()):
                continue
            if name == "clip-path" and any(child.get("transform") for child in group):
                continue
            for child in group:
                del child.attrib[name]
            group.set(name, value)


def _value(name: str, value: str, wanted: Mapping[str, str]) -> str:
    value = re.sub(r"url\(#([^)]+)\)", lambda of: f"url(#{wanted[of[1]]})", value)
    if name.endswith("href") and value.startswith("#"):
        return f"#{wanted[value[1:]]}"
    if name == "style":  # the font is the page's
        value = re.sub(r"font-family:[^;]*(;|$)", "", value)
        value = re.sub(r"\s*([:;])\s*", r"\1", value).rstrip(";")
    if name in ("d", "x", "y", "transform", "points"):
        value = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
    if name in ("d", "points"):
        value = re.sub(r"\s*([A-Za-z,])\s*", r"\1", value)
    return " ".join(value.split())
