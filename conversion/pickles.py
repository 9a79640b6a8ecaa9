"""Reading of torch's pickles as data, within bounds.

A pickle is a program for a stack machine that can call any function. [`Machine`] runs such a program but calls
nothing: a call of a torch function that describes a tensor becomes a [`TensorView`], any other call an [`Instance`],
which only stores its arguments. A small program can describe huge or endless results, such as lists that hold
themselves. The machine bounds the program, and a walk through its result counts the values with a [`Budget`].
"""

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

# Names that weights consist of.
_WEIGHTS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode"
    r"|torch\.(\w+Storage|Size|device|Tensor|b?float\d+\w*|u?int\d+|bool)|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter\.Parameter|builtins\.(bytearray|complex|set)"
)
# Names of classes that published checkpoints hold beside their weights.
_SETTINGS = re.compile(
    r"(omegaconf|fairseq)\.[\w.]+"
    r"|(typing|pathlib)\.\w+"
    r"|argparse\.Namespace|collections\.defaultdict"
    r"|builtins\.(bool|bytes|dict|float|int|list|object|str|tuple)"
    r"|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
    r"|[\w.]+\.(Modality|PredictionMode|\w+Config)"
)
# A published checkpoint with its optimizer's state has 60 000 instructions in 1 MB.
MAX_PROGRAM_BYTES = 8 << 20
MAX_INSTRUCTIONS = 400_000
# As many bits as torch's own unpickler takes for an integer.
MAX_INTEGER_BITS = 8 * 255
MAX_DIMENSIONS = 16

_VIEWS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class PickleError(ValueError):
    """A pickle is damaged or goes beyond plain data. The message is a fault, to be put behind the file's name."""


class ForbiddenReferenceError(PickleError):
    """A pickle refers to a function or class that no checkpoint needs. The message is its name."""


class Budget:
    """Counter of the values that a walk may still meet.

    Args:
        values: The number of values.
        what: Name of the object to walk through, for the message.
    """

    def __init__(self, values: int, what: str) -> None:
        self.values, self.left, self.what = values, values, what

    def spend(self, number: int = 1) -> None:
        """Count values.

        Raises:
            PickleError: If the budget does not suffice.
        """
        self.left -= number
        if self.left < 0:
            raise PickleError(f"{self.what} hold more than {self.values} values, or hold themselves")


class Reference(NamedTuple):
    """A function or class by name. It is not imported."""

    name: str


@dataclass(eq=False)
class Instance:
    """The result of a call that was not made.

    Attributes:
        name: The function or class.
        arguments: The arguments of the call.
        state: What the program set on the result.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class Storage(NamedTuple):
    """A stretch of numbers in the file: `size` elements from element `first` on of the record `key`."""

    key: str
    dtype: torch.dtype
    first: int
    size: int


class TensorView(NamedTuple):
    """A tensor's place in a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def check(self) -> None:
        """Check that the tensor lies within its storage.

        Raises:
            PickleError: If the tensor reaches beyond its storage.
        """
        sizes = (self.offset, *self.shape, *self.strides)
        if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
            raise PickleError("a tensor has a size that is no number")
        if len(self.shape) != len(self.strides) or len(self.shape) > MAX_DIMENSIONS:
            raise PickleError(f"a tensor has {len(self.shape)} sizes and {len(self.strides)} strides")
        steps = zip(self.shape, self.strides, strict=True)
        end = 0 if 0 in self.shape else self.offset + sum((size - 1) * stride for size, stride in steps) + 1
        if end > self.storage.size:
            raise PickleError(f"a tensor of shape {self.shape} ends beyond its storage of {self.storage.size} numbers")


