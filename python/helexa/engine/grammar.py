"""Grammars that an answer must follow, compiled once each into matchers that know which tokens may come next.

Grammars, parser and masks are those of `llguidance`; what it says about a bad grammar is what the client
reads. The compiled form is copied for each sequence, which takes microseconds.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import llguidance
import numpy as np
import numpy.typing as npt

from helexa.engine.tokenizer import Tokenizer
from helexa.errors import InvalidParameter

T = TypeVar("T")
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]

_stack_size = threading.Lock()  # the size of new stacks is a setting of the process
_CACHED = 32  # compiled grammars that are kept
# Copies of a compiled grammar share the states of its lexer, which only ever grow, up to a bound at which the
# parser gives up. So after that many tokens the grammar is compiled anew.
_WORN_TOKENS = 4096
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_SOURCE = 256 << 10  # characters of a grammar
# The parser descends into a grammar level by level, and a level takes up to some ten kilobytes. On a common
# stack of 8 MB, three thousand rules that name each other in a row would end the process.
_STACK_BYTES = 512 << 20
_MESSAGE = 500  # characters of an error that are passed on
# One blank, or a line and its indentation: a weak model would fill its answer with blanks if it might.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"\x20|\r?\n[\x20\t]{0,64}"}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar as the request gives it.

    source: a JSON schema as JSON text, a regular expression or Lark.   param: the field that asks for it.
    """

    kind: GrammarKind
    source: str = ""
    param: str = field(default="response_format", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            known = ", ".join(get_args(GrammarKind))
            raise self.refusal(f"the grammar is of kind {self.kind!r}; expected {known}")

    def refusal(self, message: str) -> InvalidParameter:
        """The error that names the field."""
        return InvalidParameter(message, param=self.param)


class CompiledGrammar:
    """A grammar that is ready to be copied, and how many tokens its copies have seen."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self.num_tokens = 0
        self._matcher = matcher
        self._vocab_size = vocab_size

    def matcher(self, spec: GrammarSpec) -> "Matcher":
        """A matcher at the start of the grammar, for a request that gives it as `spec`."""
        return Matcher(self, spec, self._matcher.deep_copy(), self._vocab_size)


class Matcher:
    """The state of one text within a grammar: what may come next, and whether it may end here."""

    def __init__(
        self, grammar: CompiledGrammar, spec: GrammarSpec, matcher: llguidance.LLMatcher, vocab_size: int
    ):
        self._grammar = grammar
        self._spec = spec
        self._matcher = matcher
        self._bits: npt.NDArray[np.uint8] = np.zeros(4 * -(-vocab_size // 32), np.uint8)
        self._address = self._bits.ctypes.data
        self._vocab_size = vocab_size
        self._num_tokens = 0

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, [vocab_size]: at least one, and an end only where the text is whole."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
        mask = np.unpackbits(self._bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if self._matcher.is_error() or not mask.any():
            raise self._failure()
        return mask

    def consume(self, token_id: int) -> None:
        """Goes on by one token, which must be allowed; InvalidParameter if the grammar gets too complex."""
        self._num_tokens += 1
        self._grammar.num_tokens += 1
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    def allows(self, token_id: int) -> bool:
        return self._matcher.validate_tokens([token_id]) == 1

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow any more."""
        return self._matcher.is_stopped()

    def _failure(self) -> InvalidParameter:
        reason = self._matcher.get_error() or "no token of the vocabulary can go on from here"
        return self._spec.refusal(f"the grammar failed after {self._num_tokens} tokens: {_shortened(reason)}")


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the latest; may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer):
        """Reads the vocabulary, which holds the interpreter for most of a second if it is large."""
        self._vocabulary = _Vocabulary(tokenizer)
        self._compiled: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        # One at a time: it may take seconds, and the engine needs the cores.
        self._compiling = threading.Lock()

    def compile(self, spec: GrammarSpec) -> Matcher:
        """A matcher at the start of the grammar.

        It takes microseconds for a grammar of late, milliseconds for a new one. Raises InvalidParameter for
        a grammar that is refused.
        """
        with self._lock:
            grammar = self._fresh(spec)
            if grammar is not None:
                self._compiled.move_to_end(spec)
        if grammar is None:
            with self._compiling:
                grammar = self._fresh(spec) or _on_a_large_stack(partial(self._vocabulary.compile, spec))
            with self._lock:
                self._compiled[spec] = grammar
                self._compiled.move_to_end(spec)
                while len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
        return grammar.matcher(spec)

    def is_compiled(self, spec: GrammarSpec) -> bool:
        """Whether `compile` will answer at once."""
        return self._fresh(spec) is not None

    def _fresh(self, spec: GrammarSpec) -> CompiledGrammar | None:
        grammar = self._compiled.get(spec)
        return None if grammar is None or grammar.num_tokens >= _WORN_TOKENS else grammar


class _Vocabulary:
    """The tokens as the parser wants them. Control tokens are no text; what ends a text is one of them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.tokens = tokenizer.all_token_bytes()
        ends = sorted(tokenizer.eos_token_ids)
        if not ends:  # the parser needs one; this one lies beyond the vocabulary and never comes
            ends = [len(self.tokens)]
            self.tokens.append(b"<|end|>")
        self.eos_token_id = ends[0]
        self.special_token_ids = sorted({*tokenizer.special_token_ids, *ends})
        self._parsed = llguidance.LLTokenizer(self, eos_token=ends)  # type: ignore[arg-type]

    def __call__(self, text: str) -> list[int]:
        """The tokens of text that the grammar leaves no choice about, as the model would spell it."""
        token_ids = self._tokenizer.encode(text, parse_special=False)
        if b"".join(self.tokens[token_id] for token_id in token_ids) == text.encode():
            return token_ids
        return self._parsed.greedy_tokenize(text)  # the tokenizer normalises, and a grammar does not

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        matcher = llguidance.LLMatcher(self._parsed, _source(spec), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise spec.refusal(f"the grammar is refused: {_shortened(matcher.get_error())}")
        grammar = CompiledGrammar(matcher, self._tokenizer.vocab_size)
        grammar.matcher(spec).allowed()  # some grammars fail only now
        return grammar


def _source(spec: GrammarSpec) -> str:
    """The grammar in the parser's own form."""
    if len(spec.source) > _SOURCE:
        raise spec.refusal(f"the grammar has {len(spec.source)} characters; expected at most {_SOURCE}")
    try:
        spec.source.encode()
    except UnicodeEncodeError as error:
        message = f"the grammar is not valid Unicode: half a surrogate pair at character {error.start}"
        raise spec.refusal(message) from None
    if spec.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(spec.source)
    if spec.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(spec.source)
    schema = '{"type": "object"}' if spec.kind == "json_object" else spec.source
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise spec.refusal(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise spec.refusal(f"the JSON schema is {_shortened(schema)}; expected an object")
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)


def _on_a_large_stack(work: Callable[[], T]) -> T:
    """What `work` returns, from a thread of its own."""
    with ThreadPoolExecutor(1, "grammar") as pool:
        with _stack_size:
            before = threading.stack_size(_STACK_BYTES)
            try:
                result = pool.submit(work)
            finally:
                threading.stack_size(before)
        return result.result()


def _shortened(message: str) -> str:
    message = message.removesuffix("<non-verbose/>").strip()
    return message if len(message) <= _MESSAGE else message[:_MESSAGE] + " …"
