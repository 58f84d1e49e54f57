"""Read the values of a pickle: the instructions of the `PickleMachine`."""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any

from ldm.support.text import shown
from ldm.weights.formats.pickle_machine import (
    MAX_INTEGER,
    MAX_KEY,
    MAX_STEPS,
    MISSING,
    Global,
    PickleMachine,
    StandIn,
)

Instruction = Callable[[PickleMachine], None]


def _unknown(m: PickleMachine) -> None:
    raise ValueError(f"{m.data[m.at - 1]:#04x} is no instruction of a pickle that is read")


INSTRUCTIONS: list[Instruction] = [_unknown] * 256  # by code


def next_value(m: PickleMachine) -> Any:
    """Return the value of the next pickle.

    Raises:
        ValueError: If the bytes are no pickle, end early, or hold what is not read; the message names the
            byte.
    """
    m.stack, m.outer, m.memo, m.done = [], [], [], False
    begin, data, end = m.at, m.data, m.end
    try:
        while not m.done:
            begin = m.at
            m.left -= 1
            if begin >= end or m.left < 0:
                raise ValueError(
                    "the pickle ends early"
                    if begin >= end
                    else f"the pickles take more than {MAX_STEPS:,} steps"
                )
            m.at = begin + 1
            INSTRUCTIONS[data[begin]](m)
        if m.outer or len(m.stack) != 1:
            raise ValueError("the pickle ends with more or less than one value")
        return m.stack.pop()
    except IndexError:
        raise ValueError(f"byte {begin}: the pickle takes a value that is not there") from None
    except UnicodeError:
        raise ValueError(f"byte {begin}: text that is not UTF-8") from None
    except (ValueError, struct.error, OverflowError) as error:
        raise ValueError(f"byte {begin}: {error}") from None


def _step(*codes: bytes) -> Callable[[Instruction], Instruction]:
    def register(step: Instruction) -> Instruction:
        for code in codes:
            INSTRUCTIONS[code[0]] = step
        return step

    return register


def _push(code: bytes, make: Callable[[PickleMachine], Any]) -> None:
    """Register an instruction that pushes a value."""

    def step(m: PickleMachine) -> None:
        m.stack.append(make(m))

    INSTRUCTIONS[code[0]] = step


# Scalars


def _decimal(text: str) -> int:
    if len(text) > 3 * MAX_INTEGER or "_" in text:
        raise ValueError(f"expected a whole number, got {shown(text)}")
    return int(text)


def _long(m: PickleMachine, width: int) -> int:
    size = m.number(width, signed=width == 4)
    if size > MAX_INTEGER:
        raise ValueError(f"a number of {size} bytes, the limit is {MAX_INTEGER}")
    return m.number(size, signed=True)


