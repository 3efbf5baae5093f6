"""Checks of JSON data against type annotations."""
from __future__ import annotations

import sys
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

__all__ = ['fits', 'types_of']


@cache
def types_of(cls: type) -> dict[str, Any]:
    """The annotations of a class, by name."""
    return get_type_hints(cls, include_extras=True)


def fits(value: Any, kind: Any) -> bool:
    """Whether JSON data fits a type annotation. Numbers have to be finite; a TypedDict may have further keys."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        return fits(value, args[0]) and all(check(value) for check in args[1:])
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin in (list, dict):
        return isinstance(value, origin) and all(
            fits(item, args[-1]) for item in (value.values() if origin is dict else value))
    if is_typeddict(kind):
        return isinstance(value, dict) and kind.__required_keys__ <= set(value) and all(
            fits(value[name], each) for name, each in types_of(kind).items() if name in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind
