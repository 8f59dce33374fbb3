"""A run as it is kept: what was measured, on what and with what, and what makes two runs alike."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from fq_kernels.rules import Calibration

from ..errors import FqError
from ..measure.cells import Cell
from ..measure.chunks import SCORED
from ..measure.estimates import Asked
from . import stored

# Settings that decide which tokens a chunk has and scores, and what its cells are compared with: runs that
# share them, the model and the text have the same chunks.
OF_A_CHUNK = ("n_tokens", "n_ctx", "scored", "baseline", "base_model_sha256")
# And with these, the cells and the contract of numerics the same figures.
OF_AN_EXPERIMENT = (*OF_A_CHUNK, "activations", "chunk_order", "chunk_seed")
BEFORE = {"scored": SCORED[0]}  # of runs that were kept before there was a choice

# The columns of a run that its digest is of, which stands before them.
COLUMNS = "id, started, identity, model_sha256, text_sha256, cells, settings, numerics, versions, machine"


@dataclass(frozen=True)
class Run:
    """What was measured. ``numerics`` but the threads and the instruction set, ``versions`` and
    ``settings`` but the batch decide the bits.

    cells     a cell's number is its place here, for ever: others come after it
    settings  `Sweep.about`, and what else is to be kept; its keys must be there
    """

    model_sha256: str
    text_sha256: str
    cells: tuple[Cell, ...]
    settings: dict[str, Any]
    numerics: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"<Run of {os.path.basename(s['model'])}: {len(self.cells)} cells, {s['n_chunks_asked']} chunks "
            f"of {s['n_ctx']}>"
        )

    def setting(self, key: str) -> Any:
        """One of `OF_AN_EXPERIMENT`, which a run that was kept before there was a choice has, too."""
        return self.settings.get(key, BEFORE.get(key))

    @property
    def identity(self) -> str:
        """The same in runs that can be one: to the last bit a rule leaves the same of a chunk in each, on any
        instruction set and in batches of any size, unless a file of static scales is another in each."""
        numerics = {key: value for key, value in self.numerics.items() if key not in ("threads", "isa")}
        first = ("n_tokens", "n_ctx", "activations", "chunk_order", "chunk_seed")
        chosen = [self.settings[key] for key in first]
        parts: list[Any] = [self.model_sha256, self.text_sha256, chosen, numerics, self.versions]
        # what came later only where it was chosen: identities that are kept stay
        if baseline := self.setting("baseline"):
            parts.append(baseline)
        if (scored := self.setting("scored")) != BEFORE["scored"]:
            parts.append(scored)
        if asked := self.settings.get("sensitivity"):
            parts.append(asked)
        if other := self.setting("base_model_sha256"):
            parts.append({"base_model": other})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def scales(self) -> dict[str, str]:
        """The SHA-256 of each file of static scales."""
        return {each["file"]: each["sha256"] for each in self.settings.get("calibrations", ())}

    def can_be_one_with(self, other: Run) -> bool:
        """Of runs of the same identity: whether each file of static scales is the same in both."""
        scales = other.scales
        return all(scales.get(file, sha256) == sha256 for file, sha256 in self.scales.items())

    def extended(self, more: Run) -> Run:
        """With the cells of ``more`` that it lacks after its own, and the chunks of the longer of both.

        The same if it lacks nothing.
        """
        cells = tuple(cell for cell in more.cells if cell not in self.cells)
        longer = more.settings["n_chunks_asked"] > self.settings["n_chunks_asked"]
        if not cells and not longer:
            return self
        settings = dict(self.settings)
        if cells:  # a store of an earlier version knew of fewer values
            settings |= {key: more.settings[key] for key in ("norms", "values") if key in more.settings}
            new = [each for each in more.settings.get("calibrations", ()) if each["file"] not in self.scales]
            if new:
                settings["calibrations"] = [*settings.get("calibrations", ()), *new]
        if longer:
            settings |= {key: more.settings[key] for key in ("n_chunks_asked", "chunk_indices")}
        commands = [run.settings["command"] for run in (self, more) if run.settings.get("command")]
        if commands:
            settings["command"] = " && ".join(commands)
        return replace(self, cells=self.cells + cells, settings=settings)

    @property
    def asked(self) -> Asked | None:
        """What it estimates of every site and format; None for a sweep."""
        found = self.settings.get("sensitivity")
        return None if found is None else stored.asked_of(found)

    @property
    def about(self) -> dict[str, Any]:
        """For `figures`, with the provenance."""
        provenance = {
            "model_sha256": self.model_sha256,
            "text_sha256": self.text_sha256,
            "numerics": self.numerics,
            "versions": self.versions,
            "machine": self.machine,
        }
        return self.settings | provenance


def check_scales(number: int, run: Run) -> None:
    """Raises FqError where a file of static scales is not what it was when the run was measured with it."""
    for file, sha256 in run.scales.items():
        try:
            now = Calibration.load(file).sha256
        except ValueError as e:
            raise FqError(str(e)) from None
        if now != sha256:
            raise FqError(f"{file} has other static scales than run {number} was measured with")


def run_of(digest: object, *said: Any) -> Run:
    """Of `COLUMNS` of its row. Raises ValueError saying what is wrong with them."""
    _, started, _, model_sha256, text_sha256, cells, settings, *texts = said
    kept = stored.settings_of(settings)
    stored.text_of("started", started)
    run = Run(
        stored.text_of("model_sha256", model_sha256),
        stored.text_of("text_sha256", text_sha256),
        stored.cells_of(cells, may_be_none="sensitivity" in kept),
        kept,
        *(
            stored.json_of(what, text, dict)
            for what, text in zip(("numerics", "versions", "machine"), texts, strict=True)
        ),
    )
    stored.check_digest(digest, *said)
    return run


def texts_of(run: Run) -> tuple[str, ...]:
    """What a row says of a run: model_sha256, text_sha256, cells, settings, numerics, versions, machine."""
    cells = json.dumps([asdict(cell) for cell in run.cells])
    parts = (json.dumps(part) for part in (run.settings, run.numerics, run.versions, run.machine))
    return run.model_sha256, run.text_sha256, cells, *parts