@dataclass
class Machine:
    """Run one pickle after the other from a stream.

    Attributes:
        program: The stream.
        storages: The storages that the pickles refer to, by key.
    """

    program: IO[bytes]
    storages: dict[str, Storage] = field(default_factory=dict)
    instructions: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """Run the next pickle.

        Returns:
            Plain values, [`Instance`], [`TensorView`], [`Storage`] and [`Reference`]. They may hold themselves.

        Raises:
            ForbiddenReferenceError: If the pickle refers to anything that no checkpoint needs.
            PickleError: If the pickle is too long, or if an instruction builds no data.
            ValueError, LookupError: If the pickle is damaged.
        """
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(self.program):
            self.instructions += 1
            if self.instructions > MAX_INSTRUCTIONS:
                raise PickleError(f"it has more than {MAX_INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise PickleError("it ends too early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                # A mark counts as an item of the stack, as in pickle.
                if self.marks and self.marks[-1] == len(stack):
                    self.marks.pop()
                else:
                    stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Instance("builtins.set", ()))
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                items = self._since_mark()
                stack.append({})
                self._set_items(items)
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._last(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self._since_mark() if name == "APPENDS" else self._last(1)
                if type(stack[-1]) is not list:
                    raise PickleError(f"it appends to a {type(stack[-1]).__name__}")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._since_mark() if name == "SETITEMS" else self._last(2))
            case "ADDITEMS":
                self._since_mark()  # sets are no settings
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_reference(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_reference(*self._last(2)))
            case "INST":
                items = self._since_mark()
                stack.append(_call(_reference(*argument.split(" ", 1)), tuple(items)))
            case "OBJ":
                function, *items = self._since_mark()
                stack.append(_call(function, tuple(items)))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._last(2)
                stack.append(_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                if type(stack[-1]) is Instance:
                    stack[-1].state = state
                elif type(stack[-1]) is not dict:  # attributes of an OrderedDict are no settings
                    raise PickleError(f"it sets the state of a {type(stack[-1]).__name__}")
            case "BINPERSID":
                storage = _storage(stack.pop())
                self.storages[storage.key] = storage
                stack.append(storage)
            case _ if type(argument) in (str, bytes, int, float, bool) and not name.startswith(("EXT", "PERSID")):
                if type(argument) is int and argument.bit_length() > MAX_INTEGER_BITS:
                    raise PickleError(f"it holds an integer of {argument.bit_length()} bits")
                stack.append(argument)
            case _:
                raise PickleError(f"its instruction {name} builds no data")

    def _last(self, number: int) -> list[Any]:
        """Take the last items from the stack."""
        if len(self.stack) < number:
            raise PickleError("it takes more from its stack than it put there")
        items = self.stack[-number:]
        del self.stack[-number:]
        return items

    def _since_mark(self) -> list[Any]:
        """Take the items since the last mark from the stack."""
        return self._last(len(self.stack) - start) if (start := self.marks.pop()) < len(self.stack) else []

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise PickleError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple hashes everything that it holds, which may be endless.
            if not _is_plain_key(key) and not (type(key) is tuple and len(key) <= 8 and all(map(_is_plain_key, key))):
                raise PickleError(f"a {type(key).__name__} is the key of a dict")
            target[key] = value


def _is_plain_key(key: Any) -> bool:
    return key is None or type(key) in (str, bytes, int, float, bool, Instance, Reference)


def _reference(module: Any, name: Any) -> Reference:
    """Return a reference to a name.

    Raises:
        ForbiddenReferenceError: If no checkpoint needs the name.
    """
    # Protocol 2 writes Python 2's names (__builtin__.long). The unpickler maps them to Python 3's.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full_name = f"{module}.{name}"
    if not _WEIGHTS.fullmatch(full_name) and not _SETTINGS.fullmatch(full_name):
        raise ForbiddenReferenceError(full_name[:200])
    return Reference(full_name)


def _call(function: Any, arguments: Any) -> Any:
    """Return the stand-in for the result of a call."""
    if type(function) is not Reference or type(arguments) is not tuple:
        raise PickleError(f"it calls a {type(function).__name__}")
    name = function.name
    if name == "collections.defaultdict" or (name == "collections.OrderedDict" and not arguments):
        return {}
    if name == "torch.Size" and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    if name in _PARAMETERS and arguments and type(arguments[0]) is TensorView:
        return arguments[0]
    if name.removeprefix("torch._utils.") in _VIEWS:
        storage, offset, shape, strides, *rest = arguments
        if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
            raise PickleError("a tensor has no storage, shape or strides")
        if name.endswith("_v3"):
            dtype = _dtype(rest[2])
            # The storage holds bytes. Only the tensor states the type.
            storage = storage._replace(dtype=dtype, size=storage.size // dtype.itemsize)
            if storage.first:
                raise PickleError("a tensor is a view of a view")
        view = TensorView(storage, offset, shape, strides)
        view.check()
        return view
    return Instance(name, arguments)


def _storage(identity: Any) -> Storage:
    """Return the storage that a persistent identity describes."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise PickleError("it refers to something outside that is no storage")
    _, kind, key, _, size, *view = identity
    name = kind.name.rpartition(".")[2] if type(kind) is Reference else ""
    first = 0
    if view and view[0] is not None:  # only torch before 0.4 writes views of storages
        _, first, size = view[0]
    if name not in _STORAGES or type(key) is not str or type(size) is not int or type(first) is not int:
        raise PickleError(f"it has a storage of type {name or 'unknown'}, which holds no weights")
    if min(first, size) < 0:
        raise PickleError("a storage has a negative size")
    return Storage(key, _STORAGES[name], first, size)


def _dtype(reference: Any) -> torch.dtype:
    name = reference.name.removeprefix("torch.") if type(reference) is Reference else ""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PickleError("a tensor has no data type")
    return dtype
