"""The header reader: parity with the `gguf` package, refusals, and thousands of damaged files."""

import gc
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import gguf
import numpy as np
import pytest

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.quant import FORMATS
from helexa.weights.gguf import GGUFFile, StringArray, open_gguf

TOKENS = ["<s>", "", "Ġhello", "日本", "🦙" * 70, "a\x00b", "x" * 300]


def add_every_kind(writer: gguf.GGUFWriter) -> None:
    for kind, value in {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.1, "float64": 0.1, "bool": True,
    }.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_string("test.empty", "")
    writer.add_string("test.text", "größer\n🦙")
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.5])
    writer.add_array("test.bools", [True, False, True])
    writer.add_token_list(TOKENS)


@pytest.fixture
def open_bytes(tmp_path):
    """Opens a file of the given bytes."""

    def open_them(content) -> GGUFFile:
        path = tmp_path / "raw.gguf"
        path.write_bytes(bytes(content))
        return open_gguf(path)

    return open_them


# What is read


def test_values_of_every_type_are_read_as_the_gguf_package_reads_them(write_gguf):
    path = write_gguf({}, add=add_every_kind)
    found = open_gguf(path).metadata
    fields = {k: f for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert list(found) == list(fields)
    for key, field in fields.items():
        value = found[key]
        if isinstance(value, StringArray | np.ndarray):
            value = value.tolist()
        assert value == field.contents(), key
        assert type(value) is type(field.contents()), key
    assert found["tokenizer.ggml.tokens"].tolist() == TOKENS


def test_tensors_of_every_format_are_found_where_the_gguf_package_finds_them(write_gguf):
    shapes = {"matrix": (3, 512), "vector": (256,), "experts": (2, 3, 256)}
    path = write_gguf({f"{n}.{f}": (f, shape) for f in FORMATS for n, shape in shapes.items()})
    file = open_gguf(path)
    tensors = gguf.GGUFReader(path).tensors
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        info = file.tensors[tensor.name]
        assert (
            info.shape == tuple(reversed([int(n) for n in tensor.shape])) == shapes[tensor.name.split(".")[0]]
        )
        assert info.format == tensor.tensor_type.name.lower()
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert bytes(file.data(tensor.name)) == tensor.data.tobytes()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_the_alignment_of_the_file_is_kept(write_gguf, alignment):
    values = np.arange(5, dtype=np.float32)
    path = write_gguf(
        {"a": values, "b": values + 1}, add=lambda writer: writer.add_custom_alignment(alignment)
    )
    file = open_gguf(path)
    assert file.tensors["b"].offset - file.tensors["a"].offset == max(alignment, 24)
    assert np.frombuffer(file.data("b"), np.float32).tolist() == [1, 2, 3, 4, 5]


def test_version_2_is_read_like_version_3(raw_file, open_bytes):
    raw_file.version = 2
    raw_file.add_tensor("t", (2,)).data = struct.pack("<2f", 1, 2)
    assert np.frombuffer(open_bytes(raw_file).data("t"), np.float32).tolist() == [1, 2]


def test_a_file_without_tensors_is_read(raw_file, open_bytes):
    file = open_bytes(raw_file.header())
    assert (file.architecture, file.tensors) == ("llama", {})


def test_tensors_may_lie_in_any_order(raw_file, open_bytes):
    raw_file.add_tensor("second", (8,), offset=32).add_tensor("first", (8,)).data = bytes(32) + b"\x01" * 32
    file = open_bytes(raw_file)
    assert list(file.tensors) == ["second", "first"]
    assert bytes(file.data("second")) == b"\x01" * 32


def test_the_last_tensor_needs_no_padding_behind_it(raw_file, open_bytes):
    raw_file.add_tensor("t", (1,)).data = bytes(4)
    assert open_bytes(raw_file).tensors["t"].nbytes == 4


# String arrays


def test_a_string_array_is_a_sequence(write_gguf):
    tokens = open_gguf(write_gguf({}, add=add_every_kind)).metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(TOKENS)
    assert (tokens[2], tokens[-1], tokens[1:3]) == (TOKENS[2], TOKENS[-1], TOKENS[1:3])
    assert list(tokens) == TOKENS
    assert "日本" in tokens
    assert tokens.index("日本") == 3
    assert tokens.tolist() is tokens.tolist()
    assert repr(tokens) == f"<StringArray of {len(TOKENS)}: 'tokenizer.ggml.tokens' in tiny.gguf>"
    with pytest.raises(IndexError):
        tokens[len(TOKENS)]


def test_a_string_array_outlives_its_file(write_gguf):
    with open_gguf(write_gguf({}, add=add_every_kind)) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
    del file
    gc.collect()
    assert tokens[3] == "日本"


def test_an_item_that_is_not_utf_8_is_named(raw_file, open_bytes):
    items = raw_file.string("fine") + raw_file.string(b"\xff\xfe")
    file = open_bytes(raw_file.add_array("words", 8, 2, items))
    with pytest.raises(InvalidFile, match=r"item 1 of 'words' in raw.gguf is b'\\xff\\xfe', expected UTF-8"):
        file.metadata["words"].tolist()


def test_a_description_that_is_not_utf_8_does_not_keep_a_model_from_loading(raw_file, open_bytes):
    file = open_bytes(raw_file.add_key("general.description", 8, raw_file.string(b"caf\xe9")))
    assert file.metadata["general.description"] == "caf\ufffd"


# Life of an open file


def test_an_open_file_survives_the_deletion_of_its_path(write_gguf):
    path = write_gguf({"t": np.arange(2048, dtype=np.float32)})
    file = open_gguf(path)
    path.unlink()
    assert np.frombuffer(file.data("t"), np.float32)[-1] == 2047
    file.release(file.tensors["t"].offset, 8192)
    assert np.frombuffer(file.data("t"), np.float32)[-1] == 2047


def test_an_open_file_survives_the_replacement_of_its_path(write_gguf):
    path = write_gguf({"t": np.ones(4, np.float32)})
    file = open_gguf(path)
    path.rename(path.with_name("old.gguf"))
    write_gguf({"t": np.zeros(4, np.float32)})
    assert np.frombuffer(file.data("t"), np.float32).tolist() == [1, 1, 1, 1]


def test_a_file_that_is_cut_while_open_is_refused_and_not_touched(write_gguf):
    path = write_gguf({"first": np.ones(4, np.float32), "last": np.ones(65536, np.float32)})
    file = open_gguf(path)
    os.truncate(path, file.tensors["last"].offset + 4)
    with pytest.raises(
        InvalidFile, match=r"a file cut to \d+ bytes while open, expected tensor 'last' up to"
    ):
        file.data("last")
    assert np.frombuffer(file.data("first"), np.float32)[0] == 1


def test_views_live_on_after_close_but_new_ones_are_refused(write_gguf):
    file = open_gguf(write_gguf({"t": np.arange(4, dtype=np.float32)}))
    view = file.data("t")
    file.close()
    file.close()
    assert np.frombuffer(view, np.float32).tolist() == [0, 1, 2, 3]
    for call in (lambda: file.data("t"), lambda: file.release(0, 1), lambda: file.prefetch(0, 1)):
        with pytest.raises(ValueError, match=r"tiny\.gguf is closed"):
            call()


def test_closing_gives_back_descriptor_and_mapping(write_gguf):
    path = write_gguf({"t": np.zeros(4, np.float32)})
    open_descriptors = len(os.listdir("/proc/self/fd"))

    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return maps.read().count(str(path))

    file = open_gguf(path)
    assert mappings() == 1
    view = file.data("t")
    file.close()
    del view
    gc.collect()
    assert mappings() == 0
    open_gguf(path)  # dropped without close()
    gc.collect()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidFile):
        open_gguf(path)
    gc.collect()
    assert mappings() == 0
    assert len(os.listdir("/proc/self/fd")) == open_descriptors


