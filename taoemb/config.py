"""Strict configuration: dataclasses to YAML and back, and nothing that a dataclass does not declare.

The config dataclasses live beside their owners; this module knows none of them and imports no torch. A key is dotted
(``optimizer.lr``). Every error names the key, the value given and what is allowed. YAML is read by the rules of
YAML 1.2: ``1e-3`` is a number, ``yes`` is text, and a key given twice is refused.
"""

from __future__ import annotations

import ast
import collections.abc
import difflib
import inspect
import itertools
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from taoemb.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class ConfigError(ValueError):
    """A configuration cannot be used; ``key`` is the dotted key at fault, or empty."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key


@dataclass(frozen=True)
class Setting:
    """One settable key, as `describe` lists it; ``default`` is ``dataclasses.MISSING`` where a value is required."""

    key: str
    type: str
    default: Any
    doc: str


def load_config(cls: type[T], path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> T:
    """Read a config from a YAML file (all defaults where ``path`` is None) and apply overrides, the later one winning.

    Args:
        cls: the dataclass to build.
        path: a YAML file with a mapping at its top level, or None.
        overrides: texts ``a.b=value``. The value is taken as it is where the key holds text, else read as YAML.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, unreadable YAML, or a failed check of the dataclass.
        FileNotFoundError: there is no such file.
    """
    mapping = {} if path is None else _read_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    for override in overrides:
        _apply_override(mapping, override)
    return from_dict(cls, mapping)


def save_config(config: DataclassInstance, path: str | os.PathLike[str]) -> None:
    """Write every value as YAML beside ``path`` and rename it there; `load_config` reads back an equal config."""
    write_text(Path(path), yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def from_dict(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Build ``cls`` from nested mappings; a key that is not given keeps its default. Raises ConfigError."""
    return typing.cast("T", _build(mapping, cls, "", None, cls))


def to_dict(config: DataclassInstance) -> dict[str, Any]:
    """The values as nested mappings, lists and scalars that YAML and JSON can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config) if field.init}


def diff(a: DataclassInstance, b: DataclassInstance) -> list[str]:
    """The dotted keys whose values differ between two configs, sorted."""
    return sorted(_differences(to_dict(a), to_dict(b), ""))


def describe(cls: type[DataclassInstance]) -> Iterator[Setting]:
    """Every settable key in order of declaration, documented by the text literal below its field."""
    yield from _describe(cls, "", None)


# --- mappings to dataclasses ------------------------------------------------------------------------------------------


class _Override(str):
    """The text of an override: its type is known only once its field is."""

    __slots__ = ()


def _build(value: Any, cls: type[Any], key: str, default: Any, root: type[Any]) -> Any:
    """``default`` is what the parent declares: the keys that are not given come from it, not from ``cls``."""
    if not isinstance(value, Mapping):
        raise _mismatch(value, cls, key)
    hints = typing.get_type_hints(cls)
    settable = {field.name: field for field in fields(cls) if field.init}
    for name in value:
        if name not in settable:
            raise _unknown_key(_join(key, str(name)), key, list(settable), root)
    arguments = {}
    for name, field in settable.items():
        inherited = getattr(default, name) if isinstance(default, cls) else _default(field)
        if name in value:
            arguments[name] = _coerce(value[name], hints[name], _join(key, name), inherited, root)
        elif inherited is MISSING:
            raise ConfigError(_join(key, name), f"is required; give {_type_name(hints[name])}")
        else:
            arguments[name] = inherited
    try:
        return cls(**arguments)
    except ValueError as error:  # a check in __post_init__
        raise ConfigError(key, str(error)) from error


def _coerce(value: Any, hint: Any, key: str, default: Any, root: type[Any]) -> Any:
    if is_dataclass(hint):
        return _build(_parsed(value, key), typing.cast("type[Any]", hint), key, default, root)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, hint, key, default, root)
    if origin is Literal:
        given = (str(value), _parsed(value, key)) if isinstance(value, _Override) else (value,)
        for allowed in typing.get_args(hint):
            if any(allowed == one and type(allowed) is type(one) for one in given):
                return allowed
        raise _mismatch(value, hint, key)
    if hint in (str, Path):
        if not isinstance(value, (str, Path) if hint is Path else str):
            raise _mismatch(value, hint, key)
        return hint(value)
    value = _parsed(value, key)
    if origin in (list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping):
        return _coerce_container(value, hint, key, root)
    if hint is types.NoneType and value is None:
        return None
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint in (bool, int) and type(value) is hint:
        return value
    if hint in (bool, int, float, types.NoneType):
        raise _mismatch(value, hint, key)
    raise TypeError(f"{key}: a config field cannot have the type {_type_name(hint)}")


def _coerce_union(value: Any, hint: Any, key: str, default: Any, root: type[Any]) -> Any:
    """The first member that takes the value; a nested dataclass's own errors come through, as they are more precise."""
    members = typing.get_args(hint)
    if types.NoneType in members and (value is None or (isinstance(value, _Override) and _parsed(value, key) is None)):
        return None
    for member in members:
        if is_dataclass(member) and isinstance(_parsed(value, key), Mapping):
            return _coerce(value, member, key, default, root)
        try:
            return _coerce(value, member, key, default, root)
        except ConfigError:
            continue
    raise _mismatch(value, hint, key)


