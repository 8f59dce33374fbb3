"""Which sites feel a change of scale alike: where one is multiplied by a number, it is as if the other
were."""

from __future__ import annotations

from fq_kernels.rules import Site

from .graph import Graph, Node, Op
from .ops import OPS


def scaling_classes(graph: Graph) -> dict[Site, int | None]:
    """By site: equal numbers where a factor has the same effect; None where a norm undoes it.

    A factor passes a node that is proportional to the value, where no other node feels it. Attention's scores
    are products of q and k: a factor of either is one of the scores.
    """
    readers: dict[int, list[tuple[int, int]]] = {}
    for i, node in enumerate(graph.nodes):
        for place, source in enumerate(node.inputs):
            readers.setdefault(source, []).append((i, place))
    classes: dict[int, int | None] = {}
    for i in reversed(range(len(graph.nodes))):
        read = readers.get(i, ())
        felt = [_through(graph.nodes[reader], reader, place, i, classes) for reader, place in read]
        felt = [key for key in felt if key is not None]
        classes[i] = felt[0] if len(felt) == 1 else None if read and not felt else i
    found: dict[Site, int | None] = {}
    for i, node in enumerate(graph.nodes):
        for site in node.sites:
            found[site] = None if site.point == "in" else classes[i]
    return found


def _through(node: Node, reader: int, place: int, source: int, classes: dict[int, int | None]) -> int | None:
    """The class of a value that one node alone feels, which reads it at a place of its inputs."""
    if node.op is Op.RMS_NORM:
        return None
    if place in OPS[node.op].linear and node.bias is None:
        return classes[reader]
    if node.op is Op.ATTENTION:
        return -reader  # of its scores, which no node has
    return source
