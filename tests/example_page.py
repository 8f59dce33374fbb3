"""A report with every kind of chart."""

from __future__ import annotations

import numpy as np
from report_store import cells_for, data_of, run_of


def example(chunks=4, specs=(), **options):
    """Two kinds of norm and output_norm in two formats, noise, cumulative cells: every kind of chart."""
    norms = [(kind, i) for i in range(3) for kind in ("attn_norm", "ffn_norm")] + [("output_norm", None)]
    names = [f"{kind}[{i}].raw" if i is not None else f"{kind}.raw" for kind, i in norms]
    specs = specs or ("bf16", "fp8_e4m3fn", "noise_bf16")
    cells = cells_for({"*[*].raw": names}, specs, cumulative=True)
    run = run_of(cells, norms, chunks, **options)

    def means(cell):
        base = 1e-3 if "fp8" in cell.group else 1e-6
        return base * (1 + len(cell.name) % 5) * len(cell.rules) * np.linspace(1, 1.3, chunks)

    return data_of(run, means)


CHARTS = ["together", "layers-1", "cumulative-1", "layers-2", "cumulative-2", "one-scale", "heat-map",
          "perplexity-1", "who-pays", "few-tokens", "errors-1", "errors-2", "distribution-1"]  # fmt: skip
