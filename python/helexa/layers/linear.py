"""Matrices of a file, and the names under which models ask for them.

This is the only place that knows of quantization: a weight stays packed in the format of its file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from helexa import ops
from helexa.errors import InvalidFile


class TensorSource(Protocol):
    """Where the tensors of a model come from: weights.load.GGUFWeights, or a dict of arrays in a test."""

    def __contains__(self, name: str) -> bool: ...

    def linear(self, name: str, blocks: ops.RowBlocks | None = None) -> ops.PackedWeight:
        """The matrix `name`, packed for the kernels; of a stack of matrices, all one below the other.

        With blocks, the rows first … end of each block, one after the other.
        """

    def table(self, name: str) -> ops.PackedWeight | ops.RowTable:
        """The matrix `name` for looking up rows."""

    def vector(self, name: str) -> Tensor:
        """The tensor `name` as float32."""


class Scope:
    """The tensors below one sub-module; `scope / "mlp"` is the scope of a child.

    Parameters are asked for by their names in HuggingFace checkpoints.  `names` translates them to those of
    the file, without `.weight` or `.bias` and with `{}` for the number of the layer; a parameter of another
    kind is translated as a whole.  Every shape is checked; a misfit raises InvalidFile with the file's name.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str], path: str = ""):
        self.source = source
        self.names = names
        self.path = path

    def __truediv__(self, name: str | int) -> "Scope":
        return Scope(self.source, self.names, f"{self.path}.{name}" if self.path else str(name))

    def __contains__(self, parameter: str) -> bool:
        return self.file_name(parameter) in self.source

    def file_name(self, parameter: str) -> str:
        """The file's name of a parameter of this sub-module: `q_proj.bias` -> `blk.3.attn_q.bias`."""
        module, _, kind = f"{self.path}.{parameter}".lstrip(".").rpartition(".")
        layer = re.search(r"(?<=\.)\d+(?=\.)", module)
        number = ""
        if layer is not None:
            number = layer.group()
            module = module[: layer.start()] + "{}" + module[layer.end() :]
        if (whole := self.names.get(f"{module}.{kind}")) is not None:
            return whole.format(number)
        return f"{self.names[module].format(number)}.{kind}"

    def matrix(
        self, module: str, rows: int, cols: int, blocks: ops.RowBlocks | None = None
    ) -> ops.PackedWeight:
        """The weight of a linear module, or the given blocks of its rows, `rows` in all."""
        name = self._require(f"{module}.weight", (rows, cols))
        weight = self.source.linear(name) if blocks is None else self.source.linear(name, blocks)
        _check_shape(name, (weight.rows, weight.cols), (rows, cols))
        return weight

    def table(self, module: str, rows: int, cols: int) -> ops.PackedWeight | ops.RowTable:
        """The weight of an embedding module."""
        name = self._require(f"{module}.weight", (rows, cols))
        table = self.source.table(name)
        _check_shape(name, (table.rows, table.cols), (rows, cols))
        return table

    def vector(self, parameter: str, *shape: int) -> Tensor:
        """A norm's weight, a bias or another small tensor of this shape, float32."""
        name = self._require(parameter, shape)
        vector = self.source.vector(name)
        _check_shape(name, tuple(vector.shape), shape)
        return vector

    def _require(self, parameter: str, shape: tuple[int, ...]) -> str:
        name = self.file_name(parameter)
        if name not in self.source:
            raise InvalidFile(f"tensor {name!r} is missing; expected one of shape {list(shape)}")
        return name


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise InvalidFile(f"tensor {name!r} has shape {list(found)}, expected {list(expected)}")


class Linear:
    """x·Wᵀ + b; of several weights that share the input x, the outputs stand side by side."""

    def __init__(self, weights: Sequence[ops.PackedWeight], biases: Sequence[Tensor | None] | None = None):
        self.weights = list(weights)
        self.biases = list(biases) if biases is not None and any(b is not None for b in biases) else None

    @classmethod
    def load(
        cls, scope: Scope, in_features: int, out_features: Mapping[str, int], *, bias: bool = False
    ) -> "Linear":
        """The modules that `out_features` names, as one layer.

        A bias is used where the file has one; with `bias` it must have all of them.
        """
        weights = [scope.matrix(module, rows, in_features) for module, rows in out_features.items()]
        biases = [
            scope.vector(f"{module}.bias", rows) if bias or f"{module}.bias" in scope else None
            for module, rows in out_features.items()
        ]
        return cls(weights, biases)

    @property
    def float_rows(self) -> int:
        """Up to how many rows it takes its input as floats, too: if some of its weights are not quantized,
        these multiply it unrounded, but many rows are multiplied in bfloat16 anyway."""
        sees_floats = any(weight.format in ops.FLOAT_FORMATS for weight in self.weights)
        return ops.MAX_MATVEC_ROWS if sees_floats else 0

    def __call__(self, x: ops.Rows, dtype: torch.dtype | None = None) -> Tensor:
        """[T, in] -> [T, sum of out]; dtype: if it matters, else what is right for so many rows."""
        return ops.quant_matmul(x, self.weights, self.biases, dtype=dtype)
