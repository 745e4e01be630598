"""What an engine takes from a model's file: weights, and all that has to do with text."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from helexa.engine.chat_template import ChatTemplate
from helexa.engine.collector import Pooling
from helexa.engine.grammar import GrammarCompiler
from helexa.engine.tokenizer import Tokenizer
from helexa.log import fields
from helexa.models import Model, ModelConfig, build_model
from helexa.weights.load import GGUFWeights, LoadProgress
from helexa.weights.model_file import ModelFile

logger = logging.getLogger(__name__)

Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class TextParts:
    """What a model that has a vocabulary reads and writes with."""

    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    grammars: GrammarCompiler | None = None


def read_model(file: ModelFile, config: ModelConfig, progress: Progress) -> Model:
    """The model with the weights of the file. Raises InvalidFile."""
    weights = GGUFWeights(file, progress=progress)
    model = build_model(config, weights)
    if unused := weights.unused():
        logger.warning("unused_tensors", extra=fields(model=file.path.name, tensors=",".join(unused)))
    return model


def read_text_parts(file: ModelFile) -> TextParts:
    """The parts that the file has. Raises InvalidFile or UnsupportedModel."""
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
