"""Models quantized while they are read, and the files that keep the result.

A quantized file is a view: rows are encoded when they are asked for, so loading from it and writing it hold
one slice of one tensor, whatever the model's size.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from helexa import ops
from helexa.errors import HelexaError, InvalidFile, InvalidParameter
from helexa.log import fields
from helexa.quant import FORMATS
from helexa.weights.gguf import GGUFFile, TensorInfo, open_gguf
from helexa.weights.gguf_writer import encode_entry, write_gguf
from helexa.weights.mapped import ByteRange
from helexa.weights.model_file import ModelFile
from helexa.weights.recipes import FLOATS, Recipe
from helexa.weights.sources import models_folder
from helexa.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_AHEAD_BYTES = 32 << 20
_ABANDONED_S = 3600.0  # after its last growth
_ENCODERS = 1  # raised when an encoder finds other codes, so that results kept on disk are made anew
_SAMPLES, _SAMPLE_BYTES, _HEADER_BYTES = 256, 4096, 1 << 20
_TOKENIZER = "tokenizer.ggml.model"
_OWN_KEYS = ("general.file_type", "general.quantization_version", "general.alignment")


class QuantizedFile:
    """The tensors of a file, some of them in other formats. It is closed with its source."""

    def __init__(self, source: TensorFile, formats: Mapping[str, str]):
        """formats: of the tensors to quantize, by name."""
        self.source = source
        self._formats = formats

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name, as in the source; what is quantized has no offset."""
        tensors = dict(self.source.tensors)
        for name, format in self._formats.items():
            info = tensors[name]
            nbytes = info.num_rows * FORMATS[format].nbytes(info.shape[-1])
            tensors[name] = replace(info, format=format, offset=0, nbytes=nbytes)
        return tensors

    def data(self, name: str) -> memoryview:
        """All bytes of a tensor."""
        return self.rows(name, 0, self.tensors[name].num_rows)

    def rows(self, name: str, first: int, end: int) -> memoryview:
        """The bytes of some rows of a tensor; InvalidFile if it has numbers that cannot be quantized."""
        info = self.source.tensors[name]
        start, nbytes = info.offset + first * info.row_bytes, (end - first) * info.row_bytes
        self.source.prefetch(start, nbytes + _AHEAD_BYTES)
        raw = self.source.rows(name, first, end)
        if name not in self._formats:
            return raw
        try:
            return ops.quantize(info.format, raw, self._formats[name]).data
        except ValueError as error:
            raise InvalidFile(f"{self.path.name}: found in tensor {name!r} that {error}") from None

    def row_ranges(self, name: str, first: int, end: int) -> Sequence[ByteRange] | None:
        """Where the bytes of some rows lie; None for rows that are quantized when they are asked for."""
        return None if name in self._formats else self.source.row_ranges(name, first, end)

    def floats_of(self, name: str) -> TensorFile | None:
        """The source, of what is quantized."""
        return self.source if name in self._formats else None

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Nothing: `rows` reads ahead."""

    def release_rows(self, name: str, first: int, end: int) -> None:
        self.source.release_rows(name, first, end)


def plan(file: ModelFile, recipe: Recipe) -> dict[str, str]:
    """The formats that the recipe gives the tensors of a file; empty if it has been made by that recipe.

    Raises InvalidParameter for a file that is quantized in another way, or has nothing to quantize.
    """
    if file.metadata.get("general.file_type") == recipe.file_type:
        return {}
    if coarse := sorted({info.format for info in file.tensors.values()} - set(FLOATS)):
        raise InvalidParameter(
            f"{file.path.name} has tensors in {', '.join(coarse)} already, which {recipe.name} cannot be "
            "made from; expected a model in F32, F16 or BF16",
            param="quant",
        )
    formats = recipe.plan(file.tensors)
    if not formats:
        raise InvalidParameter(
            f"{file.path.name} has no linear layer whose rows are whole blocks of 32 numbers, as "
            f"{recipe.name} wants them",
            param="quant",
        )
    return formats


def write_quantized(
    file: ModelFile, path: Path, recipe: Recipe, progress: Progress = lambda done, total: None
) -> None:
    """Writes the model, quantized, as a GGUF file, with its tokenizer if it has one.

    Raises what `plan` and `write_gguf` raise, and InvalidFile for a tokenizer that cannot be read.
    """
    formats, metadata = plan(file, recipe), file.text_metadata()
    write_gguf(path, _entries(file, metadata, recipe), QuantizedFile(file, formats), progress)


@contextmanager
def quantized(
    file: ModelFile,
    recipe: Recipe,
    *,
    cache: bool,
    write: bool = True,
    progress: Progress = lambda done, total: None,
) -> Iterator[TensorFile]:
    """The weights of a model as the recipe wants them, quantized as they are read.

    With `cache` they come from a file that keeps the result of an earlier time, or, with `write`, that is
    written now; if it cannot be, they come without it. Raises InvalidParameter or InvalidFile.
    """
    formats = plan(file, recipe)
    if not formats:
        yield file
        return
    view = QuantizedFile(file, formats)
    kept = _kept(file, view, recipe, progress, write=write) if cache else None
    if kept is None:
        yield view
        return
    with closing(kept):
        yield kept


def cache_folder() -> Path:
    """Where quantized weights are kept; any file in it may be deleted."""
    return models_folder().parent / "quantized"


def cache_path(file: ModelFile, recipe: Recipe) -> Path:
    """The place of the result: keyed by the content of the model's files, the recipe and the encoders."""
    key = f"{fingerprint(file)}-{_ENCODERS}"
    return cache_folder() / f"{_family(file, recipe)}{hashlib.sha256(key.encode()).hexdigest()[:24]}.gguf"


