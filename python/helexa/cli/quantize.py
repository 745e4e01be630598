"""`helexa quantize`: a model in F32, F16 or BF16 as a quantized GGUF file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from helexa.errors import BadRequest
from helexa.weights.recipes import RECIPES, find_recipe
from helexa.weights.sources import resolve


def quantize(
    source: Annotated[str, typer.Argument(help="a GGUF file, a directory of safetensors, or a cached model")],
    target: Annotated[Path, typer.Argument(help="the GGUF file to write")],
    type: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "q4_k_m",
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a model, quantized, as a GGUF file, and print its path and size."""
    from helexa.weights.model_file import open_model  # brings torch
    from helexa.weights.quantize import write_quantized

    recipe = find_recipe(type)
    path = resolve(source)
    if target.is_dir() or (target.exists() and not force):
        raise BadRequest(f"{target} exists; --force replaces a file")
    if target.exists() and target.samefile(path):
        raise BadRequest(f"{target} is the source")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
        open_model(path) as file,
    ):
        task = bar.add_task(f"{recipe.name} of {path.name}", total=None)
        try:
            write_quantized(
                file, target, recipe, lambda done, total: bar.update(task, completed=done, total=total)
            )
        except OSError as error:
            raise BadRequest(f"{target} cannot be written: {error.strerror or error}") from error
        was_bytes = file.nbytes
    typer.echo(f"{target}: {target.stat().st_size} bytes from {was_bytes}")
