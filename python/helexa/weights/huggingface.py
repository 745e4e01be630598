"""A directory as the HuggingFace hub has it (config.json, safetensors), seen as a GGUF file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from helexa.quant import FORMATS
from helexa.weights.gguf import TensorInfo
from helexa.weights.hf_config import read_config, sampling_metadata
from helexa.weights.hf_tensors import count_mtp_layers, gguf_tensors
from helexa.weights.hf_tokenizer import tokenizer_metadata
from helexa.weights.mapped import ByteRange
from helexa.weights.regions import byte_ranges
from helexa.weights.safetensors import Checkpoint, read_json

CONFIG = "config.json"
_GENERATION = "generation_config.json"


class HFModel:
    """An open directory. It offers what a GGUFFile does.

    metadata: GGUF's keys, without those of the tokenizer.   unread: tensors of other parts than the language
    model, such as a vision tower.
    """

    def __init__(self, path: Path):
        """Raises InvalidFile or UnsupportedModel."""
        self.path = path
        config_json = read_json(path / CONFIG)
        self._checkpoint = Checkpoint(path)
        try:
            config = read_config(config_json, num_mtp_layers=count_mtp_layers(self._checkpoint))
            self._regions, self.unread = gguf_tensors(self._checkpoint, config)
        except BaseException:
            self.close()
            raise
        self.architecture = config.architecture
        self.nbytes = self._checkpoint.nbytes
        self.metadata: dict[str, Any] = {"general.name": _model_name(path), **config.metadata}
        if (path / _GENERATION).is_file():
            self.metadata |= sampling_metadata(read_json(path / _GENERATION))
        if pooling := _pooling_type(path):
            self.metadata[f"{self.architecture}.pooling_type"] = pooling
        self.tensors = {
            name: TensorInfo(
                name, region.shape, region.format, 0, FORMATS[region.format].nbytes(math.prod(region.shape))
            )
            for name, region in self._regions.items()
        }

    def text_metadata(self) -> dict[str, Any]:
        """The metadata with the keys of the tokenizer, if there is one. Raises InvalidFile."""
        return self.metadata | tokenizer_metadata(self.path, self.metadata[f"{self.architecture}.vocab_size"])

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only; KeyError for an unknown name."""
        return self.rows(name, 0, self.tensors[name].num_rows)

    def rows(self, name: str, first: int, end: int) -> memoryview:
        """The bytes of some rows of a tensor; stacked matrices are one."""
        return self._regions[name].rows(first, end).reshape(-1).data.toreadonly()

    def row_ranges(self, name: str, first: int, end: int) -> Sequence[ByteRange] | None:
        """Where the bytes of some rows lie, in order; None for rows that are made of others."""
        return byte_ranges(self._regions[name], first, end)

    def floats_of(self, name: str) -> None:
        """None: every tensor is as it stands."""

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Nothing: `rows` reads ahead."""

    def release_rows(self, name: str, first: int, end: int) -> None:
        """Takes the pages of some rows out of this process; reading them again only takes time."""
        self._regions[name].release(first, end)

    def close(self) -> None:
        """Closes the files; what views refer to lives as long as they. May be called again."""
        self._checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory with a model in it, or its config.json."""
    return (path / CONFIG).is_file() or (path.name == CONFIG and path.is_file())


def open_huggingface(path: Path) -> HFModel:
    """The model of a directory, or of a config.json; raises InvalidFile or UnsupportedModel."""
    return HFModel(path.parent if path.name == CONFIG else path)


def _model_name(path: Path) -> str:
    """The directory's name; in the hub's own cache, that of the repository."""
    path = path.absolute()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def _pooling_type(path: Path) -> int | None:
    """GGUF's number for what sentence-transformers says of pooling; None if it says nothing."""
    file = path / "1_Pooling" / CONFIG
    found = read_json(file) if file.is_file() else {}
    kinds = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}
    return next((kind for key, kind in kinds.items() if found.get(key) is True), None)
