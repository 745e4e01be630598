"""The tensors of a checkpoint under GGUF's names and in its conventions, as views of the checkpoint's own.

Llama's rows of q and k are in the order of interleaved pairs; norms that are stored less one have it added;
of Gated DeltaNet, projections are apart, decay is -exp(A_log), and qwen35 has its value heads tiled; experts
are stacks. The names follow llama.cpp's, and heads of multi-token prediction are layers behind the others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.hf_config import HYBRID, HFConfig
from helexa.weights.regions import (
    Columns,
    Computed,
    Gathered,
    Index,
    Region,
    ScaledBlocks,
    Stacked,
    Whole,
    values,
)
from helexa.weights.safetensors import Checkpoint

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_BARE = ("layers.", "embed_tokens.", "norm.")
_FLOATS = ("f32", "f16", "bf16")
_SCALE = "_scale_inv"

_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.in_proj_ba": "ssm_ba",
}
_MTP = {
    "mtp.fc": "nextn.eh_proj",
    "mtp.pre_fc_norm_embedding": "nextn.enorm",
    "mtp.pre_fc_norm_hidden": "nextn.hnorm",
    "mtp.norm": "nextn.shared_head_norm",
}
_EXPERT = re.compile(r"(\d+)\.(gate|up|down)_proj\.weight")


def count_mtp_layers(checkpoint: Checkpoint) -> int:
    """How many layers of multi-token prediction there are."""
    found = (re.match(r"mtp\.layers\.(\d+)\.", name) for name in checkpoint.tensors)
    return len({match[1] for match in found if match})


def gguf_tensors(checkpoint: Checkpoint, config: HFConfig) -> tuple[dict[str, Region], list[str]]:
    """The model's tensors by GGUF's names, and the names of those that no language model has.

    Raises InvalidFile or UnsupportedModel, which name the tensor.
    """
    view = _View(checkpoint, config)
    for name in checkpoint.tensors:
        view.place(name)
    view.stack_experts()
    if config.frequency_factors is not None:
        factors = config.frequency_factors
        view.found["rope_freqs.weight"] = Computed(factors.shape, lambda: factors)
    view.settle_head()
    return view.found, view.unknown


@dataclass
class _View:
    checkpoint: Checkpoint
    config: HFConfig
    found: dict[str, Region] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    experts: dict[tuple[int, str], dict[int, str]] = field(default_factory=dict)
    is_bare: bool = False  # names begin where the model does, so there is no head to expect

    @property
    def is_hybrid(self) -> bool:
        return self.config.architecture in HYBRID

    def place(self, name: str) -> None:
        """Puts a tensor of the checkpoint where it belongs."""
        if name.endswith(("rotary_emb.inv_freq", _SCALE)):
            return  # computed anew, or read with its matrix
        path = self._path(name)
        layer = re.match(r"(?:model|mtp)\.layers\.(\d+)\.(.+)", path)
        if layer is not None:
            number = int(layer[1])
            if path.startswith("mtp."):
                number += self._num_layers
            placed = list(self._layer_tensors(name, number, layer[2]))
        else:
            module, _, kind = path.rpartition(".")
            target = _MODEL.get(module)
            if module in _MTP:
                target = f"blk.{self._num_layers}.{_MTP[module]}"
            placed = [] if target is None else [(f"{target}.{kind}", self._plain(name, module))]
        if not placed and not (layer and layer[2].startswith("mlp.experts.")):
            self.unknown.append(name)
        for target, region in placed:
            if target in self.found:
                raise InvalidFile(f"{self.checkpoint.path.name}: found {name!r} and another for {target!r}")
            self.found[target] = region

    def stack_experts(self) -> None:
        """The experts that are tensors of their own, as stacks."""
        for (layer, kind), names in self.experts.items():
            expected = self.config.integer("expert_count")
            missing = set(range(expected)) - names.keys()
            if missing or len(names) != expected:
                found = f"{len(names)} experts' {kind}_proj in layer {layer}"
                raise InvalidFile(f"{self.checkpoint.path.name}: found {found}, expected {expected}")
            parts = [self._matrix(names[number]) for number in range(expected)]
            if any((part.shape, part.format) != (parts[0].shape, parts[0].format) for part in parts):
                raise InvalidFile(
                    f"{self.checkpoint.path.name}: found experts of several shapes in layer {layer}"
                )
            self.found[f"blk.{layer}.ffn_{kind}_exps.weight"] = Stacked(parts)

    def settle_head(self) -> None:
        """A tied head is not there; one that ought to be there is."""
        if self.config.is_tied:
            self.found.pop("output.weight", None)
        elif self.config.is_tied is False and "output.weight" not in self.found and not self.is_bare:
            raise InvalidFile(
                f"{self.checkpoint.path.name}: found no lm_head.weight, expected one, as config.json says "
                "tie_word_embeddings is false"
            )

    @property
    def _num_layers(self) -> int:
        metadata, architecture = self.config.metadata, self.config.architecture
        return self.config.integer("block_count") - int(
            metadata.get(f"{architecture}.nextn_predict_layers", 0)
        )

    def _path(self, name: str) -> str:
        """The name as a plain language model has it."""
        if name.startswith(_BARE):
            self.is_bare = True
            return f"model.{name}"
        for prefix in _PREFIXES:
            rest = name.removeprefix(prefix)
            if rest != name:
                return rest if rest.startswith("lm_head.") else f"model.{rest}"
        return name

    def _layer_tensors(self, name: str, layer: int, path: str) -> Iterator[tuple[str, Region]]:
        """The tensors that a layer's one is, or the parts of which it has."""
        module, _, kind = path.rpartition(".")
        block = f"blk.{layer}"
        if path.startswith("mlp.experts."):
            yield from self._expert(name, layer, path.removeprefix("mlp.experts."))
        elif module == "post_attention_layernorm":
            target = "post_attention_norm" if self.is_hybrid else "ffn_norm"
            yield f"{block}.{target}.{kind}", self._plain(name, module)
        elif module in _LAYER:
            yield f"{block}.{_LAYER[module]}.{kind}", self._plain(name, module)
        elif path.startswith("linear_attn."):
            for target, region in self._delta_net(name, path.split(".")[1]):
                yield f"{block}.{target}", region

    def _expert(self, name: str, layer: int, path: str) -> Iterator[tuple[str, Region]]:
        """Stacks of experts; single experts are only noted."""
        block = f"blk.{layer}"
        if match := _EXPERT.fullmatch(path):
            self.experts.setdefault((layer, match[2]), {})[int(match[1])] = name
        elif path == "down_proj":
            yield f"{block}.ffn_down_exps.weight", self._matrix(name)
        elif path == "gate_up_proj":
            source = self._matrix(name)
            if len(source.shape) != 3 or source.shape[1] % 2:
                raise self._misfit(name, "a stack of matrices of gates and ups")
            num_experts, rows, cols = source.shape
            each = np.arange(num_experts * rows).reshape(num_experts, 2, rows // 2)
            for half, kind in enumerate(("gate", "up")):
                shape = (num_experts, rows // 2, cols)
                yield f"{block}.ffn_{kind}_exps.weight", Gathered(source, each[:, half].ravel(), shape)

    def _plain(self, name: str, module: str) -> Region:
        """A tensor that has its own name in GGUF files, too."""
        source = self._matrix(name)
        if self.config.architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = self.config.integer("attention.head_count" + "_kv" * (module == "self_attn.k_proj"))
            rows = source.shape[0]
            if rows % (2 * heads):
                raise self._misfit(name, f"{heads} heads of pairs")
            index = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
            if len(source.shape) == 1:
                return Computed(source.shape, lambda: values(source)[index])
            return Gathered(source, index, source.shape)
        is_norm = "norm" in module.rpartition(".")[2]
        if is_norm and self.is_hybrid and module != "linear_attn.norm":
            return Computed(source.shape, lambda: values(source) + np.float32(1.0))
        if len(source.shape) == 1 or module in ("mlp.gate", "mlp.shared_expert_gate"):
            return Computed(source.shape, lambda: values(source))
        return source

    def _delta_net(self, name: str, module: str) -> Iterator[tuple[str, Region]]:
        """What a parameter of Gated DeltaNet is, its value heads in GGUF's order."""
        source = self._matrix(name)
        key_heads, value_heads = self.config.integer("ssm.group_count"), self._num_value_heads
        width = self.config.integer("ssm.inner_size") // value_heads
        key_dim = key_heads * self.config.integer("ssm.state_size")
        if module == "in_proj_qkvz":
            yield from self._apart(name, source, key_heads, width)
            return
        leading = 2 * key_dim if module in ("in_proj_qkv", "conv1d") else 0
        each = width if module in ("in_proj_qkv", "conv1d", "in_proj_z", "out_proj") else 1
        length = source.shape[-1] if module == "out_proj" else source.shape[0]
        if length != leading + value_heads * each:
            raise self._misfit(name, f"{leading + value_heads * each} rows or columns")
        index = np.concatenate([np.arange(leading), leading + self._value_order(each)])
        if module in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"):
            target = {"qkv": "attn_qkv", "z": "attn_gate", "b": "ssm_beta", "a": "ssm_alpha"}[module[8:]]
            yield f"{target}.weight", Gathered(source, index, source.shape)
        elif module == "out_proj":
            yield "ssm_out.weight", Columns(source, index) if self._is_tiled else source
        elif module == "conv1d":
            shape = (source.shape[0], source.shape[-1])
            yield "ssm_conv1d.weight", Computed(shape, lambda: values(source).reshape(shape)[index])
        elif module == "A_log":
            yield "ssm_a", Computed(source.shape, lambda: -np.exp(values(source)[index]))
        elif module == "dt_bias":
            yield "ssm_dt.bias", Computed(source.shape, lambda: values(source)[index])

    def _apart(self, name: str, source: Region, key_heads: int, width: int) -> Iterator[tuple[str, Region]]:
        """qwen3next's projection, which has for each key head its q, k, v and z."""
        key_dim, group = self.config.integer("ssm.state_size"), self._num_value_heads // key_heads
        sizes = [key_dim, key_dim, group * width, group * width]
        if source.shape[0] != key_heads * sum(sizes):
            raise self._misfit(name, f"{key_heads * sum(sizes)} rows")
        per_head = np.arange(source.shape[0]).reshape(key_heads, -1)
        q, k, v, z = (part.ravel() for part in np.split(per_head, np.cumsum(sizes)[:-1], axis=1))
        for target, index in (("attn_qkv", np.concatenate([q, k, v])), ("attn_gate", z)):
            yield f"{target}.weight", Gathered(source, index, (len(index), *source.shape[1:]))

    @property
    def _num_value_heads(self) -> int:
        return self.config.integer("ssm.time_step_rank")

    @property
    def _is_tiled(self) -> bool:
        return self.config.architecture != "qwen3next"

    def _value_order(self, each: int) -> Index:
        """The rows of all value heads, `each` a head: by key head within a group's place, or as they are."""
        key_heads = self.config.integer("ssm.group_count")
        rows = np.arange(self._num_value_heads * each)
        if not self._is_tiled or self._num_value_heads % key_heads:
            return rows
        return rows.reshape(key_heads, -1, each).swapaxes(0, 1).ravel()

    def _matrix(self, name: str) -> Region:
        """A tensor in a format that can be computed with."""
        info = self.checkpoint.tensors[name]
        if 0 in info.shape or not info.shape:
            raise self._misfit(name, "at least one number in each dimension")
        if info.dtype in _FLOATS:
            return Whole(self.checkpoint, info, info.shape)
        scale = self.checkpoint.tensors.get(name + _SCALE)
        if info.dtype == "f8_e4m3" and scale is not None and self.config.fp8_block and len(info.shape) == 2:
            block = self.config.fp8_block
            expected = tuple(-(-size // each) for size, each in zip(info.shape, block, strict=True))
            if scale.shape != expected:
                raise self._misfit(name + _SCALE, f"shape {list(expected)}")
            scales = values(self._matrix(name + _SCALE))
            return ScaledBlocks(self.checkpoint, info, scales, block)
        raise UnsupportedModel(
            f"{self.checkpoint.path.name}: found tensor {name!r} of type {info.dtype}, "
            f"expected one of {', '.join(_FLOATS)}, or f8_e4m3 with scales of blocks"
        )

    def _misfit(self, name: str, expected: str) -> InvalidFile:
        info = self.checkpoint.tensors[name]
        found = f"tensor {name!r}, {info.dtype} {list(info.shape)}"
        return InvalidFile(f"{self.checkpoint.path.name}: found {found}, expected {expected}")
