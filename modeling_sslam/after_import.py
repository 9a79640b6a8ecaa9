"""Callbacks that run once a module has been imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def after_import(name: str, callback: Callable[[], object]) -> None:
    """Call `callback` when the module `name` has been imported: at once if it already is.

    Registering with a part of transformers this way does not import that part, which can take seconds.

    Args:
        name: Full name of a module. Several callbacks may wait for the same one.
        callback: Called once, without arguments.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _ImportWatcher(name, callback))


class _ImportWatcher(MetaPathFinder):
    """Finder that adds a callback to one module's loader. It stays until that module has been imported."""

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self._name, self._callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self.finish)
        return spec

    def finish(self) -> None:
        sys.meta_path.remove(self)
        self._callback()


class _CallbackLoader(Loader):
    """A module's own loader, and a callback after it."""

    def __init__(self, loader: Loader, callback: Callable[[], object]) -> None:
        self._loader, self._callback = loader, callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._callback()

    def __getattr__(self, name: str) -> Any:
        # The module's loader also provides source, resources and so on.
        return getattr(self._loader, name)
