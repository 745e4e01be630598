"""Byte-level BPE tokenizers from the metadata of GGUF files, and incremental decoding of what they produce.

Merging is done by `tokenizers`. Special tokens are cut out before it, here, so that a caller can have
them left alone in text that must not speak as the template does. SentencePiece vocabularies are refused.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import tokenizers
from tokenizers.models import BPE

from helexa.engine.output.tags import MARKERS
from helexa.errors import BadRequest, InvalidFile, InvalidParameter, UnsupportedModel
from helexa.weights.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# A chat model may end its turn with a token that its file does not call an end.
_END_NAMES = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end_of_turn|>",
    "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<EOT>", "<|EOT|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


def _byte_of_character() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies, by the rule of GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()
_LATIN_1 = str.maketrans({character: chr(byte) for character, byte in _BYTES.items()})


class Tokenizer:
    """Turns text into the token ids of one vocabulary and back."""

    def __init__(
        self,
        tokens: Sequence[str],
        token_types: Sequence[int],
        merges: Iterable[str],
        rules: PreTokenizer,
        *,
        bos_token_id: int | None = None,
        ends: Sequence[int] = (),
        add_bos: bool = False,
        add_eos: bool = False,
    ):
        """tokens: as the file spells them.   ends: the end of sequence first. Raises InvalidFile."""
        self._tokens, self._types = tokens, token_types
        self.bos_token_id = bos_token_id
        self.eos_token_id = ends[0] if ends else None
        self._prefix = [bos_token_id] if add_bos and bos_token_id is not None else []
        self._suffix = [ends[0]] if add_eos and ends else []
        vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
        kinds = {
            token_id: token_type for token_id, token_type in enumerate(token_types) if token_type != _NORMAL
        }
        self._other_kinds = kinds
        control = {tokens[i]: i for i, kind in kinds.items() if kind == _CONTROL and tokens[i]}
        user_defined = {tokens[i]: i for i, kind in kinds.items() if kind == _USER_DEFINED and tokens[i]}
        self.special_tokens: Mapping[str, int] = control
        self.eos_token_ids = frozenset(ends) | {control[name] for name in _END_NAMES if name in control}
        self._markers = frozenset(control[name] for name in MARKERS if name in control)
        self.added_tokens: Mapping[str, int] = control | user_defined
        self._any_added = _alternatives(self.added_tokens)
        self._user_defined = _alternatives(user_defined)
        # Characters of ordinary tokens stand for bytes. Composed, at most 1.5 characters go into a byte.
        longest = (
            max(map(len, tokens), default=1),
            max((len(t.encode()) for t in self.added_tokens), default=1),
        )
        self._most_bytes = max(longest) * (2 if rules.nfc else 1)
        for text in control:  # plain text that happens to read like one must not become it
            del vocabulary[text]
        self._bpe = tokenizers.Tokenizer(_merger(vocabulary, merges, rules))
        self._bpe.pre_tokenizer = rules.build()
        if rules.nfc:
            self._bpe.normalizer = rules.normalizer()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The tokenizer of a GGUF file. Raises UnsupportedModel or InvalidFile."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UnsupportedModel(
                f"the tokenizer is of kind {kind!r}; supported is byte-level BPE, named 'gpt2'"
            )
        name = metadata.get("tokenizer.ggml.pre", "default")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise UnsupportedModel(f"the pre-tokenizer {name!r} is not known; known are {known}")
        rules = PRE_TOKENIZERS[name]
        tokens = _array(metadata, "tokens")
        types = (
            _array(metadata, "token_type")
            if "tokenizer.ggml.token_type" in metadata
            else [_NORMAL] * len(tokens)
        )
        if len(types) != len(tokens):
            raise InvalidFile(
                f"tokenizer.ggml.token_type has {len(types)} items, expected {len(tokens)}, one a token"
            )
        ends = (_token_id(metadata, key, len(tokens)) for key in _END_KEYS)
        return cls(
            tokens,
            types,
            _array(metadata, "merges"),
            rules,
            bos_token_id=_token_id(metadata, "bos_token_id", len(tokens)),
            ends=[token_id for token_id in ends if token_id is not None],
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", rules.adds_bos)),
            add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def bos_token(self) -> str:
        """The spelling of the beginning-of-sequence token; empty if there is none."""
        return "" if self.bos_token_id is None else self._tokens[self.bos_token_id]

    @property
    def eos_token(self) -> str:
        """The spelling of the end-of-sequence token; empty if there is none."""
        return "" if self.eos_token_id is None else self._tokens[self.eos_token_id]

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        add_special: with the tokens that the file wants around a text, but never a second beginning.
        parse_special: control tokens spelled in the text become those tokens; otherwise they are plain text.
        Raises BadRequest for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"the text is not valid Unicode: half a surrogate pair at character {error.start}"
            raise BadRequest(message) from None
        pattern = self._any_added if parse_special else self._user_defined
        token_ids: list[int] = []
        for place, piece in enumerate(pattern.split(text) if pattern else [text]):
            if place % 2:
                token_ids.append(self.added_tokens[piece])
            elif piece:
                token_ids += self._bpe.encode(piece, add_special_tokens=False).ids
        if add_special:
            prefix = [] if token_ids[:1] == self._prefix else self._prefix
            return prefix + token_ids + self._suffix
        return token_ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, at once; `encode` takes 150 bytes a character."""
        return len(text) // max(self._most_bytes, 1)

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `token_ids`, with U+FFFD for bytes that are not UTF-8."""
        kept = (i for i in token_ids if not (skip_special and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for. Raises InvalidParameter beyond the vocabulary."""
        if not 0 <= token_id < len(self._tokens):
            raise InvalidParameter(
                f"token id {token_id} is outside the vocabulary of {len(self._tokens)} tokens"
            )
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind in (_NORMAL, _UNUSED):
            try:
                return bytes([_BYTES[character] for character in text])
            except KeyError:
                return text.encode()
        if kind == _BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes.fromhex(text[3:5])
        return text.encode()

    def all_token_bytes(self) -> list[bytes]:
        """`token_bytes` of every token, at a tenth of the time."""
        others = [token_id for token_id, kind in self._other_kinds.items() if kind != _UNUSED]
        texts = list(self._tokens)
        for token_id in others:
            texts[token_id] = ""
        joined = "".join(texts)
        if not _BYTES.keys() >= set(joined):  # some tokens are spelled as text
            return [self.token_bytes(token_id) for token_id in range(len(texts))]
        data, found, start = joined.translate(_LATIN_1).encode("latin-1"), [], 0
        for text in texts:
            end = start + len(text)
            found.append(data[start:end])
            start = end
        for token_id in others:
            found[token_id] = self.token_bytes(token_id)
        return found

    @property
    def special_token_ids(self) -> list[int]:
        """The tokens that `is_special` names."""
        return [token_id for token_id in self._other_kinds if self.is_special(token_id)]

    def is_special(self, token_id: int) -> bool:
        """Whether a token controls the dialogue and is no part of its text.

        Markers of reasoning and of calls are part of it, whatever their file says.
        """
        is_control = 0 <= token_id < len(self._types) and bool(self._types[token_id] == _CONTROL)
        return is_control and token_id not in self._markers


class Detokenizer:
    """The text of a stream of tokens, given out as soon as its characters are whole.

    What `push` and `flush` return adds up to `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that the next token completes; may be empty."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _array(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or isinstance(value, str | int | float):
        raise InvalidFile(f"tokenizer.ggml.{name} is {value!r}, expected an array")
    items: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    return items


def _token_id(metadata: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise InvalidFile(f"tokenizer.ggml.{key} is {value!r}, expected one of {vocab_size} tokens")
    return value


def _alternatives(tokens: Mapping[str, int]) -> re.Pattern[str] | None:
    """A pattern that finds the longest of the tokens at the first place where there is one."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if tokens else None


def _merger(vocabulary: dict[str, int], merges: Iterable[str], rules: PreTokenizer) -> BPE:
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    except ValueError:
        raise InvalidFile("tokenizer.ggml.merges has an item that is not two tokens and a space") from None
    try:
        return BPE(vocabulary, pairs, ignore_merges=rules.ignore_merges)
    except Exception as error:  # tokenizers raises nothing narrower
        raise InvalidFile(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
