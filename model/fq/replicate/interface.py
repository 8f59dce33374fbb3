"""The original report's global interface, over a default context.

    set_default_context(Context(model, 512, executor))
    set_global_params(True, 30, -1)        # BF16, all layers
    ...evaluate...
    call_count(5), global_call_count(), total_quantizations()

It does what the report's patch did (its section 2), and counts as it counted: in each layer the
first row that reaches the name ``norm-N`` is rounded and no other, and a call is one row that
reaches that name, from the attention norm or the FFN norm. New parameters begin every count anew.
Two things differ. The type is acted on, where the patch rounded to BF16 whatever it was. And a
layer that the model does not have is an error, where the patch then rounded nothing.

The default context is the one process-wide state, and it is here alone.
"""

from __future__ import annotations

from fq_kernels import Format, get_format
from fq_kernels.rules import NORM_N, FakeQuant, Rule

from ..errors import FqError
from ..gguf.types import GGML_TYPES
from ..run.context import Context

ALL_LAYERS = -1

_context: Context | None = None
_params: FakeQuant | None = None


def set_default_context(context: Context | None) -> None:
    """The context that set_global_params acts on, with its rules dropped; None: none."""
    global _context, _params
    _context, _params = context, None
    if context is not None:
        set_global_params(False)


def set_global_params(enabled: bool, type: int | str = "bf16", layer: int = ALL_LAYERS) -> None:
    """Begin anew: rules of the default context, first-call flags, calls of each layer, totals.

    type is ggml's number (30 is BF16) or a format's name; layer is a layer number or ALL_LAYERS.
    With enabled False nothing is rounded and nothing counted. Raises FqError naming what is wrong.
    """
    global _params
    if _context is None:
        raise FqError("there is no default context: call set_default_context first")
    try:
        rules = [Rule(_format(type), NORM_N, layer, mode="first-call")] if enabled else []
        # rows alone, as the report counted
        _params = FakeQuant(_context.model.values, rules, count_errors=False)
    except ValueError as e:
        raise FqError(str(e)) from None
    _context.fake_quant = _params


def call_count(layer: int) -> int:
    """Rows that reached ``norm-LAYER`` since the parameters were set."""
    return _calls(layer)


def global_call_count() -> int:
    """Rows that reached ``norm-N`` of any layer since the parameters were set."""
    return _calls(None)


def total_quantizations() -> int:
    """Rows rounded since the parameters were set: at most one for each layer."""
    return sum(counter.rows_quantised for counter in _params.matched) if _params else 0


def _calls(layer: int | None) -> int:
    if _params is None or not _params.rules:
        return 0
    norms = [v.place for v in _params.values if v.norm_n and layer in (v.place.layer, None)]
    if not norms:
        raise FqError(f"the model has no layer {layer}")
    return sum(map(_params.rows_seen, norms))


def _format(type: int | str) -> Format:
    if isinstance(type, str):
        return get_format(type)
    if type not in GGML_TYPES:
        raise FqError(f"there is no ggml type {type}; BF16 is 30")
    name = GGML_TYPES[type].name
    try:
        return get_format(name)
    except ValueError:
        raise FqError(f"ggml type {type} is {name}, not a format to round to; BF16 is 30") from None
