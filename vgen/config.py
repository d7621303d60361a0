"""Configs become objects: a dotted path plus a signature check, and every key must be read.

A *spec* is a dict with a "target" ("package.module:Name") and keyword arguments.  Arguments that are specs are built
first, so a config is a tree of constructor calls.  There is no registry: the target is imported when it is built.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import typing
from collections.abc import Mapping
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

_TOWER = BeartypeConf(is_pep484_tower=True)  # an int is a float


class UserError(Exception):
    """A mistake of the person at the keyboard; `vgen.main` prints it as one sentence and exits with code 2."""


class ConfigError(UserError, ValueError):
    """A config that cannot be built; the message names the key, what was got, and what is accepted."""


def brief(error: BaseException, length: int = 200) -> str:
    """What an error of another library says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def resolve(target: str):
    """Import "package.module:Name" (or "...:Class.method") and return the object; ConfigError if there is none."""
    module_name, _, attribute = target.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"target {target!r} must look like 'package.module:Name'")
    try:
        value = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a dependency of the module is missing: that is the error to show
        raise ConfigError(f"target {target!r}: there is no module {error.name!r}") from None
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [name for name in dir(value) if not name.startswith("_")]
            raise ConfigError(f"target {target!r}: {module_name} has no {part!r}{_nearest(part, names)}")
        value = getattr(value, part)
    return value


def build(spec: Mapping[str, Any], where: str = "config", **extra) -> Any:
    """Build the object that `spec` describes.

    spec: {"target": "module:Name", **kwargs}; values that are specs themselves, also inside lists, tuples and dicts,
      are built first.  where: the place of the spec in the config, for messages.
    extra: keyword arguments added by the caller (they win over nothing: a key given twice is an error).
    Raises ConfigError on an unknown key (naming the nearest valid one), a missing one, a value of the wrong type, or
    one that the object itself refuses with a ValueError.
    """
    spec = to_dict(spec)
    if "target" not in spec:
        raise ConfigError(f"{where}: a spec needs a 'target' (\"module:Name\"), got only {sorted(spec)}")
    target = spec.pop("target")
    function = resolve(target)
    twice = sorted(set(spec) & set(extra))
    if twice:
        raise ConfigError(f"{where}.{twice[0]}: is set by the program, remove it from the config")
    kwargs = {key: _build_value(value, f"{where}.{key}") for key, value in spec.items()} | extra
    return call(function, kwargs, where, target)


def call(function, kwargs: dict[str, Any], where: str, name: str | None = None):
    """`function(**kwargs)` after checking the names and types of the arguments against its signature.

    A ValueError or OSError of the function becomes a ConfigError that says which part of the config it came from.
    """
    kwargs = arguments(function, kwargs, where, name)
    try:
        return function(**kwargs)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error


def arguments(function, kwargs: Mapping[str, Any], where: str, name: str | None = None) -> dict[str, Any]:
    """The keyword arguments that `call` would pass, checked; nothing is called."""
    name = name or getattr(function, "__name__", str(function))
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if inspect.isclass(function) and hasattr(function, "apply") and hasattr(function, "init"):
        accepted = [key for key in accepted if key not in ("parent", "name")]  # linen's own fields
    hints = _hints(function)
    checked = {}
    for key, value in kwargs.items():
        if key not in accepted and not open_ended:
            raise ConfigError(f"{where}.{key}: {name} does not take it{_nearest(key, accepted)}")
        checked[key] = _checked(value, hints.get(key, Any), f"{where}.{key}")
    missing = [key for key in accepted if parameters[key].default is inspect.Parameter.empty and key not in checked]
    if missing:
        raise ConfigError(f"{where}: {name} also needs {', '.join(missing)}")
    return checked


def to_dict(config) -> Any:
    """A ConfigDict (or any mapping) as plain dicts, lists and tuples, all the way down."""
    if hasattr(config, "items"):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(to_dict(value) for value in config)
    return config


def to_json(config) -> str:
    """The config as canonical JSON, for the record in a workdir."""
    return json.dumps(to_dict(config), indent=1, sort_keys=True, default=str)


def diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "a.b: old -> new" for every leaf in which two (JSON-like) configs differ."""
    lines = []
    for key in sorted(set(old) | set(new)):
        path, a, b = f"{prefix}{key}", old.get(key, "(unset)"), new.get(key, "(unset)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += diff(a, b, path + ".")
        elif a != b:
            lines.append(f"{path}: {a!r} -> {b!r}")
    return lines


def _build_value(value, where):
    if isinstance(value, dict):
        if "target" in value:
            return build(value, where)
        return {key: _build_value(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_build_value(item, f"{where}[{i}]") for i, item in enumerate(value))
    return value


def _hints(function) -> dict[str, Any]:
    owner = function.__init__ if inspect.isclass(function) and not dataclasses.is_dataclass(function) else function
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError):
        return {}


def _checked(value, hint, where):
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        value = tuple(value)
    if isinstance(value, bool) and hint in (int, float) or not is_bearable(value, hint, conf=_TOWER):
        wanted = getattr(hint, "__name__", None) or str(hint)
        raise ConfigError(f"{where}: expected {wanted}, got {value!r} ({type(value).__name__})")
    return value


def _nearest(key: str, accepted: list[str]) -> str:
    close = difflib.get_close_matches(key, accepted, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it takes {', '.join(accepted)}" if accepted else "; it takes nothing"
