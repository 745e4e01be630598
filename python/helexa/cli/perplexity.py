"""`helexa perplexity`: how well a model predicts a text, and how far it is from a reference model.

Follows the method of llama.cpp's `llama-perplexity`, so that the numbers compare: the text is cut into chunks
of `context` tokens, each led by the beginning-of-sequence token if the tokenizer adds one; the tokens of each
second half are scored, each from all that precede it in its chunk.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from helexa.cli.local import load_engine, local_model
from helexa.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np

ROWS = 64  # rows of logits turned into float64 at once: bounds the extra memory with large vocabularies


@dataclass(frozen=True)
class Evaluation:
    """Perplexity with its standard error over `scored_tokens`; the last two only against a reference."""

    perplexity: float
    standard_error: float
    chunks: int
    scored_tokens: int
    mean_kl_divergence: float | None = None
    top1_agreement: float | None = None


def cut(tokenizer: Any, text: str, context: int) -> list[list[int]]:
    """`text` as whole chunks of `context` token ids; the rest at its end is left out.

    The text is tokenized with the special tokens that the model's tokenizer adds; where those include a
    beginning-of-sequence token, it takes the first place of every chunk. Raises BadRequest for a short text.
    """
    token_ids = tokenizer.encode(text, add_special=True)
    begin = tokenizer.bos_token_id
    adds_begin = begin is not None and tokenizer.encode("", add_special=True)[:1] == [begin]
    chunks = [token_ids[at : at + context] for at in range(0, len(token_ids) - context + 1, context)]
    if not chunks:
        raise BadRequest(f"the text has {len(token_ids)} tokens; one chunk needs {context}: lower --context")
    return [[begin, *chunk[1:]] for chunk in chunks] if adds_begin else chunks


def log_probabilities(logits: "np.ndarray") -> "np.ndarray":
    """Natural logarithms of the softmax of each row, in float64."""
    import numpy as np

    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def evaluate(
    engine: Any,
    chunks: Sequence[Sequence[int]],
    reference: Any = None,
    progress: Callable[[float], None] = lambda perplexity: None,
) -> Evaluation:
    """Scores the second half of every chunk; `progress` is called with the perplexity so far after each.

    engine, reference: have `logits(token_ids) -> float32 [T, V]`. KL divergence is that of the model from the
    reference, in nats per token; agreement is the share of tokens where both find the same one most likely.
    """
    import numpy as np

    losses: list[np.ndarray] = []
    divergences: list[np.ndarray] = []
    agreements: list[np.ndarray] = []
    for chunk in chunks:
        first = len(chunk) // 2
        targets = np.asarray(chunk[first + 1 :])
        logits = engine.logits(chunk)[first:-1]  # [scored, V]
        expected = reference.logits(chunk)[first:-1] if reference is not None else None
        for at in range(0, len(targets), ROWS):
            own = log_probabilities(logits[at : at + ROWS])
            losses.append(-own[np.arange(len(own)), targets[at : at + ROWS]])
            if expected is not None:
                other = log_probabilities(expected[at : at + ROWS])
                divergences.append((np.exp(other) * (other - own)).sum(axis=-1))
                agreements.append(own.argmax(axis=-1) == other.argmax(axis=-1))
        progress(math.exp(np.concatenate(losses).mean()))
    loss = np.concatenate(losses)
    perplexity = math.exp(loss.mean())
    return Evaluation(
        perplexity=perplexity,
        standard_error=float(perplexity * loss.std() / math.sqrt(max(len(loss) - 1, 1))),
        chunks=len(chunks),
        scored_tokens=len(loss),
        mean_kl_divergence=float(np.concatenate(divergences).mean()) if divergences else None,
        top1_agreement=float(np.concatenate(agreements).mean()) if agreements else None,
    )


def perplexity(
    model: Annotated[str, typer.Argument(help="a path, or a name that `helexa models` lists")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to predict")],
    context: Annotated[int, typer.Option(min=4, help="tokens per chunk")] = 512,
    reference: Annotated[
        str | None, typer.Option(help="a model with the same vocabulary to compare with")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; all that this process may use")] = None,
    kv_dtype: Annotated[
        str, typer.Option(help="of keys and values; float16 is also llama.cpp's default")
    ] = "float16",
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ... or auto")] = "cpu",
    reference_device: Annotated[str, typer.Option(help="where the reference runs")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Measure the perplexity of a text, and the divergence from a reference model."""
    try:
        content = text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{text} is not UTF-8: {error.reason} at byte {error.start}") from None
    load = partial(load_engine, context=context, threads=threads, kv_dtype=kv_dtype)
    engine = load(local_model(model), device=device)
    other = None
    try:
        if engine.tokenizer is None:
            raise BadRequest(f"{model} has no vocabulary, so it cannot read a text")
        chunks = cut(engine.tokenizer, content, context)
        if reference is not None:
            other = load(local_model(reference), device=reference_device)
            _check_same_vocabulary(engine, other, chunks[0])
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("scoring", total=len(chunks))
            result = evaluate(
                engine,
                chunks,
                other,
                lambda so_far: bar.update(task, advance=1, description=f"perplexity so far {so_far:.4f}"),
            )
    finally:
        engine.close()
        if other is not None:
            other.close()
    _show(result, context, as_json)


def _check_same_vocabulary(engine: Any, reference: Any, sample: Sequence[int]) -> None:
    own, other = engine.config.vocab_size, reference.config.vocab_size
    if own != other:
        raise BadRequest(f"the vocabularies differ: {own} tokens here, {other} in the reference")
    if reference.tokenizer is not None and reference.tokenizer.decode(sample) != engine.tokenizer.decode(
        sample
    ):
        raise BadRequest(
            "the vocabularies differ: the same token ids stand for different text in the reference"
        )


def _show(result: Evaluation, context: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"context": context, **asdict(result)}))
        return
    console = Console(highlight=False)
    console.print(
        f"perplexity {result.perplexity:.4f} ± {result.standard_error:.4f} "
        f"({result.scored_tokens} tokens of {result.chunks} chunks of {context})"
    )
    if result.mean_kl_divergence is not None and result.top1_agreement is not None:
        console.print(f"mean KL divergence from the reference {result.mean_kl_divergence:.6f} nats per token")
        console.print(f"same most likely token {100 * result.top1_agreement:.2f} %")
