"""What an engine takes from a model's file: weights, and all that has to do with text."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from helexa import ops
from helexa.engine.chat_template import ChatTemplate
from helexa.engine.collector import Pooling
from helexa.engine.device import Device
from helexa.engine.grammar import GrammarCompiler
from helexa.engine.options import EngineOptions
from helexa.engine.phases import Phases
from helexa.engine.preflight import main_memory_tables
from helexa.engine.tokenizer import Tokenizer
from helexa.engine.weight_keeper import WeightKeeper
from helexa.log import fields
from helexa.models import Model, ModelConfig, build_model
from helexa.weights.gguf import TensorInfo
from helexa.weights.load import GGUFWeights, LoadProgress
from helexa.weights.model_file import ModelFile, open_model
from helexa.weights.quantize import QuantizedFile, fingerprint, plan, quantized
from helexa.weights.recipes import find_recipe
from helexa.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]

KEPT_TEXTS = 2


@dataclass(frozen=True, slots=True)
class TextParts:
    """What a model that has a vocabulary reads and writes with."""

    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    grammars: GrammarCompiler | None = None


_lock = threading.Lock()
_text_parts: OrderedDict[str, TextParts] = OrderedDict()  # the least recently used first


def planned_tensors(file: ModelFile, options: EngineOptions) -> Mapping[str, TensorInfo]:
    """The tensors as they will be loaded. Raises InvalidParameter for a `quant` that the file cannot have."""
    if options.quant is None:
        return file.tensors
    return QuantizedFile(file, plan(file, find_recipe(options.quant))).tensors


def read_model(
    file: ModelFile,
    config: ModelConfig,
    options: EngineOptions,
    progress: Progress,
    keeper: WeightKeeper,
    phases: Phases,
) -> Model:
    """The model with the weights of the file, or those that are parked. Raises InvalidFile."""
    device = Device(options.device)
    parked = keeper.find() if device.is_cuda else None
    with _weights(file, options, progress, device, is_read=parked is None) as tensors:
        with phases("place"):
            weights = GGUFWeights(
                tensors,
                device=device.tensors,
                num_readers=ops.default_readers() if device.is_cuda else None,
                progress=progress,
                parked=parked,
                tables=main_memory_tables(tensors.tensors, config, device),
            )
        with weights:
            with phases("build"):
                model = build_model(config, weights)
            with phases("copy"):  # what is left of it: it began with the building
                weights.finish()
    keeper.keep(weights)
    if config.num_mtp_layers:
        logger.info("mtp_loaded", extra=fields(model=file.path.name, layers=config.num_mtp_layers))
    if file.unread:
        other = {"model": file.path.name, "tensors": len(file.unread), "first": file.unread[0]}
        logger.info("tensors_of_other_parts", extra=fields(**other))
    if unused := weights.unused():
        logger.warning("unused_tensors", extra=fields(model=file.path.name, tensors=",".join(unused)))
    return model


def _weights(
    file: ModelFile, options: EngineOptions, progress: Progress, device: Device, *, is_read: bool
) -> AbstractContextManager[TensorFile]:
    if options.quant is None:
        return nullcontext(file)
    if not is_read:  # but only asked for its layout
        return nullcontext(QuantizedFile(file, plan(file, find_recipe(options.quant))))
    return quantized(
        file,
        find_recipe(options.quant),
        cache=options.quant_cache,
        write=not device.is_cuda,  # which quantizes faster than the result is written
        progress=lambda done, total: progress(LoadProgress("quantize", 100 * done / total)),
    )


def text_parts(file: ModelFile, key: str) -> TextParts:
    """The parts that the file has, shared by engines of the same `key`, which says what file it is.

    They take longer to make than the weights of a model of average size take to load, so those of the last
    files are kept for models that come back. Raises InvalidFile or UnsupportedModel.
    """
    if file.path.is_dir():  # where they are in files beside the weights
        states = ((path.name, path.stat()) for path in sorted(file.path.iterdir()))
        key += "".join(f"\n{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)
    with _lock:
        if key in _text_parts:
            _text_parts.move_to_end(key)
            return _text_parts[key]
    parts = read_text_parts(file)
    with _lock:
        _text_parts[key] = parts
        while len(_text_parts) > KEPT_TEXTS:
            _text_parts.popitem(last=False)
    return parts


def prepare_text(path: Path) -> None:
    """Makes the parts of a file ahead of its load. Raises as `text_parts` and open_model."""
    with open_model(path) as file:
        text_parts(file, fingerprint(file))


def read_text_parts(file: ModelFile) -> TextParts:
    """The parts, made anew. Raises as `text_parts`."""
    metadata = file.text_metadata()
    if "tokenizer.ggml.tokens" not in metadata:
        return TextParts()
    tokenizer = Tokenizer.from_gguf(metadata)
    # Reading the vocabulary holds the interpreter for up to a second: not while streams wait for it.
    return TextParts(tokenizer, ChatTemplate.from_gguf(metadata, tokenizer), GrammarCompiler(tokenizer))


def pooling_of(kind: object) -> Pooling | None:
    """How a file's pooling_type has embeddings made; None for a way that is not implemented."""
    if kind is None or kind == 0:
        return "last"
    if not isinstance(kind, int):
        return None
    return "mean" if kind == 1 else "last" if kind == 3 else None
