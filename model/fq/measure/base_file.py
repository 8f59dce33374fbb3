"""llama-perplexity's files of a model's log-probabilities: what its --kl-divergence-base writes and reads.

Little-endian: "_logits_", then int32 n_ctx, n_vocab, n_chunk and the token ids of all chunks. Then for each
chunk and each token scored, the second half, a row of uint16: in the place of the first four two float32,
scale and least; then for each token of the vocabulary q, whose ln p is scale * q + least, and one more where
their number is odd. What is 16 nats or more below a row's largest is as if it were there, the format's floor:
a vocabulary of 49152 can have half a percent of a row's probability too much by that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fq_kernels import Executor, default_fpu, log_sum_exp

from ..errors import FqError
from .chunks import n_scored_per_chunk
from .statistics import FLOOR

MAGIC = b"_logits_"
STEPS = np.float32(65535)
MOST_CTX, MOST_VOCAB = 1 << 24, 1 << 24


def _width(n_vocab: int) -> int:
    """Of a row, in uint16."""
    return 4 + n_vocab + n_vocab % 2


class BaseFile:
    """Such a file, opened to be read.

    n_ctx, n_vocab, n_chunks  as it says
    tokens                    of all chunks, int32 (n_chunks * n_ctx,)

    Raises FqError naming the file for one that is none, is cut short, or whose numbers are none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            head = file.read(20)
        if len(head) < 20 or not head.startswith(MAGIC):
            raise FqError(f"{self.path}: no file of log-probabilities, as --kl-divergence-base writes")
        self.n_ctx, self.n_vocab, self.n_chunks = map(int, np.frombuffer(head, "<i4", offset=8))
        if not (3 <= self.n_ctx <= MOST_CTX and 1 <= self.n_vocab <= MOST_VOCAB and self.n_chunks >= 1):
            numbers = f"{self.n_chunks} chunks of {self.n_ctx} tokens, {self.n_vocab} in the vocabulary"
            raise FqError(f"{self.path}: it says that it has {numbers}")
        self._rows = n_scored_per_chunk(self.n_ctx)
        begin = 20 + 4 * self.n_chunks * self.n_ctx
        row = 2 * _width(self.n_vocab)
        size, wanted = os.path.getsize(path), begin + self.n_chunks * self._rows * row
        if size != wanted:
            what = "cut short" if size < wanted else "it goes on behind its end"
            raise FqError(f"{self.path}: {what}: {size} bytes of {wanted}")
        self.tokens = np.fromfile(path, "<i4", self.n_chunks * self.n_ctx, offset=20)
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise FqError(f"{self.path}: it has tokens that are not in its vocabulary of {self.n_vocab}")
        self._begin, self._row = begin, row

    def log_p(self, chunk: int, rows: slice = slice(None)) -> np.ndarray:
        """ln p of every token at each scored position of a chunk, or at some that follow one another, float32
        (n, n_vocab)."""
        first, last, _ = rows.indices(self._rows)
        at = self._begin + (chunk * self._rows + first) * self._row
        data = np.fromfile(self.path, "<u2", (last - first) * self._row // 2, offset=at)
        data = data.reshape(last - first, -1)
        scale, least = np.ascontiguousarray(data[:, :4]).view("<f4").T
        if not (np.isfinite(scale).all() and np.isfinite(least).all() and (scale >= 0).all()):
            raise FqError(f"{self.path}: chunk {chunk + 1} has rows whose scale is none")
        log_p: np.ndarray = data[:, 4 : 4 + self.n_vocab] * scale[:, None]
        log_p += least[:, None]
        return log_p


class BaseWriter:
    """A file that is made; it is there once all chunks are, `save_base`."""

    def __init__(self, path: Path, n_ctx: int, n_vocab: int, tokens: np.ndarray, executor: Executor) -> None:
        """tokens: of all chunks."""
        self._executor = executor
        self._file = open(path, "xb")
        head = np.array([n_ctx, n_vocab, len(tokens) // n_ctx], "<i4")
        self._file.write(MAGIC + head.tobytes() + np.asarray(tokens, "<i4").tobytes())

    @default_fpu()
    def add(self, logits: np.ndarray) -> None:
        """Those of the next scored positions, float32 (n, n_vocab)."""
        n, n_vocab = logits.shape
        parts = log_sum_exp(logits, executor=self._executor)
        most = logits.max(axis=1)
        least = np.maximum(logits.min(axis=1), most - FLOOR)
        scale = (most - least) / STEPS
        rows = np.zeros((n, _width(n_vocab)), "<u2")
        head = np.stack([scale, (least - most) - parts[:, 1].astype(np.float32)], axis=1)
        rows[:, :4] = head.astype("<f4").view("<u2")
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.rint((logits - least[:, None]) * (np.float32(1) / scale)[:, None])
        above = (logits > least[:, None]) & (scale > 0)[:, None]
        rows[:, 4 : 4 + n_vocab] = np.where(above, np.minimum(steps, STEPS), 0)
        self._file.write(rows.tobytes())

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def save_base(
    path: str | os.PathLike[str], n_ctx: int, n_vocab: int, tokens: np.ndarray, executor: Executor
) -> Iterator[BaseWriter]:
    """A file in the place of ``path`` once the block ends; nothing where it raises.

    A link stays one. Raises FqError for a device or a pipe, which is not written to.
    """
    real = os.path.realpath(path)
    if os.path.exists(real) and not os.path.isfile(real):
        raise FqError(f"{os.fspath(path)}: is no file")
    # a name of ours alone: beside the file, for a move within one file system
    part = Path(os.path.dirname(real), f".fq-{os.getpid()}-base.part")
    part.unlink(missing_ok=True)
    writer = BaseWriter(part, n_ctx, n_vocab, tokens, executor)
    try:
        yield writer
        writer.close()
        os.replace(part, real)
    finally:
        try:
            writer.close()
        finally:
            part.unlink(missing_ok=True)


def check_base(base: BaseFile, n_vocab: int, what: str) -> None:
    """Raises FqError for a file of another vocabulary."""
    if base.n_vocab != n_vocab:
        raise FqError(f"{base.path} has a vocabulary of {base.n_vocab} tokens, {what} one of {n_vocab}")
