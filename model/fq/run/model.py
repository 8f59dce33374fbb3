"""A model: its graph, and its weights in the mapped file."""

from __future__ import annotations

import os
from functools import cached_property

import numpy as np

from fq_kernels.rules import Place, Value, sites_text

from ..arch.graph import Graph, Node, Op
from ..arch.hparams import HParams
from ..arch.keys import ModelError
from ..arch.registry import kind_of_norms, read_graph
from ..arch.tensors import check_tensors
from ..errors import FqError
from ..gguf.file import GGUFFile
from ..gguf.split import Parts, open_model
from ..text.tokenizer import Tokenizer
from .weights import Weight, can_unpack


class Model:
    """A GGUF file of a known architecture, checked and ready to run. The weights stay packed in the file.

    Of one that is cut into parts, ``path`` is the first.

    Raises GGUFError or ModelError naming what is wrong with the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file: GGUFFile | Parts = open_model(path)
        try:
            hparams, graph = read_graph(self.file)
            self.hparams: HParams = hparams
            self.graph: Graph = graph
            check_tensors(self.file, self.hparams, self.graph)
            self.weights: dict[str, Weight] = {}
            self.vectors: dict[str, np.ndarray] = {}
            for name, info in self.file.tensors.items():
                packed = self.file.tensor(name)
                if len(info.shape) == 1:
                    # a copy: in the file it may not be aligned
                    self.vectors[name] = np.frombuffer(packed, np.float32).copy()
                elif can_unpack(info.type):
                    self.weights[name] = Weight(packed, info.type, info.shape[1])
                else:
                    raise ModelError(f"{self.path}: cannot unpack tensor {name} of type {info.type.name}")
        except BaseException:
            self.file.close()
            raise

    def __repr__(self) -> str:
        hp = self.hparams
        return (
            f"<Model {os.path.basename(self.path)}: {hp.arch}, {hp.n_layer} layers, n_embd {hp.n_embd}, "
            f"{hp.n_vocab} tokens>"
        )

    @property
    def path(self) -> str:
        return self.file.path

    @cached_property
    def values(self) -> tuple[Value, ...]:
        """All that rules can round, in the order of the graph."""
        return tuple(self.graph.values)

    @property
    def plus_one(self) -> bool:
        """Whether its norms' weights are 1 + w of what its checkpoint holds."""
        return kind_of_norms(self.hparams.arch) == "gemma"

    def weight_of(self, node: Node) -> Weight:
        """A product's, which may be some rows of a tensor."""
        assert node.weight is not None
        whole = self.weights[node.weight]
        return whole if node.rows is None else whole.cut(*node.rows)

    def profile_rules(self, spec: str) -> list[str]:
        """The rules that make its norms and residual an engine's: ``hf:bf16`` (fq_kernels.units.profiles).

        Raises FqError for a profile that there is not.
        """
        from fq_kernels.units.profiles import profile_rules  # which most commands never ask for

        kinds = {value.place.kind for value in self.values}
        sums = [n for n, source in self.graph.read_first_by_norms().items() if source.op is Op.ADD]
        try:
            return profile_rules(
                spec, kinds, norms=kind_of_norms(self.hparams.arch), behind_sums=sites_text(sums)
            )
        except ValueError as e:
            raise FqError(str(e)) from None

    @property
    def norms(self) -> list[Place]:
        return self.graph.norms

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use. Raises TokenizerError."""
        tokenizer = Tokenizer.from_metadata(self.file.metadata)
        if tokenizer.n_vocab != self.hparams.n_vocab:
            raise ModelError(
                f"{self.path}: {tokenizer.n_vocab} tokens in the vocabulary, "
                f"{self.hparams.n_vocab} rows in token_embd.weight"
            )
        return tokenizer


def check_same_vocabulary(model: Model, other: Model) -> None:
    """Raises FqError, naming both and what differs first, where their logits are not of the same tokens."""
    names = f"{model.path} and {other.path}"
    begin = [one.tokenizer.bos_id if one.tokenizer.add_bos else None for one in (model, other)]
    a, b = (one.file.metadata["tokenizer.ggml.tokens"] for one in (model, other))
    if len(a) != len(b):
        raise FqError(f"{names} have vocabularies of {len(a)} and {len(b)} tokens")
    differ = next((i for i, (one, two) in enumerate(zip(a, b, strict=True)) if one != two), None)
    if differ is not None:
        raise FqError(f"{names} have other vocabularies: token {differ} is {a[differ]!r} and {b[differ]!r}")
    if begin[0] != begin[1]:
        said = ("nothing" if token is None else f"token {token}" for token in begin)
        raise FqError(f"{names} begin a text differently: before it stands {' and '.join(said)}")