def test_views_are_read_only(write_gguf):
    assert open_gguf(write_gguf({"t": np.zeros(4, np.float32)})).data("t").readonly


def test_a_file_that_is_dropped_closes_itself_even_while_the_interpreter_ends(write_gguf, monkeypatch):
    path = write_gguf({"t": np.zeros(4, np.float32)})
    open_descriptors = len(os.listdir("/proc/self/fd"))
    file = open_gguf(path)
    monkeypatch.setattr("helexa.weights.gguf.os", None)  # as modules are by then
    del file
    assert len(os.listdir("/proc/self/fd")) == open_descriptors


def test_ranges_may_be_prefetched_and_released_anywhere(write_gguf):
    file = open_gguf(write_gguf({"t": np.arange(100_000, dtype=np.float32)}))
    for offset, nbytes in [
        (0, 0),
        (1, 1),
        (4097, 8192),
        (0, file.nbytes),
        (file.nbytes, 1 << 30),
        (5000, 1 << 40),
    ]:
        file.prefetch(offset, nbytes)
        file.release(offset, nbytes)
    assert np.frombuffer(file.data("t"), np.float32)[-1] == 99_999


# What is refused


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.gguf").touch()
    for name, found in {
        "missing.gguf": "cannot be opened: No such file or directory",
        "pipe": "found a directory or device, expected a GGUF file",
        ".": "found a directory or device, expected a GGUF file",
        "empty.gguf": "found an empty file, expected a GGUF file",
        "nul\0byte": "cannot be opened: embedded null byte",
    }.items():
        with pytest.raises(InvalidFile, match=found):
            open_gguf(tmp_path / name)


