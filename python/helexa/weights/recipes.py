"""Which tensors of a model are quantized, and to what: by the names of their roles in GGUF files.

All linear layers, experts and an untied head are; norms, convolutions, gates, routers, embeddings and with
them a tied head are not. The mixed recipes follow the field's: more bits where an error costs most.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from helexa.errors import InvalidParameter

_ROLE = re.compile(
    r"blk\.(\d+)\.(attn_(?:q|k|v|qkv|gate|output)|ssm_out|ffn_(?:gate|up|down)(?:_exps|_shexp)?|ffn_gate_up_exps)\.weight"
)
HEAD = "output.weight"
FLOATS = ("f32", "f16", "bf16")
# For rows that are no whole super-blocks of 256: the next larger format with blocks of 32.
_NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


class HasLayout(Protocol):
    """What is needed of a tensor's header: weights.gguf.TensorInfo."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> str: ...


@dataclass(frozen=True)
class Recipe:
    """A way to quantize a model.

    base: the format of all that is quantized.   more: of the head and, in the layers where it pays most, of
    what makes values and what leaves the feed-forward block.   fused: of fused q, k and v.   file_type: the
    number that GGUF files call it by.
    """

    name: str
    base: str
    file_type: int
    more: str | None = None
    fused: str | None = None

    def plan(self, tensors: Mapping[str, HasLayout]) -> dict[str, str]:
        """The formats of the tensors that are to be quantized; the others stay as they are."""
        roles = {name: match.groups() for name in tensors if (match := _ROLE.fullmatch(name))}
        layers: dict[str, list[int]] = {}  # that have each role
        for layer, role in roles.values():
            layers.setdefault(role, []).append(int(layer))
        ranks = {role: sorted(numbers) for role, numbers in layers.items()}
        wanted = {
            name: self._format(role, ranks[role].index(int(layer)), len(ranks[role]))
            for name, (layer, role) in roles.items()
        }
        if HEAD in tensors:
            wanted[HEAD] = self.more or self.base
        formats = {name: _fitting(format, tensors[name]) for name, format in wanted.items()}
        return {name: format for name, format in formats.items() if format is not None}

    def _format(self, role: str, rank: int, num_layers: int) -> str:
        """rank: of the layer among the num_layers layers that have the role."""
        if role == "attn_qkv":
            return self.fused or self.base
        if self.more and (role == "attn_v" or role.startswith("ffn_down")) and _pays(rank, num_layers):
            return self.more
        return self.base


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("q4_0", "q4_0", 2),
        Recipe("q8_0", "q8_0", 7),
        Recipe("q4_k", "q4_k", 14),
        Recipe("q4_k_m", "q4_k", 15, more="q6_k", fused="q5_k"),
        Recipe("q5_k", "q5_k", 16),
        Recipe("q5_k_m", "q5_k", 17, more="q6_k", fused="q6_k"),
        Recipe("q6_k", "q6_k", 18),
    )
}


def is_recipe(name: str) -> bool:
    """Whether `find_recipe` knows the name."""
    return _bare(name) in map(_bare, RECIPES)


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, in any case, its underscores optional.

    Raises InvalidParameter, with the nearest there is, for another.
    """
    spelled = {_bare(known): recipe for known, recipe in RECIPES.items()}
    if recipe := spelled.get(_bare(name)):
        return recipe
    near = difflib.get_close_matches(_bare(name), spelled, 1, 0.5)
    guess = f"did you mean {spelled[near[0]].name}? " if near else ""
    raise InvalidParameter(f"quant is {name!r}; {guess}known: {', '.join(RECIPES)}", param="quant")


def _bare(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "")


def _pays(rank: int, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = num_layers // 8
    return rank < eighth or rank >= 7 * num_layers // 8 or (rank - eighth) % 3 == 2


def _fitting(format: str, info: HasLayout) -> str | None:
    """The format or its substitute for narrow rows; None for what is quantized already or too narrow."""
    if info.format not in FLOATS:
        return None
    cols = info.shape[-1]
    return None if cols % 32 else _NARROW.get(format, format) if cols % 256 else format
