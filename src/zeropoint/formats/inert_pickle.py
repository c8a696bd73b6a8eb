"""Pickles read as a tree of what they say, with nothing imported, called or made on their behalf.

A pickle is a program for a small stack machine. This is that machine without its hands: where
pickle imports a name, the name's text is kept (:class:`Name`); where it calls, what is called and
with what (:class:`Call`); where it makes an object, of which class and with what state
(:class:`Object`). Opcodes are parsed by :mod:`pickletools` of the standard library.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO


class PickleError(ValueError):
    """What a pickle holds that is not read."""


class CallError(PickleError):
    """A call that is not among those that are expected."""


class Name:
    """What pickle would import, ``text`` being ``module.name``. Made once for each text."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Call:
    """A call that was not made: of ``name``, with ``args``."""

    __slots__ = ("args", "name")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args


class Object:
    """An object that was not made: of class ``name``, with ``state``, ``None`` if it has none."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name, self.state = name, None


class Reference:
    """What lies outside the pickle, by its persistent id."""

    __slots__ = ("id",)

    def __init__(self, id: Any) -> None:
        self.id = id


class Table(dict[Any, Any]):
    """An ``OrderedDict``; ``state`` holds what was set on it as an object."""

    state: Any = None


_MARK: Any = object()
_BEFORE_3 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NOTHING = frozenset(("PROTO", "FRAME", "STOP"))
_VALUES = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)


def read(file: BinaryIO, may_call: Callable[[str], bool]) -> Any:
    """The tree of the pickle that begins where ``file`` is; the file is left behind its end.

    Tuples, lists, numbers, strings and ``None`` are themselves, dictionaries are ``dict`` or
    :class:`Table`; all else is a :class:`Name`, :class:`Call`, :class:`Object` or
    :class:`Reference`.

    Args:
        file: open for reading, in memory (so that reading more than there is costs nothing).
        may_call: given ``module.name``, whether a call of it is expected.

    Raises:
        CallError: a call that is not expected, with its name.
        PickleError: an opcode that torch never writes, or a pickle that is malformed.
    """
    machine = _Machine(may_call)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        (root,) = machine.stack
        return root
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise PickleError(f"not a sound pickle: {type(error).__name__}: {error}"[:200]) from None


class _Machine:
    def __init__(self, may_call: Callable[[str], bool]) -> None:
        self.stack: list[Any] = []
        self._may_call = may_call
        self._memo: dict[int, Any] = {}
        self._names: dict[str, Name] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _NOTHING:
            pass
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode == "POP":
            stack.pop()
        elif opcode == "POP_MARK":
            self._since_mark()
        elif opcode in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self._take_tuple("E123".index(opcode.removeprefix("TUPLE")[0]))
        elif opcode == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif opcode == "EMPTY_LIST":
            stack.append([])
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode == "APPEND":
            value = stack.pop()
            self._list().append(value)
        elif opcode == "APPENDS":
            values = self._since_mark()
            self._list().extend(values)
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set_items([key, value])
        elif opcode == "SETITEMS":
            self._set_items(self._since_mark())
        elif opcode == "BINPERSID":
            self._refer(stack.pop())
        elif opcode == "GLOBAL":
            module, _, name = argument.partition(" ")
            stack.append(self._name(module, name))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise PickleError("a name that is no text")
            stack.append(self._name(module, name))
        elif opcode == "REDUCE":
            args, function = stack.pop(), stack.pop()
            stack.append(self._call(function, args))
        elif opcode == "NEWOBJ":
            args, cls = stack.pop(), stack.pop()
            if not isinstance(cls, Name) or args != ():
                raise PickleError("an object that is made with arguments")
            stack.append(Object(cls.text))
        elif opcode == "BUILD":
            self._set_state(stack.pop())
        else:
            raise PickleError(f"the pickle opcode {opcode}, which no file of torch's holds")

    def _take_tuple(self, size: int) -> None:
        at = len(self.stack) - size
        if at < 0:
            raise PickleError("not a sound pickle: the stack is empty")
        self.stack[at:] = [tuple(self.stack[at:])]

    def _since_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:  # an IndexError in the end, where there is none
            at -= 1
            if at < 0:
                raise PickleError("not a sound pickle: no mark on the stack")
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def _list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            raise PickleError("a value appended to something other than a list")
        return self.stack[-1]

    def _set_items(self, pairs: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict) or len(pairs) % 2:
            raise PickleError("items set on something other than a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # The hash of a deep tuple would run out of the C stack.
            if not isinstance(key, str | int | Name):
                raise PickleError(f"a key of the type {type(key).__name__}")
            table[key] = value

    def _name(self, module: str, name: str) -> Name:
        text = f"{_BEFORE_3.get(module, module)}.{name}"
        return self._names.setdefault(text, Name(text))

    def _refer(self, id: Any) -> None:
        # Files before torch 1.6 name a class with its source text beside it.
        if isinstance(id, tuple) and len(id) == 4 and id[0] == "module":
            self.stack.append(id[1])
        else:
            self.stack.append(Reference(id))

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise PickleError("a call of something that has no name")
        if function.text == "collections.OrderedDict":
            table = Table()
            for pair in args[0] if len(args) == 1 and isinstance(args[0], list) else ():
                if not isinstance(pair, tuple | list) or len(pair) != 2:
                    raise PickleError("not a sound pickle: an OrderedDict of something but pairs")
                if not isinstance(pair[0], str | int):
                    raise PickleError(f"a key of the type {type(pair[0]).__name__}")
                table[pair[0]] = pair[1]
            return table
        if not self._may_call(function.text):
            raise CallError(
                f"it calls {function.text[:100]!r}, which is none of the constructors of a "
                "quantized checkpoint; it was not run"
            )
        return Call(function.text, args)

    def _set_state(self, state: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, Object | Table):
            raise PickleError(f"a state for a {type(target).__name__}")
        target.state = state