HUGE = 2**63
STRING = struct.pack("<Q", 1) + b"s"
REFUSED = [
    (lambda f: setattr(f, "magic", b"GGML"), "at byte 0: found b'GGML', expected b'GGUF'"),
    (lambda f: setattr(f, "num_keys", HUGE), f"at byte 16: found {HUGE} metadata keys, expected at most"),
    (lambda f: setattr(f, "num_tensors", HUGE), f"at byte 8: found {HUGE} tensors, expected at most"),
    (lambda f: setattr(f, "num_keys", 2), "at byte 69: found an empty metadata key, expected a name"),
    (lambda f: f.keys.append(f.keys[0]), "at byte 69: found metadata key 'general.architecture' again"),
    (lambda f: f.keys.clear(), "found general.architecture None, expected an architecture's name"),
    (lambda f: f.replace_key(8, f.string("")), "found general.architecture '', expected"),
    (lambda f: f.replace_key(4, b"1234"), "found general.architecture 875770417, expected"),
    (lambda f: f.add_key(b"\xff", 0, b"0"), r"at byte 77: found a metadata key b'\xff', expected UTF-8"),
    (lambda f: f.add_key("k", 13, bytes(8)), "at byte 78: found value type 13 of 'k', expected 0 to 12"),
    (lambda f: f.add_key("k", 7, b"\2"), "at byte 82: found boolean 2 in 'k', expected 0 or 1"),
    (lambda f: f.add_array("k", 7, 3, b"\1\0\7"), "at byte 96: found boolean 7 in 'k', expected 0 or 1"),
    (lambda f: f.add_key("k", 8, struct.pack("<Q", HUGE)), f"at byte 82: found {HUGE} bytes in k, expected"),
    (lambda f: f.add_array("k", 9, 1, bytes(12)), "at byte 82: found nested arrays in 'k', expected numbers"),
    (lambda f: f.add_array("k", 99, 1, b""), "at byte 82: found items of type 99 in 'k', expected numbers"),
    (lambda f: f.add_array("k", 5, HUGE, b""), f"at byte 86: found {HUGE} items in 'k', expected at most 16"),
    (lambda f: f.add_array("k", 8, 10**6, STRING), "at byte 86: found 1000000 strings in 'k', expected"),
    (
        lambda f: f.add_array("k", 8, 2, STRING + struct.pack("<Q", 999)),
        "at byte 103: found string 1 of 'k' beyond the end, expected it in the",
    ),
    (
        lambda f: f.add_array("k", 8, 2, struct.pack("<QQ", 2**64 - 1, 0)),
        "at byte 94: found string 0 of 'k' beyond the end, expected it in the",
    ),
    (
        lambda f: f.add_key("general.alignment", 4, struct.pack("<I", 24)),
        "found general.alignment 24, expected a power of two",
    ),
    (
        lambda f: f.add_key("general.alignment", 4, bytes(4)),
        "found general.alignment 0, expected a power of two",
    ),
    (
        lambda f: f.add_key("general.alignment", 7, b"\1"),
        "found general.alignment True, expected a power of two",
    ),
    (lambda f: f.add_tensor(dims=()), "at byte 78: found 0 dimensions of tensor 't', expected 1 to 4"),
    (lambda f: f.add_tensor(dims=(1,) * 5), "at byte 78: found 5 dimensions of tensor 't', expected 1 to 4"),
    (lambda f: f.add_tensor(dims=(4, 0)), "found the empty shape (0, 4) of tensor 't', expected at least 1"),
    (lambda f: f.add_tensor(dims=(33,), kind=8), "33 columns in tensor 't', expected whole blocks of the 32"),
    (
        lambda f: f.add_tensor(dims=(128,), kind=12),
        "128 columns in tensor 't', expected whole blocks of the 256",
    ),
    (lambda f: f.add_tensor(offset=4), "at byte 94: found offset 4 of tensor 't', expected a multiple of 32"),
    (lambda f: f.add_tensor(offset=2**64 - 32), "'t', f32 [4], up to byte 18446744073709551728, expected at"),
    (lambda f: f.add_tensor(dims=(2**62, 2**62)), "expected at most the file's 192 bytes"),
    (lambda f: f.add_tensor(dims=(17,)), "found tensor 't', f32 [17], up to byte 196, expected at most"),
    (lambda f: f.add_tensor().add_tensor(), "at byte 102: found tensor 't' again, expected each name once"),
    (
        lambda f: f.add_tensor("a", (9,)).add_tensor("b", offset=32),
        "found tensor 'b' at byte 192, expected it after 'a', from 196 on",
    ),
    (lambda f: f.add_tensor(b"\xfft"), r"found a tensor name b'\xfft', expected UTF-8"),
    (lambda f: f.add_tensor(""), "at byte 69: found an empty tensor name, expected a name"),
    (lambda f: f.add_tensor("n" * 2000), "found 2000 bytes in a tensor name, expected at most 1024"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_broken_rule_is_refused_with_place_finding_and_expectation(raw_file, open_bytes, change, message):
    raw_file.data = bytes(64)
    change(raw_file)
    with pytest.raises(InvalidFile) as caught:
        open_bytes(raw_file)
    assert caught.value.message.startswith("raw.gguf: ")
    assert message in caught.value.message
    assert not isinstance(caught.value, UnsupportedModel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: setattr(f, "version", 1), "found GGUF version 1, expected 2 or 3"),
        (lambda f: setattr(f, "version", 4), "found GGUF version 4, expected 2 or 3"),
        (
            lambda f: setattr(f, "version", 0x03000000),
            "found a big-endian GGUF file, expected a little-endian one",
        ),
        (
            lambda f: f.add_tensor(kind=16),
            r"found tensor 't' of type 16 \(iq2_xxs\), expected one of f32, f16, bf16, ",
        ),
        (
            lambda f: f.add_tensor(kind=4),
            r"found tensor 't' of type 4, expected one of f32, f16, bf16, q8_0, q4_0, ",
        ),
        (
            lambda f: f.add_key("split.count", 2, struct.pack("<H", 3)),
            "found one of 3 parts of a model, expected it whole in one file",
        ),
    ],
)
def test_a_well_formed_file_of_an_unknown_kind_is_unsupported(raw_file, open_bytes, change, message):
    raw_file.data = bytes(64)
    change(raw_file)
    with pytest.raises(UnsupportedModel, match=f"raw.gguf: {message}"):
        open_bytes(raw_file)


