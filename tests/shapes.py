"""Signatures that are true: what a call was given and what it returned are held against its annotations of shapes."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, get_args, get_type_hints

import jaxtyping
import torch
from beartype import beartype

jaxtyped = jaxtyping.jaxtyped


def has_shape(hint) -> bool:
    """Whether an annotation says something about a tensor's axes, anywhere inside."""
    return inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray) or any(map(has_shape, get_args(hint)))


def checker(function: Callable) -> Callable:
    """For jaxtyping, which makes two functions of a signature: one for the arguments, before a call, whose result is
    Any, and one for arguments and result, after it. The second alone is checked: what the package refuses gets the
    package's own message, and what it takes must be as annotated. Of the annotations, those that have shapes count."""
    hints = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    if not hints or function.__annotations__.get("return") is Any:
        return function
    function.__annotations__ = hints
    return beartype(function)


def once_a_shape(function: Callable | type | None = None, **options) -> Callable:
    """In the place of `jaxtyping.jaxtyped`: a call is checked when its shapes and types are new to the function.

    A loop over 4096 tokens is then as fast as without; and a compiler sees the function alone."""
    if function is None:
        return lambda function: once_a_shape(function, **options)
    shaped = any("Tensor," in str(hint) for hint in inspect.get_annotations(function).values())
    if inspect.isgeneratorfunction(function) or not shaped:
        return function  # a call of a generator does nothing yet
    if inspect.isclass(function) and issubclass(function, tuple):  # jaxtyping knows no NamedTuple
        plain = function.__new__
        plain.__annotations__ = {**get_type_hints(function, include_extras=True), "return": object}
        checked = jaxtyped(plain, **options)
        function.__new__ = wraps(plain)(
            lambda *args, **kwargs: (plain if torch.compiler.is_compiling() else checked)(*args, **kwargs))
        return function
    if inspect.isclass(function):
        return jaxtyped(function, **options)  # the fields of a dataclass
    function.__annotations__ = {"return": object, **function.__annotations__}  # without one, nothing would be checked
    checked, seen = jaxtyped(function, **options), set()

    @wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        key = tuple(map(kind, args)), *kwargs, *map(kind, kwargs.values())
        if key in seen:
            return function(*args, **kwargs)
        out = checked(*args, **kwargs)
        seen.add(key)
        return out

    call.__code__ = call.__code__.replace(co_name=function.__name__)  # as in operators.checked
    return call


def kind(value):
    """What decides which shapes a call returns."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return value if isinstance(value, int | str | None) else type(value)


def check_package(*modules: str):
    """Check the calls of modules that have not been imported yet; a context, or for the rest of the process."""
    jaxtyping.jaxtyped = once_a_shape  # what the hook writes above each function
    return jaxtyping.install_import_hook(modules, "shapes.checker")
