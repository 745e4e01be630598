"""Configuration of the daemons: one TOML file into one nested frozen dataclass.

Precedence: command line, environment (`HELEXA_<SECTION>_<KEY>`, read here and nowhere else), file, defaults.
Anything the schema does not know is a `ConfigError` that names file and key.
"""

import dataclasses
import difflib
import logging
import os
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from helexa.errors import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """[log]"""

    level: str = "info"

    def __post_init__(self) -> None:
        if self.level.upper() not in logging.getLevelNamesMapping():
            raise ValueError(f"level {self.level!r} is unknown; use debug, info, warning or error")


def load_settings(
    schema: type[T],
    path: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """The effective configuration: defaults, then the file at `path`, then the environment, then `overrides`.

    schema: a frozen dataclass; its dataclass fields are the file's tables, lists of them arrays of tables.
    overrides: dotted key ("neuron.port") to value; None means not given. Raises ConfigError.
    """
    table = _read(path) if path else {}
    place = str(path) if path else "configuration"
    _reject_unknown(schema, table, (), place)
    for key, kind in _leaves(schema):
        name = "HELEXA_" + "_".join(key).upper()
        if name in (os.environ if environ is None else environ):
            text = (os.environ if environ is None else environ)[name]
            _assign(table, key, _from_text(kind, text, name), place)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _assign(table, tuple(dotted.split(".")), value, place)
    try:
        return msgspec.convert(table, schema)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{place}: {_readable(error, table)}") from None


def find_config(name: str, environ: Mapping[str, str] | None = None) -> Path | None:
    """The first existing file `name` in the user's configuration folder and /etc/helexa."""
    folders = (user_folder(environ), Path("/etc/helexa"))
    return next((path for folder in folders if (path := folder / name).is_file()), None)


def user_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The user's configuration folder, $XDG_CONFIG_HOME/helexa."""
    environment = os.environ if environ is None else environ
    return Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "helexa"


def private_folder(key: str, path: str) -> Path:
    """The folder that the setting `key` names, made for its owner alone if need be. Raises ConfigError."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: {error}") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {folder} cannot be written to")
    return folder


def log_settings(settings: Any) -> None:
    """Writes the configuration as one log line; fields with metadata {"secret": True} are masked."""
    flat = {".".join(key): _shown(value, is_secret) for key, value, is_secret in _values(settings)}
    logger.info("configuration", extra={"fields": flat})


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations: key to both values, None for none, secrets masked."""
    old, new = (
        {
            ".".join(key): (value, is_secret)
            for key, value, is_secret in _values(settings)
            if value not in (None, ())
        }
        for settings in (before, after)
    )
    return {
        key: (_shown(*old.get(key, (None, False))), _shown(*new.get(key, (None, False))))
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _reject_unknown(schema: Any, table: Any, key: tuple[str, ...], place: str) -> None:
    """Walks tables and arrays of tables; values of the wrong kind are left for the conversion to report."""
    if isinstance(table, list):
        for item in table:
            _reject_unknown(schema, item, key, place)
    if not isinstance(table, dict):
        return
    known = _fields(schema)
    for name, value in table.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{place}: unknown key {'.'.join((*key, name))!r}; {hint}")
        for inner in _tables_of(known[name]):
            _reject_unknown(inner, value, (*key, name), place)


def _fields(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _tables_of(kind: Any) -> Iterator[Any]:
    """The dataclasses that a value of `kind` is made of, through lists and options but not free-form maps."""
    if dataclasses.is_dataclass(kind):
        yield kind
    elif typing.get_origin(kind) in (list, tuple, typing.Union, types.UnionType):
        for inner in typing.get_args(kind):
            yield from _tables_of(inner)


def _leaves(schema: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that one environment variable can hold: scalars and lists of scalars."""
    for name, kind in _fields(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, (*key, name))
        elif typing.get_origin(kind) is not dict and not any(_tables_of(kind)):
            yield (*key, name), kind


def _from_text(kind: Any, text: str, name: str) -> Any:
    is_list = typing.get_origin(kind) in (list, tuple)
    value: Any = [item.strip() for item in text.split(",") if item.strip()] if is_list else text
    try:
        return msgspec.to_builtins(msgspec.convert(value, kind, strict=False))
    except msgspec.ValidationError as error:
        raise ConfigError(f"environment variable {name}={text!r}: {_lower(str(error))}") from None


def _assign(table: dict[str, Any], key: tuple[str, ...], value: Any, place: str) -> None:
    for name in key[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {name!r} must be a table, as in [{name}]")
    table[key[-1]] = value


def _readable(error: msgspec.ValidationError, table: Mapping[str, Any]) -> str:
    """'Expected `int`, got `str` - at `$.a.b`' as 'a.b: expected int, got str'."""
    text, _, path = str(error).partition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    return f"{key}: {_lower(text)}" if key else _lower(text)


def _lower(text: str) -> str:
    text = text.replace("`", "").replace("missing required field ", "missing key ")
    return text[:1].lower() + text[1:]


def _shown(value: Any, is_secret: bool) -> Any:
    return "***" if is_secret and value else value


def _values(settings: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Key, value and whether it is secret, of every leaf; entries of lists go by their name or id."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _values(value, (*key, field.name))
        elif isinstance(value, list | tuple) and any(dataclasses.is_dataclass(item) for item in value):
            for index, item in enumerate(value):
                name = getattr(item, "name", None) or getattr(item, "id", None) or index
                yield from _values(item, (*key, field.name, str(name)))
        else:
            yield (*key, field.name), value, bool(field.metadata.get("secret"))
