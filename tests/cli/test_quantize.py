"""`helexa quantize`."""

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from helexa.cli import app
from helexa.errors import BadRequest, InvalidParameter, SourceError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((64, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def formats(path):
    return [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]


def test_it_writes_the_type_that_is_asked_for_and_says_the_size(source, tmp_path):
    target = tmp_path / "out.gguf"
    result = run(source, target, "--type", "Q5-K")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [
        f"{target}:",
        str(target.stat().st_size),
        "bytes",
        "from",
        str(source.stat().st_size),
    ]
    assert formats(target) == ["Q5_K"]


def test_without_a_type_it_is_q4_k_m(source, tmp_path):
    assert run(source, tmp_path / "out.gguf").exit_code == 0
    assert formats(tmp_path / "out.gguf") == ["Q4_K"]
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.file_type").contents() == 15


def test_an_existing_file_is_replaced_only_by_force(source, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"mine")
    assert isinstance(run(source, target).exception, BadRequest)
    assert target.read_bytes() == b"mine"
    assert run(source, target, "--force").exit_code == 0
    assert formats(target) == ["Q4_K"]


def test_the_source_is_never_the_target(source):
    before = source.read_bytes()
    assert "is the source" in str(run(source, source, "--force").exception)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["SOURCE", "out.gguf", "--type", "q7_k"], InvalidParameter),
        (["missing.gguf", "out.gguf"], SourceError),
        (["SOURCE", "SOURCE/below.gguf"], BadRequest),  # no folder can be made there
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(source, tmp_path, arguments, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.replace("SOURCE", str(source)) for argument in arguments))
    assert isinstance(result.exception, error)
    assert list(tmp_path.iterdir()) == [source]
