"""Callbacks that run once a module has been imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType


def after_import(name: str, callback: Callable[[], object]) -> None:
    """Call `callback` when the module `name` has been imported: at once if it already is.

    Registering with a part of transformers this way does not import that part, which can take seconds.

    Args:
        name: Full name of a module that is Python source.
        callback: Called once, without arguments.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _ImportWatcher(name, callback))


class _ImportWatcher(MetaPathFinder):
    """Finder that gives one module a loader with a callback and then removes itself."""

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self._name, self._callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.origin is not None:
            spec.loader = _CallbackLoader(fullname, spec.origin, self._callback)
        return spec


class _CallbackLoader(SourceFileLoader):
    """Loader that runs a callback after the module."""

    def __init__(self, fullname: str, path: str, callback: Callable[[], object]) -> None:
        super().__init__(fullname, path)
        self._callback = callback

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._callback()
