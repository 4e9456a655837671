"""Config dataclasses from plain mappings, checked by their type hints. What is wrong is named by its dotted key."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class WrongValue(ValueError):
    """A value, given by flag or config, that can't be used. The message names it and says what was expected."""

    final = True  # see `cli.run`


def build(kind: type[T], fields: Any, name: str = "", *, error: type[ValueError] = ValueError, unset: str = "") -> T:
    """A dataclass with the values of a mapping; sections that are dataclasses themselves are built likewise.

    A list fits a tuple, and an int a float.

    Args:
      kind: the dataclass.
      fields: its values by name; a `kind` is returned as it is.
      name: dotted key of the mapping, before those of its values; "" is the outermost.
      error: class of the errors.
      unset: what to do about a value that is None and must not be; "{}" stands for its key.

    Raises:
      error: an unknown or missing key, a value of another type, or what the dataclass itself refuses.
    """
    if isinstance(fields, kind):
        return fields
    if not isinstance(fields, Mapping):
        raise error(f"{name}: expected a section, found {fields!r}")
    prefix = f"{name}." if name else ""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in fields:
        if key not in known:
            raise error(f"{prefix}{key}: unknown key; known are {', '.join(sorted(known))}")
    for key, field in known.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if key not in fields and not optional:
            raise error(f"{prefix}{key}: missing")

    def convert(hint: Any, value: Any, name: str) -> Any:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
        if dataclasses.is_dataclass(hint):
            return build(hint, value, name, error=error, unset=unset)
        origin = typing.get_origin(hint) or hint
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple):
            element = typing.get_args(hint)[0]
            return tuple(convert(element, part, f"{name}[{index}]") for index, part in enumerate(value))
        if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
            advice = f"; {unset.format(name)}" if value is None and unset else ""
            raise error(f"{name}: expected {origin.__name__}, found {value!r}{advice}")
        return value

    hints = typing.get_type_hints(kind)
    # In the order of declaration: a key is at fault before the sections whose values follow from it.
    values = {key: convert(hints[key], fields[key], prefix + key) for key in known if key in fields}
    try:
        return kind(**values)
    except ValueError as cause:
        if error is not ValueError and isinstance(cause, error):  # which names its key itself
            raise
        raise error(f"{name}: {cause}" if name else str(cause)) from cause