def _text_of_bytes(data: bytes) -> str | bytes:
    """Return a string of Python 2, which is text or bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _quoted(m: PickleMachine) -> str:
    text = m.line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "\"'":
        raise ValueError(f"expected a quoted string, got {shown(text)}")
    if "\\" in text:
        raise ValueError(f"a string with escapes, {shown(text)}")
    return text[1:-1]


def _unicode(m: PickleMachine) -> str:
    text = codecs.decode(m.line().encode(), "raw_unicode_escape")
    text.encode()  # no surrogates
    return text


_push(pickle.NONE, lambda m: None)
_push(pickle.NEWTRUE, lambda m: True)
_push(pickle.NEWFALSE, lambda m: False)
_push(pickle.BININT, lambda m: m.number(4, signed=True))
_push(pickle.BININT1, lambda m: m.byte())
_push(pickle.BININT2, lambda m: m.number(2))
_push(pickle.LONG1, lambda m: _long(m, 1))
_push(pickle.LONG4, lambda m: _long(m, 4))
_push(pickle.LONG, lambda m: _decimal(m.line().removesuffix("L")))
_push(pickle.FLOAT, lambda m: float(m.line()))
_push(pickle.BINFLOAT, lambda m: struct.unpack(">d", m.take(8))[0])
_push(pickle.STRING, _quoted)
_push(pickle.BINSTRING, lambda m: _text_of_bytes(m.take(m.number(4, signed=True))))
_push(pickle.SHORT_BINSTRING, lambda m: _text_of_bytes(m.take(m.byte())))
_push(pickle.UNICODE, _unicode)
_push(pickle.BINUNICODE, lambda m: m.take(m.number(4)).decode())
_push(pickle.SHORT_BINUNICODE, lambda m: m.take(m.byte()).decode())
_push(pickle.BINUNICODE8, lambda m: m.take(m.number(8)).decode())
_push(pickle.BINBYTES, lambda m: m.take(m.number(4)))
_push(pickle.SHORT_BINBYTES, lambda m: m.take(m.byte()))
_push(pickle.BINBYTES8, lambda m: m.take(m.number(8)))
_push(pickle.BYTEARRAY8, lambda m: m.take(m.number(8)))


@_step(pickle.INT)
def _int(m: PickleMachine) -> None:
    text = m.line()
    m.stack.append({"00": False, "01": True}[text] if text in ("00", "01") else _decimal(text))


# Containers

_push(pickle.EMPTY_LIST, lambda m: [])
_push(pickle.EMPTY_DICT, lambda m: {})
_push(pickle.EMPTY_TUPLE, lambda m: ())
_push(pickle.EMPTY_SET, lambda m: StandIn("builtins.set"))


def key_of(value: Any) -> Any:
    """Return a value as the key of a dictionary; a tuple is replaced by an object that equals no other.

    Raises:
        ValueError: If the value is a list or a dictionary, or a number whose hash another may have.
    """
    kind = type(value)
    if kind is str or (kind is int and -MAX_KEY < value < MAX_KEY):
        return value
    if kind in (float, bool, bytes, type(None), Global, StandIn):
        return value
    if kind is tuple:
        return StandIn("builtins.tuple")
    raise ValueError(f"{shown(value)} cannot be a key")


def set_items(target: Any, items: list[Any]) -> None:
    """Add keys and values, in turns, to a dictionary; those of a `StandIn` are dropped."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    if type(target) is dict:
        target.update(zip(map(key_of, items[::2]), items[1::2], strict=True))
    elif type(target) is not StandIn:
        raise ValueError(f"{type(target).__name__} has no keys")


