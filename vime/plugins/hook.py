"""Loads users' functions from dotted paths, calls them, and checks what they return.

A `Hook` says how vime calls a function and what the function may return; the other files of this
folder declare all hooks. A flag states its hook (`flag("--custom-rm-path", hook=REWARD)`), and a
`Plugin` is the function that a flag names: `plugin(...)` calls it, `await plugin.call(...)` also
awaits it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from vime.errors import PluginError, ReturnError
from vime.plugins.threads import in_thread

# (returned value, *arguments of the call) -> the problem of the value ("returned None"), or None.
# If the hook has `remember`, the check gets its result as the keyword `before`.
Check = Callable[..., str | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hook:
    """A place where vime calls a user's function.

    shape       the signature, as a user would write it
    returns     what the function must return, as the end of the sentence "It must return ..."
    positional  number of positional arguments
    keywords    keyword arguments that the function must take
    optional    keyword arguments that are passed only to a function that takes them
    methods     for a class: {method: (returns, check)}; each method must exist
    check       judges the value that the function returned
    remember    is called before the function with the same arguments, for a check of changes
    may_await   whether the function may be asynchronous
    in_thread   whether a plain function runs in a thread, because it may block
    """

    shape: str
    returns: str
    positional: int
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    methods: dict[str, tuple[str, Check | None]] | None = None
    check: Check | None = None
    remember: Callable[..., Any] | None = None
    may_await: bool = False
    in_thread: bool = False


@dataclass(frozen=True, slots=True)
class Plugin:
    """The user's function for a hook.

    named_by  the flag that holds its path, for errors: "--custom-rm-path"
    path      "package.module.function"
    """

    named_by: str
    path: str
    hook: Hook

    @property
    def function(self) -> Any:
        """The function or class, which fits its hook. Raises PluginError."""
        try:
            return _fitting(self.path, self.hook)
        except PluginError as error:
            raise PluginError(f"{self.named_by} {error}") from error.__cause__

    def problem(self) -> str | None:
        """Why the function cannot be called, in words; None if it can."""
        try:
            assert self.function
        except PluginError as error:
            return str(error)
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's checked answer. Raises PluginError; ReturnError if the answer is wrong."""
        function, before = self.function, self._before(args, kwargs)
        made = function(*args, **self._taken(function, kwargs))
        return self._checked(made, before, args, kwargs)

    async def call(self, *args: Any, **kwargs: Any) -> Any:
        """The checked answer of a plain or asynchronous function, for a hook that may await."""
        assert self.hook.may_await, self.named_by
        function, before = self.function, self._before(args, kwargs)
        taken = self._taken(function, kwargs)
        if self.hook.in_thread and not is_asynchronous(function):
            made = await in_thread(function, *args, **taken)
        else:
            made = function(*args, **taken)
        if inspect.isawaitable(made):
            made = await made
        return self._checked(made, before, args, kwargs)

    def call_method(self, instance: Any, name: str, *args: Any) -> Any:
        """The checked answer of a method of an object of this class. Raises PluginError."""
        returns, check = (self.hook.methods or {})[name]
        made = getattr(instance, name)(*args)
        came = _answer_problem(made, check, None, args, {})
        if came is not None:
            raise self.refusal(f"{name}() {came}", returns)
        return made

    def refusal(self, came: str, returns: str | None = None) -> ReturnError:
        """The error for a function that broke its contract. Example of `came`: "returned None"."""
        due = self.hook.returns if returns is None else returns
        return ReturnError(f"{self.named_by} {self.path} {came}. It must return {due}.")

    def _before(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.hook.remember(*args, **kwargs) if self.hook.remember else None

    def _taken(self, function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        optional = self.hook.optional
        return {n: v for n, v in kwargs.items() if n not in optional or _takes(function, n)}

    def _checked(self, made: Any, before: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        more = kwargs if self.hook.remember is None else {**kwargs, "before": before}
        came = _answer_problem(made, self.hook.check, self.hook.methods, args, more)
        if came is not None:
            raise self.refusal(came)
        return made


def _answer_problem(
    made: Any,
    check: Check | None,
    methods: dict[str, Any] | None,
    args: tuple,
    kwargs: dict[str, Any],
) -> str | None:
    """The problem of a returned value, as a predicate: "returned None"."""
    if inspect.isawaitable(made):
        if inspect.iscoroutine(made):
            made.close()  # Python would warn that nobody awaited it
        return "returned a coroutine, which vime cannot await here"
    missing = [name for name in methods or () if not hasattr(made, name)]
    if missing:
        return f"returned {described(made)} without {', '.join(missing)}"
    return check(made, *args, **kwargs) if check else None


def described(value: Any) -> str:
    """A returned value in a few words: "None", "0.5", "an empty list", "a list of Sample"."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80]
    if isinstance(value, list | tuple | dict) and not value:
        return f"an empty {kind}"
    if isinstance(value, list | tuple):
        return f"a {kind} of {type(value[0]).__name__}"
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def is_finite(values: Any) -> bool:
    """Whether every number of a list, an array or a tensor is finite."""
    found = values.isfinite() if hasattr(values, "isfinite") else np.isfinite(values)
    return bool(found.all())


def is_asynchronous(function: Any) -> bool:
    """Whether a call must be awaited. A call of a class makes an object, so it need not be."""
    if inspect.isclass(function):
        return False
    return any(map(inspect.iscoroutinefunction, (function, function.__call__)))


@cache
def load(path: str) -> Any:
    """The function or class at `package.module.name`. Raises PluginError."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise PluginError(f"{path!r} is not a dotted path; write package.module.function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise any error when it is imported
        raise PluginError(
            f"{path}: importing {module_name} failed: {type(error).__name__}: {error}. "
            "Is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        have = {n: v for n, v in vars(module).items() if callable(v) and not n.startswith("_")}
        own = [n for n, v in have.items() if getattr(v, "__module__", None) == module_name]
        names = ", ".join(own or have) or "nothing to call"
        raise PluginError(f"{path}: {module_name} has no {name!r}; it has: {names}.")
    if not callable(function):
        raise PluginError(f"{path} is {described(function)}, not a function or class.")
    return function


@cache
def _fitting(path: str, hook: Hook) -> Any:
    """Loads a function and checks that it fits the hook. Raises PluginError."""
    function = load(path)
    _check_signature(path, function, hook)
    called = {path: function}
    if inspect.isclass(function):
        missing = [name for name in hook.methods or () if not hasattr(function, name)]
        if missing:
            raise PluginError(f"{path} lacks {', '.join(missing)}. Expected: {hook.shape}.")
        called |= {f"{path}.{name}": getattr(function, name) for name in hook.methods or ()}
    for name, each in called.items():
        if not hook.may_await and is_asynchronous(each):
            raise PluginError(
                f"{name} is asynchronous, and vime cannot await it there. Write a plain `def`. "
                f"Expected: {hook.shape}."
            )
    return function


def _check_signature(path: str, function: Callable, hook: Hook) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    try:
        signature.bind(*[None] * hook.positional, **dict.fromkeys(hook.keywords))
    except TypeError as error:
        name = getattr(function, "__name__", path)
        raise PluginError(
            f"{path} has the signature {name}{signature}, which vime cannot call "
            f"({error}). Expected: {hook.shape}."
        ) from None


@cache
def _takes(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
