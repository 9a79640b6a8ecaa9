"""Classes that transformers' Auto classes know of before they are imported."""

from importlib import import_module
from typing import Any


class LazyClass:
    """Stands for a class in one of the tables of transformers' Auto classes until it is first used: then the class is
    imported and takes its place there, unless another has been registered meanwhile.

    Args:
        module: Where the class is defined.
        name: Its name, which transformers reads without using the class.
        mapping: The table.
        config_class: The key in the table.
    """

    def __init__(self, module: str, name: str, mapping: Any, config_class: type) -> None:
        self.__module__ = module
        self.__name__ = self.__qualname__ = name
        self._mapping = mapping
        self.config_class = config_class

    def load(self) -> type:
        """The class itself."""
        loaded = imported(self.__module__, self.__name__)
        if self._mapping.get(self.config_class, None) is self:
            self._mapping.register(self.config_class, loaded, exist_ok=True)
        return loaded

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for special names, for example to learn whether this can be copied.
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.load())

    def __reduce__(self) -> tuple:
        return imported, (self.__module__, self.__name__)


def imported(module: str, name: str) -> type:
    return getattr(import_module(module), name)