def _coerce_container(value: Any, hint: Any, key: str, root: type[Any]) -> Any:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise _mismatch(value, hint, key)
        return {name: _coerce(item, members[1], _join(key, name), MISSING, root) for name, item in value.items()}
    if not isinstance(value, (list, tuple)):
        raise _mismatch(value, hint, key)
    if origin is tuple and not (len(members) == 2 and members[1] is Ellipsis):
        if len(value) != len(members):
            raise _mismatch(value, hint, key)
        hints: Sequence[Any] = members
    else:
        hints = [members[0]] * len(value)
    pairs = enumerate(zip(value, hints, strict=True))
    items = [_coerce(item, member, f"{key}[{i}]", MISSING, root) for i, (item, member) in pairs]
    return items if origin is list else tuple(items)


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ConfigError("", f"cannot read the override {override!r}; write KEY=VALUE, for example stage2.steps=200")
    for depth, name in enumerate(names[:-1], start=1):
        inner = mapping.get(name)
        if isinstance(inner, _Override):
            inner = _parsed(inner, name)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(".".join(names[:depth]), f"is {inner!r}, so the override {override!r} has nothing to set")
        mapping[name] = inner
        mapping = inner
    mapping[names[-1]] = _Override(text)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# --- errors -----------------------------------------------------------------------------------------------------------


def _mismatch(value: Any, hint: Any, key: str) -> ConfigError:
    given = f"{value!r} ({type(value).__name__})" if not isinstance(value, _Override) else f"{str(value)!r}"
    return ConfigError(key, f"got {given}; allowed: {_type_name(hint)}")


def _unknown_key(key: str, level: str, names: list[str], root: type[Any]) -> ConfigError:
    near = _nearest(key, [setting.key for setting in _describe(root, "", None)])
    hint = f"did you mean {near}? " if near else ""
    where = f"keys of {level}" if level else "keys"
    return ConfigError(key, f"unknown key; {hint}{where}: {', '.join(sorted(names))}")


def _nearest(key: str, known: list[str]) -> str | None:
    """The closest dotted key: spelled alike as a whole, or with a last part spelled alike on another level."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 1.0 else None


def _type_name(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return f"a mapping with the keys {', '.join(field.name for field in fields(hint) if field.init)}"
    if origin is Literal:
        return " | ".join("null" if member is None else repr(member) for member in members)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(member) for member in members)
    if origin is not None:
        inner = ", ".join("..." if member is Ellipsis else _type_name(member) for member in members)
        return f"{origin.__name__}[{inner}]"
    return "null" if hint is types.NoneType else str(getattr(hint, "__name__", hint))


# --- dataclasses to mappings and descriptions -------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _differences(a: Any, b: Any, key: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {**a, **b}:
            yield from _differences(a.get(name, MISSING), b.get(name, MISSING), _join(key, name))
    elif a != b:
        yield key


def _describe(cls: type[Any], prefix: str, default: Any) -> Iterator[Setting]:
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    for field in fields(cls):
        if not field.init:
            continue
        hint, key = hints[field.name], _join(prefix, field.name)
        inherited = getattr(default, field.name) if isinstance(default, cls) else _default(field)
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        nested = [member for member in members if is_dataclass(member)]
        if nested != [hint]:
            yield Setting(key, _type_name(hint), inherited, docs.get(field.name, ""))
        for member in nested:
            yield from _describe(typing.cast("type[Any]", member), key, inherited)


def _field_docs(cls: type[Any]) -> dict[str, str]:
    """The text literals below the fields, which Python itself throws away; none where the source is not at hand."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not is_dataclass(owner):
            continue
        try:
            definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except OSError:
            continue
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                literal = below.value
                if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                    docs[field.target.id] = " ".join(literal.value.split())
    return docs


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Scalars by the core schema of YAML 1.2, but 010 is text; a key given twice is an error."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that any reader, ours or one of YAML 1.1, would take for something else."""


_CORE_SCHEMA = (  # tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", [*"-+."]),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_SCHEMA:
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if not isinstance(name, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is not text", key_node.start_mark)
        if name in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key_node.start_mark)
        mapping[name] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In double quotes, hence escaped, where it holds a rarer line break of YAML, which a reader would fold away."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError("", f"cannot read {source} as YAML: {error}") from error


def _parsed(value: Any, key: str) -> Any:
    return _parse_yaml(value, f"the override of {key}") if isinstance(value, _Override) else value


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    mapping = _parse_yaml(text, source)
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError("", f"{source} holds {type(mapping).__name__} at its top level; allowed: a mapping of keys")
    return mapping
