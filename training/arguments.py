"""Settings from dataclasses: defaults, then a YAML file, then `--section.key value` on the command line.

    config = parse(PretrainConfig)    # reads sys.argv

Lists are written with commas or as several words: `--folds fold1,fold2` or `--folds fold1 fold2`.

A field that is itself a dataclass is a section. Types are checked for every value. An unknown key is an error that
names the nearest known one: a misspelt setting that silently keeps its default would cost a training run. A field's
`metadata["help"]` is its line in `--help`.
"""

import argparse
import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class Setting(NamedTuple):
    """A key of a configuration.

    Attributes:
        key: Its dotted name.
        type: The annotation of its field.
        default: Its value if it is not given; MISSING if it is required.
        help: Its line in `--help`.
        metadata: The metadata of its field.
    """

    key: str
    type: Any
    default: Any
    help: str
    metadata: dict[str, Any]


def settings(config_class: type, prefix: str = "", defaults: Any = None) -> Iterator[Setting]:
    """Yield all keys of a configuration class; the keys of its sections have dotted names.

    Args:
        config_class: The class.
        prefix: Put before all names.
        defaults: An instance whose values replace the class's defaults.
    """
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        default, hint = _default(item, defaults), hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from settings(hint, f"{prefix}{item.name}.", None if default is MISSING else default)
        else:
            yield Setting(prefix + item.name, hint, default, item.metadata.get("help", ""), dict(item.metadata))


