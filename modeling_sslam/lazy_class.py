"""Placeholders for classes that are registered with transformers before they are imported."""

from importlib import import_module
from typing import Any


class LazyClass:
    """Placeholder for a class in a table of transformers' Auto classes. Its first use imports the class.

    Args:
        module: Module that defines the class.
        name: Name of the class. Transformers reads it without using the class.
        config_class: The class's attribute of this name, which transformers reads on every registration.
    """

    def __init__(self, module: str, name: str, config_class: type) -> None:
        self.__module__ = module
        self.__name__ = self.__qualname__ = name
        self.config_class = config_class

    def load(self) -> type:
        """Import the class and return it."""
        return imported(self.__module__, self.__name__)

    def __getattr__(self, name: str) -> Any:
        # Python asks for special names, for example to find out whether an object can be copied.
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make an instance of the class."""
        return self.load()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        """Let a class statement that names the placeholder as a base derive from the class."""
        return (self.load(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.load())

    def __reduce__(self) -> tuple:
        return imported, (self.__module__, self.__name__)


def imported(module: str, name: str) -> type:
    """Import a class by its name. Unpickling calls this, too."""
    return getattr(import_module(module), name)