def fingerprint(file: ModelFile) -> str:
    """What changes when a model's files do: their sizes, times, headers, and samples of their content."""
    digest = hashlib.sha256()
    folder = file.path
    paths = [folder] if folder.is_file() else [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    for path in paths:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        with path.open("rb", buffering=0) as content:
            digest.update(content.read(_HEADER_BYTES))
            for sample in range(_SAMPLES):
                content.seek(status.st_size * sample // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _kept(
    file: ModelFile, view: QuantizedFile, recipe: Recipe, progress: Progress, *, write: bool
) -> GGUFFile | None:
    """The kept result, written first if need be; None if it cannot or shall not be written."""
    try:
        path = cache_path(file, recipe)
        if (kept := _open_kept(path, view)) or not write:
            return kept
        free, needed = _free_bytes(path.parent), sum(info.nbytes for info in view.tensors.values())
        if free < needed + (1 << 28):
            logger.warning(
                "quantized_not_kept", extra=fields(path=path, needed_bytes=needed, free_bytes=free)
            )
            return None
        for cut_off in path.parent.glob(f".{path.name}.*"):  # of a process that was killed, if it is old
            if time.time() - cut_off.stat().st_mtime > _ABANDONED_S:
                cut_off.unlink(missing_ok=True)
        write_gguf(path, _entries(file, file.metadata, recipe), view, progress)
        for old in path.parent.glob(f"{_family(file, recipe)}*.gguf"):
            if old != path:  # of the same model before it changed
                old.unlink(missing_ok=True)
        return _open_kept(path, view)
    except OSError as error:
        logger.warning("quantized_not_kept", extra=fields(path=cache_folder(), error=error))
        return None


def _open_kept(path: Path, view: QuantizedFile) -> GGUFFile | None:
    if not path.is_file():
        return None
    try:
        kept = open_gguf(path)
    except HelexaError as error:
        logger.warning("quantized_damaged", extra=fields(path=path, error=error.message))
        return None
    layout = {name: (info.shape, info.format) for name, info in kept.tensors.items()}
    if layout == {name: (info.shape, info.format) for name, info in view.tensors.items()}:
        os.utime(path)  # says when it was last of use
        return kept
    kept.close()
    return None


def _free_bytes(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free


def _family(file: ModelFile, recipe: Recipe) -> str:
    """What the names of all results for this place and recipe begin with."""
    place = hashlib.sha256(os.fsencode(file.path.absolute())).hexdigest()[:12]
    return f"{file.path.stem[:80]}-{recipe.name}-{place}-"


def _entries(file: ModelFile, metadata: Mapping[str, Any], recipe: Recipe) -> Iterator[bytes]:
    """The metadata of the quantized file."""
    if _TOKENIZER not in metadata:
        yield encode_entry(_TOKENIZER, "no_vocab")
    for key, value in metadata.items():
        if key not in _OWN_KEYS:
            yield file.entry(key) if isinstance(file, GGUFFile) else encode_entry(key, value)
    yield encode_entry("general.quantization_version", 2)
    yield encode_entry("general.file_type", recipe.file_type)
