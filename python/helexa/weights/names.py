"""Names of models on the HuggingFace hub, and which file of a repository a name means."""

import difflib
import re
from collections.abc import Sequence

from helexa.errors import SourceError
from helexa.weights.recipes import is_recipe

_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?::([\w][\w./ -]*))?")
_QUANTIZATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|FP16|F32|MXFP4\w*))$", re.IGNORECASE
)
_PART = re.compile(r"-\d{5}-of-(\d{5})$")
# What is taken if a name does not say: small enough for most machines and good, then what is nearest to it.
_PREFERRED = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q4_0", "Q4_1", "Q5_0", "BF16", "F16", "F32")


# What a checkpoint has besides its weights and config.json.
_CHECKPOINT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "model.safetensors.index.json",
    "1_Pooling/config.json",
)
CONFIG = "config.json"
CHECKPOINT = "safetensors"  # what a name may want instead of a quantization


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form ORG/REPO or ORG/REPO:QUANT-OR-FILE."""
    match = _HUB_NAME.fullmatch(name)
    return match is not None and ".." not in name


def split_hub_name(name: str) -> tuple[str, str | None]:
    """Repository, and quantization or file if the name has one."""
    repo, _, wanted = name.partition(":")
    return repo, wanted or None


def quantization_of(file: str) -> str | None:
    """The quantization that a file's name gives, in capitals: Q4_K_M, UD-Q4_K_XL, BF16."""
    match = _QUANTIZATION.search(_PART.sub("", file.removesuffix(".gguf")))
    return match[1].upper() if match else None


def named_recipe(name: str) -> str | None:
    """The recipe by which ORG/REPO:QUANT wants a model, where QUANT is one."""
    wanted = split_hub_name(name)[1] if is_hub_name(name) else None
    return wanted if wanted is not None and is_recipe(wanted) else None


def checkpoint_files(files: Sequence[str], wanted: str | None) -> list[str]:
    """The files of a checkpoint, config.json last; none if a GGUF file is wanted or there is none.

    A quantization means the GGUF file of that name; where there is none at all, the checkpoint, which can be
    quantized while it loads.
    """
    has_gguf = any(file.endswith(".gguf") for file in files)
    may_be = wanted is None or is_recipe(wanted)
    if wanted != CHECKPOINT and (has_gguf or not may_be):
        return []
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    whole = [file for file in weights if file == "model.safetensors" or _PART.search(file[:-12])]
    if not weights or CONFIG not in files:
        return []
    return [*(whole or weights), *(file for file in _CHECKPOINT_FILES if file in files), CONFIG]


def pick(repo: str, files: Sequence[str], wanted: str | None) -> str:
    """The one of a repository's files that is meant: a file name, or a quantization in any case.

    Raises SourceError, with the nearest name there is, if none or several fit.
    """
    models = sorted(file for file in files if file.endswith(".gguf") and "mmproj" not in file.lower())
    if not models:
        raise SourceError(f"{repo} has no GGUF file; look for a repository whose name ends in GGUF")
    by_quantization: dict[str, list[str]] = {}
    for file in models:
        by_quantization.setdefault(quantization_of(file) or file, []).append(file)
    if wanted is None:
        found = models if len(models) == 1 else next(filter(None, map(by_quantization.get, _PREFERRED)), [])
    else:
        lower = wanted.lower().removesuffix(".gguf")
        found = [file for file in models if lower in (_stem(file), _stem(file).rpartition("/")[2])]
        found = found or by_quantization.get(wanted.upper(), [])
    if not found:
        raise SourceError(_no_such(repo, list(by_quantization), wanted))
    if any(_PART.search(file.removesuffix(".gguf")) for file in found):
        raise SourceError(f"{found[0]} of {repo} is split over several files; choose one that is not")
    if len(found) > 1:
        raise SourceError(f"'{wanted}' of {repo} may be {' or '.join(found)}; say which: {repo}:{found[0]}")
    return found[0]


def _stem(file: str) -> str:
    return file.lower().removesuffix(".gguf")


def _no_such(repo: str, choices: Sequence[str], wanted: str | None) -> str:
    known = f"it has {', '.join(choices)}"
    if wanted is None:
        return f"{repo} has several files; say which, as in {repo}:{choices[0]}; {known}"
    spelled = {choice.upper(): choice for choice in choices}
    near = difflib.get_close_matches(wanted.upper(), spelled, 1, 0.4)
    guess = f"did you mean {repo}:{spelled[near[0]]}? " if near else ""
    return f"{repo} has no '{wanted}'; {guess}{known}"
