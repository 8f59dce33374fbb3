"""Models cut into parts: what one file gives, and one error for each thing that can be wrong."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fq import Context, GGUFError, Model
from fq.gguf.split import open_model
from fq.provenance import sha256_of

N = 3


def cut(source, folder, *, name="m", numbers=range(N), count=N, total=None):
    """The parts of a file, by llama-gguf-split's keys and names; the first has the metadata."""
    reader = gguf.GGUFReader(source)
    tensors = reader.tensors
    for i in numbers:
        path = folder / f"{name}-{i + 1:05d}-of-{N:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if i == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    kind = field.types[0]
                    inner = field.types[1] if kind is gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(key, field.contents(), kind, inner)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors) if total is None else total)
        for tensor in tensors[i * len(tensors) // N : (i + 1) * len(tensors) // N]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"{name}-00001-of-{N:05d}.gguf"


def test_the_model_is_that_of_the_whole_file(tiny, tiny_path, tmp_path, executor):
    first = cut(tiny_path, tmp_path)
    model = Model(first)
    assert model.path == str(first) and len(model.file.paths) == N
    assert model.file.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    tokens = model.tokenizer.encode("Hello world")
    logits = Context(model, 16, executor).eval(tokens)
    assert logits.tobytes() == Context(tiny, 16, executor).eval(tokens).tobytes()
    digest = sha256_of(*model.file.paths)
    (tmp_path / "joined").write_bytes(
        b"".join(path.read_bytes() for path in map(type(first), model.file.paths))
    )
    assert digest == sha256_of(tmp_path / "joined") != sha256_of(first)


def test_what_is_missing_is_named(tiny_path, tmp_path):
    first = cut(tiny_path, tmp_path, numbers=(0, 1))
    with pytest.raises(GGUFError, match=r"m-00003-of-00003\.gguf: cannot be opened: No such file"):
        Model(first)


def test_another_than_the_first(tiny_path, tmp_path):
    cut(tiny_path, tmp_path)
    with pytest.raises(GGUFError, match=r"is part 2 of 3: give the first, .*m-00001-of-00003\.gguf"):
        Model(tmp_path / "m-00002-of-00003.gguf")


def test_a_name_that_says_no_part(tiny_path, tmp_path):
    cut(tiny_path, tmp_path).rename(tmp_path / "m.gguf")
    with pytest.raises(GGUFError, match=r"one of 3 parts, so its name must end in -00001-of-00003\.gguf"):
        open_model(tmp_path / "m.gguf")


def test_parts_of_another_model(tiny_path, tmp_path):
    first = cut(tiny_path, tmp_path)
    second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (2, 3))
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(GGUFError, match=r"m-00002-of-00003\.gguf: split\.no: is 2, not 1: no part of"):
        Model(first)
    second.write_bytes(kept)
    (tmp_path / "other").mkdir()
    cut(tiny_path, tmp_path / "other", count=4, numbers=(1,))
    second.write_bytes((tmp_path / "other" / second.name).read_bytes())
    with pytest.raises(GGUFError, match=r"split\.count: is 4, not 3: no part of"):
        Model(first)
    cut(tiny_path, tmp_path, total=5)
    with pytest.raises(GGUFError, match=r"split\.tensors\.count: the parts have 21 tensors, not 5"):
        Model(first)


def test_a_tensor_in_two_parts(tiny_path, tmp_path, monkeypatch):
    first = cut(tiny_path, tmp_path)
    reader = gguf.GGUFReader(tmp_path / "m-00001-of-00003.gguf")
    path = tmp_path / "m-00002-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", N)
    tensor = reader.tensors[0]
    writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=f"{tensor.name} at byte [0-9]+: an earlier part has this tensor too"):
        Model(first)