def parse(config_class: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Return the configuration that the command line describes; `--config FILE` names a YAML file to start from.

    A wrong key or value ends the program with a message, as in argparse.

    Args:
        config_class: The class.
        argv: Arguments without the program's name; `None` for those of the command line.
        description: The text at the top of `--help`.
    """
    known = {setting.key: setting for setting in settings(config_class)}
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--key value] [--section.key value] ...",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below, sections nested.")
    groups: dict[str, Any] = {"": parser}
    for setting in known.values():
        section = setting.key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        if setting.default is MISSING:
            state = "required"
        else:
            default = "null" if setting.default is None else setting.default
            state = f"default: {setting.metadata.get('default', default)}"
        # A section's main setting also has the section's name: `--data X` for `--data.source X`.
        names = [f"--{setting.key}"] + ([f"--{section}"] if setting.metadata.get("stands_for_section") else [])
        groups[section].add_argument(
            *names,
            dest=setting.key,
            nargs="+" if _is_list(setting.type) else None,
            metavar=_name(setting.type),
            default=argparse.SUPPRESS,
            help=f"{setting.help} [{state}]".strip().replace("%", "%%"),
        )
    given, unknown = parser.parse_known_args(argv)
    try:
        if unknown:
            name = unknown[0].split("=")[0]
            raise ValueError(f"unknown argument {name!r}{_nearest(name.lstrip('-'), known)}")
        values = read_yaml(given.config, config_class) if given.config else {}
        for key, text in vars(given).items():
            if key != "config":
                value = _joined(text) if isinstance(text, list) else text
                values[key] = convert(value, known[key].type, f"--{key}")
        return build(config_class, values)
    except ValueError as error:
        parser.error(str(error))


def read_yaml(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read a YAML file. Return its values by their dotted keys, checked and converted.

    Raises:
        ValueError: If the file cannot be read, a key is unknown or a value has the wrong type. The message names it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    known = {setting.key: setting for setting in settings(config_class)}
    sections = {key[:end] for key in known for end in range(len(key)) if key[end] == "."}

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict):
            where = f"section {prefix.rstrip('.')!r}" if prefix else "the file"
            raise ValueError(f"{path}: {where} must hold keys and values, not {node!r}")
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in sections:
                yield from walk({} if value is None else value, f"{key}.")
            elif key in known:
                yield key, convert(value, known[key].type, f"{path}: {key}")
            else:
                raise ValueError(f"{path}: unknown key {key!r}{_nearest(key, known)}")

    return dict(walk({} if content is None else content, ""))


def build(config_class: type[T], values: dict[str, Any]) -> T:
    """Make an instance from values by their dotted keys. The others keep their defaults.

    Raises:
        ValueError: If a required key is missing, or a check of the class fails.
    """

    def make(cls: type, prefix: str, defaults: Any) -> Any:
        hints, arguments = get_type_hints(cls), {}
        for item in fields(cls):
            key, default = prefix + item.name, _default(item, defaults)
            if is_dataclass(hints[item.name]):
                arguments[item.name] = make(hints[item.name], f"{key}.", None if default is MISSING else default)
            elif key in values:
                arguments[item.name] = values[key]
            elif default is MISSING:
                raise ValueError(f"{key} is not set: give --{key} or put it into the YAML file")
            else:
                arguments[item.name] = default
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{prefix.rstrip('.')}: {error}" if prefix else str(error)) from error

    return make(config_class, "", None)


def changed_default(config_class: type, name: str, default: Any) -> Any:
    """Return the field `name` of another configuration class with another default."""
    return field(default=default, metadata=_field_of(config_class, name).metadata)


def same_field(config_class: type, name: str) -> Any:
    """Return the field `name` of another configuration class with its default and help."""
    item = _field_of(config_class, name)
    if item.default_factory is not MISSING:
        return field(default_factory=item.default_factory, metadata=item.metadata)
    return field(default=item.default, metadata=item.metadata)


def _field_of(config_class: type, name: str) -> Field:
    (item,) = (item for item in fields(config_class) if item.name == name)
    return item


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a configuration by their dotted keys."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        flat |= flatten(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return flat


def to_yaml(config: Any) -> str:
    """Return the text of a file from which `--config` reads the same configuration. It omits values of `None`."""
    nested: dict[str, Any] = {}
    for key, value in flatten(config).items():
        if value is not None:
            *path, name = key.split(".")
            node = nested
            for part in path:
                node = node.setdefault(part, {})
            node[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def with_optional_fields(source: type) -> Callable[[type[T]], type[T]]:
    """Return a class decorator that adds the fields of `source`, all of them `None` by default.

    Use it for a section that lists changes to an object with its own values. Each field's help is its
    description in the docstring of `source` (section "Args").

        @dataclass
        @with_optional_fields(SSLAMConfig)
        class ModelOverrides: ...
    """
    described = dict(
        re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(source.__doc__ or ""), re.MULTILINE)
    )
    hints = inspect.get_annotations(source, eval_str=True)

    def decorate(section: type[T]) -> type[T]:
        section.__annotations__ = {key: hint | None for key, hint in hints.items()}
        for key in hints:
            text = " ".join(described.get(key, "").split())
            default = f"as it was, a new one {getattr(source, key)}"
            setattr(section, key, field(default=None, metadata={"help": text, "default": default}))
        return section

    return decorate


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a value from YAML, or a text from the command line, to the type of an annotation.

    Args:
        value: The value.
        hint: The annotation.
        where: Where the value comes from, for the error message.

    Raises:
        ValueError: If the value does not have the type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return convert(value, inner, where)
    if origin is Literal:
        # YAML 1.1 reads a bare `no` as False.
        word = "no" if value is False else value
        if word in arguments:
            return word
    elif origin in (list, tuple):
        if isinstance(value, str):
            value = yaml.safe_load(value) if value.lstrip().startswith("[") else value.split(",")
        if isinstance(value, (list, tuple)) and (origin is list or len(value) == len(arguments)):
            hints = arguments if origin is tuple else arguments * len(value)
            return origin(convert(part, part_hint, where) for part, part_hint in zip(value, hints, strict=True))
    elif hint is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is not None:
            return truth
    elif hint in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        # YAML 1.1 requires a dot in a number, so PyYAML reads 5e-4 as a text.
        try:
            number = hint(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    elif (hint in (str, Path) and isinstance(value, (str, Path))) or (hint is str and isinstance(value, (int, float))):
        return hint(value)
    raise ValueError(f"{where} takes {_name(hint)}, not {value!r}")


def _default(item: Field, defaults: Any) -> Any:
    """Return a field's value if it is not given; MISSING if it is required."""
    if defaults is not None:
        return getattr(defaults, item.name)
    return item.default if item.default_factory is MISSING else item.default_factory()


def _name(hint: Any) -> str:
    """Return a type's name for `--help` and errors."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return "|".join("null" if argument is type(None) else _name(argument) for argument in arguments)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin is list:
        return f"[{_name(arguments[0])},...]"
    if origin is tuple:
        return "[" + ",".join(map(_name, arguments)) + "]"
    return hint.__name__.lower()


def _is_list(hint: Any) -> bool:
    """Return whether a type is a list or a pair, or one of these or `None`."""
    return get_origin(hint) in (list, tuple) or any(
        get_origin(part) in (list, tuple) for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType)
    )


def _joined(words: Sequence[str]) -> str:
    """Join the words of a list with commas. A list that begins with `[`, as in YAML, is joined with spaces."""
    if words[0].lstrip().startswith("["):
        return " ".join(words)
    return words[0] if len(words) == 1 else ",".join(word.strip(",") for word in words if word != ",")


def _nearest(key: str, known: dict[str, Setting]) -> str:
    """Suggest a known key with a similar name or, in another section, with a similar last part."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        by_name = {name.rpartition(".")[2]: name for name in known}
        close = [by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"