def test_names_in_messages_are_escaped(raw_file, open_bytes):
    raw_file.add_tensor("a\nb", dims=(3,), kind=8)
    with pytest.raises(InvalidFile, match=r"'a\\nb'"):
        open_bytes(raw_file)


def test_a_file_cut_anywhere_is_refused_with_the_place(write_gguf):
    path = write_gguf({"t": ("q4_k", (2, 256)), "v": np.ones(8, np.float32)}, add=add_every_kind)
    last = open_gguf(path).tensors["v"]
    for size in reversed(range(1, last.offset + last.nbytes)):
        os.truncate(path, size)
        with pytest.raises(InvalidFile, match=r"^tiny\.gguf: (at byte \d+: )?found .*, expected "):
            open_gguf(path)


# Damage


@contextmanager
def allocating_at_most(nbytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


def test_absurd_lengths_in_a_huge_file_allocate_nothing(raw_file, tmp_path):
    lengths = {
        "string": raw_file.key("k", 8, struct.pack("<Q", 1 << 33)),
        "numbers": raw_file.key("k", 9, raw_file.array(10, 1 << 30, b"")),
        "booleans": raw_file.key("k", 9, raw_file.array(7, 1 << 33, b"")),
        "strings": raw_file.key("k", 9, raw_file.array(8, 1 << 30, b"")),
        "name": struct.pack("<Q", 1 << 33),
    }
    architecture = raw_file.keys[0]
    for name, key in lengths.items():
        path = tmp_path / f"{name}.gguf"
        raw_file.keys = [architecture, key]
        path.write_bytes(bytes(raw_file))
        os.truncate(path, 1 << 36)  # sparse
        with (
            allocating_at_most(1 << 18),
            pytest.raises(InvalidFile, match=r"at byte \d+: found \d+ .*, expected at most \d+$"),
        ):
            open_gguf(path)
    for field in ("num_keys", "num_tensors"):
        setattr(raw_file, field, 1 << 30)
        path.write_bytes(bytes(raw_file))
        os.truncate(path, 1 << 36)
        with pytest.raises(InvalidFile, match=r"found 1073741824 .*, expected at most 131072"):
            open_gguf(path)
        setattr(raw_file, field, None)


def flip_bits(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, content: bytearray) -> None:
    del content[rng.randint(1, len(content)) :]


def splice(rng: random.Random, content: bytearray) -> None:
    start, length = rng.randrange(len(content)), rng.randrange(1, 64)
    piece = content[start : start + length]
    where = rng.randrange(len(content))
    content[where : where + rng.choice([0, len(piece)])] = piece


def inflate(rng: random.Random, content: bytearray) -> None:
    """Overwrites 4 or 8 bytes, often those of a length or count, with an extreme number."""
    width = rng.choice([4, 8])
    where = rng.choice([8, 16, rng.randrange(len(content))])
    value = rng.choice(
        [0, 1, 1 << 8, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]
    )
    content[where : where + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def zero(rng: random.Random, content: bytearray) -> None:
    where = rng.randrange(len(content))
    content[where : where + 32] = bytes(len(content[where : where + 32]))


@pytest.mark.parametrize(
    "damage", [flip_bits, truncate, splice, inflate, zero], ids=lambda function: function.__name__
)
def test_a_damaged_file_is_read_or_refused_but_never_worse(write_gguf, tmp_path, damage):
    tensors = {f"m.{name}": (name, (2, 256)) for name in ("f32", "q4_1", "q6_k")} | {
        "v": np.ones(8, np.float32)
    }
    whole = write_gguf(tensors, add=add_every_kind).read_bytes()
    header = open_gguf(write_gguf({}, add=add_every_kind)).nbytes + 200  # most damage goes where it matters
    path, rng, refusals = tmp_path / "damaged.gguf", random.Random(damage.__name__), []
    with allocating_at_most(1 << 20):
        for _ in range(1000):
            content = bytearray(whole[:header])
            for _ in range(rng.choice([1, 1, 1, 3])):
                damage(rng, content)
            path.unlink(missing_ok=True)
            path.write_bytes(content + (whole[header:] if damage is not truncate else b""))
            try:
                with open_gguf(path) as file:
                    for info in file.tensors.values():
                        assert len(file.data(info.name)) == info.nbytes
                    for value in file.metadata.values():
                        if isinstance(value, StringArray):
                            value.tolist()
            except InvalidFile as error:
                refusals.append(error.message)
    assert len(refusals) > 100
    assert all(" expected " in message for message in refusals)
