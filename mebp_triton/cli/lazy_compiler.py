"""``torch._dynamo``, the front of ``torch.compile``, loaded when something compiles and not before.

transformers decorates functions for the compiler while it is imported, and each decorator of torch loads the whole
compiler. With sympy and all else that brings, it is a fifth of what ``mebp generate`` does before its first token, and
none of it is used.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class LazyCompiler(ModuleType):
    """Stands for ``torch._dynamo`` until an attribute is asked that is no decorator below, and becomes it then.

    It is the same module object before and after, so that nobody holds a stand-in. Decorators that were used before
    are applied on loading: nothing can be compiled earlier. A submodule that is imported loads the package as well,
    because the package has no ``__path__`` until then.
    """

    def __init__(self) -> None:
        super().__init__(NAME)
        spec = importlib.util.find_spec(NAME)
        assert spec is not None and spec.loader is not None
        self.__dict__.update(__spec__=spec, __package__=NAME, __loader__=spec.loader)
        self.__dict__.update(__file__=spec.origin, _marks=[])

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """``torch._dynamo.disable``: the function runs as it is, and is never traced."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **options)
        if isinstance(fn, type):
            return self._load().disable(fn, recursive, **options)
        called = [fn]

        @functools.wraps(fn)
        def function(*arguments: Any, **named: Any) -> Any:
            return called[0](*arguments, **named)

        def mark() -> None:
            called[0] = sys.modules[NAME].disable(fn, recursive, **options)

        self._marks.append(mark)
        return function

    def allow_in_graph(self, fn: Any) -> Any:
        """``torch._dynamo.allow_in_graph``: the function is taken into a graph without being traced."""
        self._marks.append(lambda: sys.modules[NAME].allow_in_graph(fn))
        return fn

    def assume_constant_result(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``torch._dynamo.assume_constant_result``: the function is called once, when it is traced."""
        self._marks.append(lambda: sys.modules[NAME].assume_constant_result(fn))
        return fn

    @contextmanager
    def held(self) -> Iterator[None]:
        """While active, a submodule can be imported alone. What asks for the package itself fails."""
        self.__dict__["__path__"] = self.__dict__["__spec__"].submodule_search_locations
        try:
            yield
        finally:
            del self.__dict__["__path__"]

    def __getattr__(self, name: str) -> Any:
        # Names with two underscores are asked of every module, by inspect and warnings.
        if "__path__" in self.__dict__ or (name.startswith("__") and name != "__path__"):
            raise AttributeError(f"module {NAME!r} has no attribute {name!r} yet")
        return getattr(self._load(), name)

    def _load(self) -> Any:
        spec, marks = self.__dict__["__spec__"], self.__dict__.pop("_marks")
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        for mark in marks:
            mark()
        return self


def load_compiler_late() -> None:
    """Puts a ``LazyCompiler`` in the place of ``torch._dynamo``, unless that is loaded, or has to be.

    transformers takes a class from one of its submodules while it is imported, which is imported here alone.
    """
    import torch

    if NAME in sys.modules:
        return
    module = LazyCompiler()
    sys.modules[NAME] = torch._dynamo = module  # type: ignore[assignment]
    try:
        with module.held():
            import torch._dynamo._trace_wrapped_higher_order_op
    except Exception:  # it asked for the package around it
        del sys.modules[NAME], torch._dynamo
        sys.modules.pop(f"{NAME}._trace_wrapped_higher_order_op", None)
