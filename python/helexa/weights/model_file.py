"""Opening a model, whatever it is stored as."""

import os
from pathlib import Path

from helexa.weights.gguf import GGUFFile, open_gguf
from helexa.weights.huggingface import HFModel, is_checkpoint, open_huggingface

ModelFile = GGUFFile | HFModel


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """A GGUF file, or a directory (or its config.json) with safetensors; InvalidFile or UnsupportedModel."""
    path = Path(path)
    return open_huggingface(path) if is_checkpoint(path) else open_gguf(path)
