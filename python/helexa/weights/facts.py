"""What a listing says of a model file, from its header alone."""

import math
import os
from collections import Counter
from dataclasses import dataclass

from helexa.weights.model_file import ModelFile, open_model

_FILE_TYPES = {  # values of general.file_type
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    21: "Q2_K_S", 25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a header says. name: the model's title, if any.   context_length: in tokens, 0 if not stated."""

    name: str | None
    architecture: str
    quantization: str
    context_length: int
    num_parameters: int
    size_bytes: int


def describe(path: str | os.PathLike[str]) -> ModelFacts:
    """The facts of a model, of which only headers are read. Raises InvalidFile or UnsupportedModel."""
    with open_model(path) as file:
        name = file.metadata.get("general.name")
        context = file.metadata.get(f"{file.architecture}.context_length")
        return ModelFacts(
            name=name if isinstance(name, str) else None,
            architecture=file.architecture,
            quantization=quantization_label(file),
            context_length=context if type(context) is int else 0,
            num_parameters=sum(math.prod(info.shape) for info in file.tensors.values()),
            size_bytes=file.nbytes,
        )


def quantization_label(file: ModelFile) -> str:
    """What the file says of itself, e.g. Q4_K_M; else the format that holds most of its values."""
    kind = file.metadata.get("general.file_type")
    if type(kind) is int and kind in _FILE_TYPES:
        return _FILE_TYPES[kind]
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        sizes[info.format] += math.prod(info.shape)
    return sizes.most_common(1)[0][0].upper() if sizes else "unknown"
