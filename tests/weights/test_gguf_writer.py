import gguf
import numpy as np
import pytest

from helexa.weights import gguf_writer
from helexa.weights.gguf import open_gguf
from helexa.weights.gguf_writer import encode_entry

VALUES = {
    "general.architecture": "llama",
    "text": "naïve 日本",
    "small": 7,
    "negative": -3,
    "large": 1 << 40,
    "deep": -(1 << 40),
    "number": 0.25,
    "yes": True,
    "words": ["a", "", "ü"],
    "numbers": [1, -2, 3],
    "shares": [0.5, 1.5],
    "flags": [True, False],
    "bytes": np.arange(4, dtype=np.uint8),
    "wide": np.arange(3, dtype=np.int64),
}


def entries():
    return [encode_entry(key, value) for key, value in VALUES.items()]


def test_a_written_file_reads_back_with_every_value_and_tensor(write_gguf_source, tmp_path):
    with open_gguf(write_gguf_source()) as source:
        gguf_writer.write_gguf(tmp_path / "out.gguf", entries(), source)
        with open_gguf(tmp_path / "out.gguf") as file:
            for key, value in VALUES.items():
                found = file.metadata[key]
                assert list(found) == list(value) if hasattr(value, "__len__") else found == value, key
            assert list(file.tensors) == list(source.tensors)
            for name, info in source.tensors.items():
                assert (file.tensors[name].shape, file.tensors[name].format) == (info.shape, info.format)
                assert bytes(file.data(name)) == bytes(source.data(name))


def test_other_readers_read_it(write_gguf_source, tmp_path):
    with open_gguf(write_gguf_source()) as source:
        gguf_writer.write_gguf(tmp_path / "out.gguf", entries(), source)
        reader = gguf.GGUFReader(tmp_path / "out.gguf")
        kinds = {key: reader.get_field(key).types for key in VALUES}
        kind = gguf.GGUFValueType
        assert kinds["small"] == [kind.UINT32]
        assert kinds["negative"] == [kind.INT32]
        assert kinds["number"] == [kind.FLOAT32]
        assert kinds["yes"] == [kind.BOOL]
        assert kinds["words"] == [kind.ARRAY, kind.STRING]
        assert kinds["numbers"] == [kind.ARRAY, kind.INT32]
        assert reader.get_field("words").contents() == VALUES["words"]
        for tensor in reader.tensors:
            assert tensor.data.tobytes() == bytes(source.data(tensor.name))


def test_entries_of_a_file_are_copied_byte_for_byte(write_gguf_source, tmp_path):
    path = write_gguf_source(add=lambda writer: writer.add_uint8("odd", 3))
    with open_gguf(path) as source:
        gguf_writer.write_gguf(tmp_path / "out.gguf", map(source.entry, source.metadata), source)
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("odd").types == [gguf.GGUFValueType.UINT8]
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def test_a_file_that_could_not_be_finished_is_not_there(write_gguf_source, tmp_path):
    target = tmp_path / "folder" / "out.gguf"

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise InterruptedError

    with open_gguf(write_gguf_source()) as source, pytest.raises(InterruptedError):
        gguf_writer.write_gguf(target, entries(), source, stop)
    assert list(target.parent.iterdir()) == []


def test_an_earlier_file_is_replaced_as_a_whole(write_gguf_source, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    with open_gguf(write_gguf_source()) as source:
        gguf_writer.write_gguf(target, entries(), source)
    assert target.read_bytes()[:4] == b"GGUF"
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [None, {"a": 1}, 1 << 70, object()])
def test_values_that_no_file_can_hold_are_refused(value):
    with pytest.raises(TypeError, match="a GGUF file cannot hold"):
        encode_entry("key", value)


@pytest.fixture
def write_gguf_source(write_gguf):
    def write(**arguments):
        tensors = {
            "v.weight": ("f32", (3,)),
            "m.weight": ("q4_k", (5, 256)),
            "e.weight": ("bf16", (2, 3, 32)),
            "last.weight": ("f16", (1, 33)),
        }
        return write_gguf(tensors, **arguments)

    return write
