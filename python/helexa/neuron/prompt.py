"""Texts of a request as token ids that the engine takes. Or a refusal."""

from helexa.engine.engine import Engine
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import ContextTooLong, InvalidParameter
from helexa.wire.completions import Prompt

MOST_COUNTED = 4  # contexts; a prompt may be counted up to there, at 150 bytes of memory a character


def completion_token_ids(engine: Engine, prompt: Prompt, param: str = "prompt") -> list[int]:
    """A text prompt tokenized as it stands, or token ids checked against the vocabulary."""
    tokenizer = require_tokenizer(engine, param)
    if isinstance(prompt, str):
        check_length(engine, tokenizer.least_tokens(prompt), engine.max_context, param, "at least ")
        return fitting(engine, tokenizer.encode(prompt, add_special=True), param)
    check_token_ids(engine, prompt, param)
    return fitting(engine, prompt, param)


def counted_token_ids(engine: Engine, prompt: str, add_special: bool) -> list[int]:
    """A text tokenized to be counted, which may be longer than the context by some way."""
    tokenizer = require_tokenizer(engine, "prompt")
    most = MOST_COUNTED * engine.max_context
    check_length(engine, tokenizer.least_tokens(prompt), most, "prompt", "at least ")
    return tokenizer.encode(prompt, add_special=add_special)


def require_tokenizer(engine: Engine, param: str) -> Tokenizer:
    """The model's tokenizer. Raises InvalidParameter if its file has none."""
    if engine.tokenizer is None:
        raise InvalidParameter("the file of this model has no vocabulary", param=param)
    return engine.tokenizer


def check_token_ids(engine: Engine, token_ids: list[int], param: str) -> None:
    """Raises InvalidParameter for a token beyond the vocabulary."""
    size = engine.config.vocab_size
    if (highest := max(token_ids, default=0)) >= size:
        message = f"'{param}' has token {highest}; the model's vocabulary has {size} tokens"
        raise InvalidParameter(message, param=param)


def fitting(engine: Engine, token_ids: list[int], param: str) -> list[int]:
    """`token_ids` if there is room for at least one token of answer after them."""
    if not token_ids:
        raise InvalidParameter(f"'{param}' makes no tokens; expected some text", param=param)
    check_length(engine, len(token_ids), engine.max_context, param)
    return token_ids


def check_length(engine: Engine, num_tokens: int, most: int, param: str, how: str = "") -> None:
    """Raises ContextTooLong in the words that agents wait for to shorten their conversation."""
    if num_tokens >= most:
        raise ContextTooLong(
            f"This model's maximum context length is {engine.max_context} tokens, but the {param} "
            f"came to {how}{num_tokens} tokens. Reduce the length of the {param}.",
            param=param,
            max=engine.max_context,
            prompt_tokens=num_tokens,
        )