def _extend(target: Any, items: Iterable[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif type(target) is not StandIn:
        raise ValueError(f"{type(target).__name__} has no end to append to")


@_step(pickle.MARK)
def _mark(m: PickleMachine) -> None:
    m.outer.append(m.stack)
    m.stack = []


@_step(pickle.TUPLE, pickle.LIST, pickle.DICT, pickle.FROZENSET, pickle.POP_MARK)
def _collect(m: PickleMachine) -> None:
    code, items = m.data[m.at - 1 : m.at], m.marked()
    if code == pickle.TUPLE:
        m.stack.append(tuple(items))
    elif code == pickle.LIST:
        m.stack.append(items)
    elif code == pickle.FROZENSET:
        m.stack.append(StandIn("builtins.frozenset"))
    elif code == pickle.DICT:
        mapping: dict[Any, Any] = {}
        set_items(mapping, items)
        m.stack.append(mapping)


_push(pickle.TUPLE1, lambda m: (m.stack.pop(),))
_push(pickle.TUPLE2, lambda m: (m.stack.pop(), m.stack.pop())[::-1])
_push(pickle.TUPLE3, lambda m: (m.stack.pop(), m.stack.pop(), m.stack.pop())[::-1])


@_step(pickle.APPEND)
def _append(m: PickleMachine) -> None:
    value = m.stack.pop()
    _extend(m.stack[-1], [value])


@_step(pickle.APPENDS, pickle.ADDITEMS)
def _appends(m: PickleMachine) -> None:
    items = m.marked()
    _extend(m.stack[-1], items)


@_step(pickle.SETITEM)
def _set_item(m: PickleMachine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    set_items(m.stack[-1], [key, value])


@_step(pickle.SETITEMS)
def _set_items(m: PickleMachine) -> None:
    items = m.marked()
    set_items(m.stack[-1], items)


# Stack and memo


def _put(m: PickleMachine, index: int) -> None:
    if not 0 <= index <= MAX_STEPS - m.left:
        raise ValueError(f"memo index {index} after {MAX_STEPS - m.left} instructions")
    if index >= len(m.memo):
        m.memo.extend([MISSING] * (index + 1 - len(m.memo)))
    m.memo[index] = m.stack[-1]


def _get(m: PickleMachine, index: int) -> Any:
    if not 0 <= index < len(m.memo) or m.memo[index] is MISSING:
        raise ValueError(f"the memo has no index {index}")
    return m.memo[index]


INSTRUCTIONS[pickle.PUT[0]] = lambda m: _put(m, _decimal(m.line()))
INSTRUCTIONS[pickle.BINPUT[0]] = lambda m: _put(m, m.byte())
INSTRUCTIONS[pickle.LONG_BINPUT[0]] = lambda m: _put(m, m.number(4))
INSTRUCTIONS[pickle.MEMOIZE[0]] = lambda m: _put(m, len(m.memo))
_push(pickle.GET, lambda m: _get(m, _decimal(m.line())))
_push(pickle.BINGET, lambda m: _get(m, m.byte()))
_push(pickle.LONG_BINGET, lambda m: _get(m, m.number(4)))
_push(pickle.DUP, lambda m: m.stack[-1])


@_step(pickle.POP)
def _pop(m: PickleMachine) -> None:
    if m.stack:
        del m.stack[-1]
    else:
        m.marked()


@_step(pickle.PROTO)
def _protocol(m: PickleMachine) -> None:
    if (found := m.byte()) > pickle.HIGHEST_PROTOCOL:
        raise ValueError(f"protocol {found}, the highest is {pickle.HIGHEST_PROTOCOL}")


@_step(pickle.FRAME)
def _frame(m: PickleMachine) -> None:
    if m.number(8) > m.end - m.at:
        raise ValueError("the pickle ends early, inside a frame")


@_step(pickle.STOP)
def _stop(m: PickleMachine) -> None:
    m.done = True


# Globals, calls and storages

_push(pickle.GLOBAL, lambda m: m.named(m.line(), m.line()))
_push(pickle.BINPERSID, lambda m: m.storage(m.stack.pop()))


@_step(pickle.STACK_GLOBAL)
def _stack_global(m: PickleMachine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.named(module, name))


@_step(pickle.EXT1, pickle.EXT2, pickle.EXT4)
def _extension(m: PickleMachine) -> None:
    raise ValueError("a global is named by a number of the registry of extensions")


@_step(pickle.REDUCE, pickle.NEWOBJ)
def _reduce(m: PickleMachine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.stack.append(m.called(function, args))


@_step(pickle.NEWOBJ_EX)
def _new_with_names(m: PickleMachine) -> None:
    _, args, function = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.stack.append(m.called(function, args))


@_step(pickle.INST)
def _instance(m: PickleMachine) -> None:
    function = m.named(m.line(), m.line())
    args = tuple(m.marked())
    m.stack.append(m.called(function, args))


@_step(pickle.OBJ)
def _object(m: PickleMachine) -> None:
    function, *args = m.marked() or [None]
    m.stack.append(m.called(function, tuple(args)))


@_step(pickle.BUILD)
def _build(m: PickleMachine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if type(target) is StandIn:
        target.state = state
    elif type(target) is not dict:  # state dicts carry `_metadata`, which is not needed
        raise ValueError(f"{type(target).__name__} has no state")
