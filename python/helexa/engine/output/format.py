"""Which output format a model was trained on, as its chat template and its vocabulary tell."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from helexa.engine.output.parser import OutputParser, ThinkMarkers
from helexa.engine.output.tags import FUNCTION, OPEN, PARAMETER, THINKING
from helexa.engine.output.tool_grammar import tool_grammar

ToolCallFormat = Literal["hermes", "qwen_xml"]

_THINK_MARKERS = tuple(ThinkMarkers(start, end) for start, end in THINKING)
# Formats that share the tag of a call and nothing else.
_OTHER_CALLS = ("<arg_key>", "<invoke", "<tool_calls>")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model marks its reasoning and its tool calls; None for what it does not do."""

    reasoning: ThinkMarkers | None = None
    tool_calls: ToolCallFormat | None = None
    is_reasoning_in_template: bool = False

    @classmethod
    def detect(cls, template: str | None, vocabulary: Container[str] = ()) -> Self:
        """The format that the source of a chat template shows, completed by the tokens of the vocabulary."""
        source = template or ""
        shown = next((pair for pair in _THINK_MARKERS if pair.end in source), None)
        known = (pair for pair in _THINK_MARKERS if pair.start in vocabulary and pair.end in vocabulary)
        return cls(shown or next(known, None), _tool_calls(source), shown is not None)

    @property
    def capabilities(self) -> dict[str, bool]:
        """What a model's card says: `tool_call` and `reasoning`."""
        return {"tool_call": self.tool_calls is not None, "reasoning": self.is_reasoning_in_template}

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        """Whether the model goes on with a block of reasoning that the end of the prompt has begun."""
        return self.reasoning is not None and prompt_tail.rstrip().endswith(self.reasoning.start)

    def parser(
        self, *, tools: Sequence[Mapping[str, Any]] = (), prompt_tail: str = "", parse_tools: bool = True
    ) -> OutputParser:
        """A parser for one answer. tools: as in OpenAI's chat API.   prompt_tail: how the prompt ends."""
        return OutputParser(
            self.reasoning,
            tools if parse_tools and self.tool_calls else (),
            is_in_reasoning=self.starts_in_reasoning(prompt_tail),
        )

    def tool_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        choice: str = "required",
        parallel: bool = True,
        response_schema: Mapping[str, Any] | None = None,
    ) -> tuple[Literal["lark"], str]:
        """The grammar, with its kind, that has the model call tools; see `tool_grammar.tool_grammar`."""
        assert self.tool_calls is not None
        source = tool_grammar(
            self.tool_calls, tools, choice=choice, parallel=parallel, response_schema=response_schema
        )
        return "lark", source


def _tool_calls(source: str) -> ToolCallFormat | None:
    if OPEN not in source or any(tag in source for tag in _OTHER_CALLS):
        return None
    return "qwen_xml" if FUNCTION + "=" in source and PARAMETER + "=" in source else "hermes"
