"""Registration of classes with transformers' Auto classes before the classes are imported."""

from importlib import import_module
from typing import Any


class LazyClass:
    """Placeholder for a class in a table of transformers' Auto classes.

    The first use imports the class and puts it in the placeholder's place, unless another class has been registered
    there in the meantime.

    Args:
        module: Module that defines the class.
        name: Name of the class. Transformers reads it without using the class.
        mapping: The table.
        config_class: Key in the table.
    """

    def __init__(self, module: str, name: str, mapping: Any, config_class: type) -> None:
        self.__module__ = module
        self.__name__ = self.__qualname__ = name
        self._mapping = mapping
        self.config_class = config_class

    def load(self) -> type:
        """Import the class, put it in the table, and return it."""
        loaded = imported(self.__module__, self.__name__)
        if self._mapping.get(self.config_class, None) is self:
            self._mapping.register(self.config_class, loaded, exist_ok=True)
        return loaded

    def __getattr__(self, name: str) -> Any:
        # Python asks for special names, for example to find out whether an object can be copied.
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make an instance of the class."""
        return self.load()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.load())

    def __reduce__(self) -> tuple:
        return imported, (self.__module__, self.__name__)


def imported(module: str, name: str) -> type:
    """Import a class by its name. Unpickling calls this, too."""
    return getattr(import_module(module), name)
