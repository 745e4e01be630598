"""A real engine around a model that recites: scheduler, caches, sampler and grammars are the real ones.

The model keeps the tokens it was given in the pages of the KV cache and reads the conversation back from
there at every step. It answers the last message of the user (or the last result of a tool) with the text that
the script has for it, whatever else the prompt says, and falls in behind tokens that it was made to write.
"""

from typing import Any

import torch

from helexa.engine import Engine, EngineOptions
from helexa.engine.chat_template import ChatTemplate
from helexa.engine.state_store import StateStore
from helexa.engine.tokenizer import Tokenizer
from helexa.models import ModelConfig
from support.tiny_config import tiny_config

SPECIAL = {
    "<|im_start|>": 3,
    "<|im_end|>": 3,
    "<think>": 4,
    "</think>": 4,
    "<tool_call>": 4,
    "</tool_call>": 4,
}
# Reasons unless told not to, shows tools as JSON, drops the reasoning of turns before the last question.
TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nYou may call:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'as <tool_call>{"name": …, "arguments": {…}}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content and loop.index0 > ns.last %}
{{- '<think>\\n' + message.reasoning_content.strip() + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content.strip() }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking is undefined or enable_thinking else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
"""
_HEADER = b"<|im_start|>assistant\n"
_USER = b"<|im_start|>user\n"


def tokenizer() -> Tokenizer:
    """All bytes, and the tokens of ChatML, reasoning and tool calls."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
    tokens = [characters[byte] for byte in range(256)] + list(SPECIAL)
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 256 + list(SPECIAL.values()),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        }
    )


class Reciter:
    """model(step) -> one-hot logits of the next token of the script."""

    def __init__(self, words: Tokenizer, script: dict[str, str], config: ModelConfig):
        self.config = config
        self.num_tokens = 0  # that it has computed
        self._words = words
        self._script = script

    def __call__(self, step: Any) -> torch.Tensor:
        k = step.k_cache[0]
        page_tokens = k.shape[2]
        self.num_tokens += len(step.token_ids)
        for token_id, slot in zip(step.token_ids.tolist(), step.slots.tolist(), strict=True):
            k[slot // page_tokens, 0, slot % page_tokens, 0] = token_id
        wanted = range(len(step.token_ids))[step.logits_rows]
        logits = torch.zeros(len(wanted), self.config.vocab_size)
        starts = step.query_start.tolist()
        for number, length in enumerate(step.kv_lengths.tolist()):
            positions = torch.arange(length)
            pages = step.page_table[number].long()[positions // page_tokens]
            history = k[pages, 0, positions % page_tokens, 0].long().tolist()
            for row in range(starts[number], starts[number + 1]):
                if row in wanted:
                    end = length - (starts[number + 1] - 1 - row)
                    logits[row - wanted.start, self._next(history[:end])] = 20.0
        return logits

    def hidden(self, step: Any) -> torch.Tensor:
        """[T, 2], something of the right shape."""
        return torch.stack([step.token_ids.float() + 1, step.positions.float()], 1)

    def _next(self, history: list[int]) -> int:
        text = b"".join(map(self._words.token_bytes, history))
        before, _, said = text.rpartition(_HEADER)
        asked = before.rpartition(_USER)[2].partition(b"<|im_end|>")[0].decode()
        thought, mark, answer = self._script.get(asked, "I do not know.").partition("</think>")
        planned = (thought + mark + answer).encode()
        if b"</think>" in said:  # which it wrote, or was made to write, or found in the prompt
            said = said.rpartition(b"</think>")[2]
            planned = b"\n\n" + (answer if mark else thought).lstrip().encode()
        said = said.removeprefix(b"<think>\n")
        rest = planned[len(said) :]
        if not rest:
            return self._words.special_tokens["<|im_end|>"]
        token = next((name for name in SPECIAL if rest.startswith(name.encode())), None)
        return self._words.encode(token)[0] if token else rest[0]


def scripted_engine(
    script: dict[str, str],
    *,
    template: str | None = TEMPLATE,
    max_context: int = 8192,
    store: StateStore | None = None,
    **options: Any,
) -> Engine:
    """An engine that answers what users say as `script` has it."""
    words = tokenizer()
    config = tiny_config(words.vocab_size, model_type="reciter", max_position_embeddings=max_context)
    options = {"kv_dtype": "float32", "kv_cache_tokens": 4 * max_context, "capture": False} | options
    return Engine(
        lambda: Reciter(words, script, config),  # type: ignore[arg-type,return-value]
        config,
        EngineOptions(**options),
        name="reciter",
        tokenizer=words,
        chat_template=ChatTemplate(template, eos_token="<|im_end|>") if template else None,
        store=store,
        model_key="reciter" if store else "",
    )
