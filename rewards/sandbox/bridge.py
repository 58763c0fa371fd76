"""Lets tests in one sandbox call a program in another; the text of this file runs in both.

The program's process (`serve`) executes the program and answers calls. The tests' process (`judge`, in `judge.py`)
executes the tests and reports each result on its own output. Between them go messages of plain values, never code or
pickles, so that a hostile program can do one thing only: choose what its functions return, raise, or leave in the
lists that they were given.

Plain values (numbers, strings, bytes, None, lists, tuples, sets, dicts, deques, fractions, decimals, dates, Python's
own exceptions, and what derives from containers without methods of its own) are copied. Anything else stays where it
is and the other side holds a `Remote`, which forwards calls, attributes, items, iteration and conversions. A `Remote`
is equal to no plain value, and has no order or arithmetic with one: the program's process would see the expected value
and could answer accordingly.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import os
import pathlib
import sys
import threading
import types
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

MAX_MESSAGE_BYTES = 8 * 2**20
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
FACTORIES: tuple[type, ...] = (list, dict, set, int, float, str, bool)
MUTABLE = (list, dict, set, bytearray, collections.deque)
BY_TEXT: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any] | None]] = {
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
    "Fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "int": (int, hex, lambda text: int(text, 16)),
    "complex": (complex, repr, complex),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (datetime.timedelta, lambda value: [value.days, value.seconds, value.microseconds], None),
    "slice": (slice, lambda value: [value.start, value.stop, value.step], None),
    "range": (range, lambda value: [value.start, value.stop, value.step], None),
    "UUID": (uuid.UUID, str, uuid.UUID),
    "PurePosixPath": (pathlib.PurePosixPath, str, pathlib.PurePosixPath),
    "PosixPath": (pathlib.PosixPath, str, pathlib.PosixPath),
}
# What a derived class is reduced to: its own methods, such as a changed __eq__, do not travel.
PLAIN = (str, bytes, bytearray, int, float, complex, *CONTAINERS.values(), dict)

# What a Remote forwards, under the name of the special method (__len__) and of its operation here.
CONVERSIONS = "len iter next reversed bool str repr hash int float complex format round abs".split()  # noqa: SIM905
UNARY = "index getitem setitem delitem neg pos invert".split()  # noqa: SIM905
BINARY = "lt le gt ge add sub mul truediv floordiv mod pow matmul and_ or_ xor".split()  # noqa: SIM905
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, /, *args, **kwargs: target(*args, **kwargs),
    "enter": lambda target: target.__enter__(),
    "exit": lambda target, *error: target.__exit__(*error),
    "plain": lambda target: plain_part(target),
    "isinstance": lambda target, value: isinstance(value, target),
    **{name: getattr(builtins, name) for name in [*CONVERSIONS, "getattr", "setattr", "delattr"]},
    **{name: getattr(operator, name) for name in [*UNARY, *BINARY, "eq", "ne"]},
}
# The tests' process does no more than this for the program, and reads and sets public attributes of objects of the
# tests' own classes, and what `functools.wraps` copies: other attributes would lead to frames, and so to the results.
ALLOWED_TO_PROGRAM = ("call", "iter", "next")
ATTRIBUTES_OF_FUNCTIONS = ("__name__", "__qualname__", "__doc__", "__module__")


def plain_part(value: Any) -> Any:
    """What an object of a derived class holds as its built-in class; None where it has none."""
    return next((kind(value) for kind in PLAIN if isinstance(value, kind)), None)


def stays(value: Any) -> bool:
    """Whether an object of a derived class has methods of its own, for which it must stay where it is."""
    kind = type(value)
    return kind.__module__ == "solution" and any(
        callable(item) and name[:1] != "_" for name, item in vars(kind).items()
    )


class Peer:
    """One end of the connection: sends requests, and answers those that arrive while it waits."""

    def __init__(self, read_fd: int, write_fd: int, judges: bool) -> None:
        self.input, self.output = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")
        self.judges = judges  # the tests' end, which must not be led astray
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.remotes: dict[int, Remote] = {}
        self.lock = threading.RLock()  # for one request at a time, of whichever thread
        self.exceptions: dict[str, type[BaseException]] = {}

    def gone(self) -> NoReturn:
        """The other end is silent or breaks the protocol: stop at once, before a test can catch it."""
        os._exit(0)

    def send(self, **message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            self.output.write(len(data).to_bytes(8, "big") + data)
            self.output.flush()
        except OSError:
            self.gone()

    def receive(self) -> dict[str, Any]:
        try:
            size = int.from_bytes(self.input.read(8), "big")
            if not 0 < size <= MAX_MESSAGE_BYTES:
                self.gone()
            message = json.loads(self.input.read(size))
        except (OSError, ValueError, RecursionError):
            self.gone()
        if not isinstance(message, dict):
            self.gone()
        return message

    def encode(self, value: Any) -> Any:
        """A plain value as JSON; for another object, its number on the side that holds it."""
        kind = type(value)
        if value is None or kind in (bool, str, float) or kind is int and abs(value) < 2**63:
            return value
        if kind is Remote:
            return {"yours": object.__getattribute__(value, "_number")}
        if isinstance(value, tuple) and hasattr(kind, "_fields") and not stays(value):
            return {"named": [kind.__name__, list(kind._fields), [self.encode(item) for item in value]]}
        if kind in (dict, collections.Counter):
            return {kind.__name__: [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if kind is collections.defaultdict and value.default_factory in FACTORIES:
            return {kind.__name__: [value.default_factory.__name__, self.encode(dict(value))]}
        if isinstance(value, BaseException) and getattr(builtins, kind.__name__, None) is kind:
            return {"exception": [kind.__name__, [self.encode(item) for item in value.args]]}
        for name, container in CONTAINERS.items():
            if kind is container:
                return {name: [self.encode(item) for item in value]}
        for name, (plain, to_text, _) in BY_TEXT.items():
            if kind is plain:
                return {name: to_text(value)}
        if not stays(value) and (held := plain_part(value)) is not None:
            return self.encode(held)
        if isinstance(value, BaseException) and "_remote" in vars(value):
            return self.encode(vars(value)["_remote"])
        name = getattr(value, "__name__", "")
        if self.judges and type(name) is str and getattr(builtins, name, None) is value:
            return {"builtin": name}
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"mine": self.numbers[id(value)]}

    def decode(self, data: Any) -> Any:
        """The value of `encode`'s JSON on this side; some error where the data is not of that form."""
        if not isinstance(data, dict):
            return data
        ((name, value),) = data.items()
        if name == "yours":
            return self.objects[value]
        if name == "mine":
            return self.remotes.setdefault(value, Remote(self, value))
        if name in ("dict", "Counter"):
            table = {self.decode(key): self.decode(item) for key, item in value}
            return table if name == "dict" else collections.Counter(table)
        if name == "defaultdict":
            factory = next(kind for kind in FACTORIES if kind.__name__ == value[0])
            return collections.defaultdict(factory, self.decode(value[1]))
        if name == "exception":
            return self.exception(value[:1], "", [self.decode(item) for item in value[1]])
        if name == "named":
            return collections.namedtuple(value[0], value[1])(*map(self.decode, value[2]))
        if name in CONTAINERS:
            return CONTAINERS[name](self.decode(item) for item in value)
        if name == "builtin" and not self.judges:
            return getattr(builtins, value)
        kind, _, from_text = BY_TEXT[name]
        return from_text(value) if from_text else kind(*value)

    def ask(self, operation: str, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Have the other end do an operation, answering its requests meanwhile; its result, or its exception."""
        with self.lock:
            return self.ask_alone(operation, target, *args, **kwargs)

    def ask_alone(self, operation: str, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        first = [next(i for i, other in enumerate(given) if other is value) for value in given]
        sent = [
            {"given": first[i]} if first[i] < i and type(value) in MUTABLE else self.encode(value)
            for i, value in enumerate(given)
        ]
        self.send(
            do=operation, on=self.encode(target), args=sent[: len(args)], names=[*kwargs], kwargs=sent[len(args) :]
        )
        while "do" in (reply := self.receive()):
            self.answer(reply)
        try:
            for position, changed in reply.get("changed", []):
                refill(given[position], self.decode(changed))
            if "given" in reply:
                return given[reply["given"]]
            if "result" in reply:
                return self.decode(reply["result"])
            error = self.exception(reply["raised"], reply["text"], [self.decode(value) for value in reply["args"]])
            if "error" in reply:
                vars(error).update(_remote=self.decode(reply["error"]), _text=str(reply["text"]))
        except (LookupError, TypeError, ValueError, AttributeError):
            self.gone()
        if isinstance(error, (StopIteration, StopAsyncIteration)) and operation != "next":
            # `map` and `zip` would take it for the end of what they iterate over, and no test would see a failure.
            error = RuntimeError("the program raised StopIteration")
        raise error

    def answer(self, request: dict[str, Any]) -> None:
        """Do what the other end asked for, and send the result, the exception and the containers that it changed."""
        try:
            operation, target = request["do"], self.decode(request["on"])
            given: list[Any] = []
            for value in (before := [*request["args"], *request["kwargs"]]):
                is_same = isinstance(value, dict) and "given" in value
                given.append(given[value["given"]] if is_same else self.decode(value))
            args = given[: len(request["args"])]
            kwargs = dict(zip(request["names"], given[len(args) :], strict=True))
            if self.judges and not is_allowed(operation, target, args):
                raise AttributeError(operation)
            result = OPERATIONS[operation](target, *args, **kwargs)
            after = [self.encode(value) if type(value) in MUTABLE else None for value in given]
            changed = [(i, now) for i, now in enumerate(after) if now is not None and now != before[i]]
            same = [i for i, value in enumerate(given) if value is result and type(value) in MUTABLE]
            reply: dict[str, Any] = {"given": same[0]} if same else {"result": self.encode(result)}
            reply["changed"] = changed
        except BaseException as error:  # noqa: BLE001 - SystemExit too belongs to whoever called
            reply = {"raised": [kind.__name__ for kind in type(error).__mro__], "text": str(error)}
            reply["args"] = [self.encode(value) for value in error.args]
            if type(error).__module__ == "solution":
                reply["error"] = self.encode(error)
        self.send(**reply)

    def exception(self, names: list[str], text: str, args: list[Any]) -> BaseException:
        """An exception of the first of these classes that is known here."""
        for name in names:
            kind = self.exceptions.get(name) or getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                try:
                    return kind(*args)
                except (TypeError, ValueError):
                    return kind(text)
        return Exception(text)


def is_allowed(operation: str, target: Any, args: list[Any]) -> bool:
    """Whether the tests' process does this with one of its objects for the program."""
    of_tests = type(target).__module__ == "tests"
    if operation in ALLOWED_TO_PROGRAM or of_tests and operation in (*CONVERSIONS, *UNARY, *BINARY):
        return True
    if operation not in ("getattr", "setattr") or not args or type(args[0]) is not str:
        return False
    if operation == "getattr" and isinstance(target, types.FunctionType) and args[0] in ATTRIBUTES_OF_FUNCTIONS:
        return True
    return of_tests and not args[0].startswith("_")


def refill(container: Any, new: Any) -> None:
    """Give a container the contents that its copy has now, and the containers in it theirs."""
    if isinstance(container, (list, dict)) and type(new) is type(container):
        for key in container if isinstance(container, dict) else range(min(len(container), len(new))):
            known = type(container[key]) in MUTABLE and (isinstance(new, list) or key in new)
            if known and type(new[key]) is type(container[key]):
                refill(container[key], new[key])
                new[key] = container[key]
    if isinstance(container, (list, bytearray)):
        container[:] = new
    elif isinstance(container, collections.deque):
        container.clear()
        container.extend(new)
    else:
        container.clear()
        container.update(new)


class Remote:
    """An object of the other process."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._peer.ask("delattr", self, name)

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is Remote and self._peer.ask("isinstance", self, value) is True

    def __eq__(self, other: object) -> bool:
        if type(other) is Remote:
            return self is other or self._peer.ask("eq", self, other) is True
        # What it holds is compared here, so that its process does not learn what was expected.
        held = self._peer.ask("plain", self)
        return held is not None and type(held) is not Remote and held == other

    def __ne__(self, other: object) -> bool:
        return not self == other if type(other) is not Remote else self._peer.ask("ne", self, other) is True


# Found in every class, so that `__getattr__` would not be asked.
for _name in ("__doc__", "__module__"):
    setattr(Remote, _name, property(operator.methodcaller("__getattr__", _name)))


def forward(operation: str) -> Callable[..., Any]:
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if operation in BINARY and type(args[0]) is not Remote:
            return NotImplemented
        return self._peer.ask(operation, self, *args, **kwargs)

    return method


for _name in ["call", "enter", "exit", *CONVERSIONS, *UNARY, *BINARY]:
    setattr(Remote, f"__{_name.rstrip('_')}__", forward(_name))


def serve(program: str, read_fd: int, write_fd: int) -> NoReturn:
    """Execute the program as the module `solution`, then answer the tests' requests until they end."""
    peer = Peer(read_fd, write_fd, judges=False)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(program, "solution.py", "exec"), module.__dict__)
    names: dict[str, Any] = {}
    errors: dict[str, list[str]] = {}
    for name, value in module.__dict__.items():
        if isinstance(value, types.ModuleType):
            names[name] = {"module": value.__name__}
        elif isinstance(value, type) and issubclass(value, BaseException):
            errors[name] = [kind.__name__ for kind in value.__mro__]
            peer.exceptions[name] = value
        elif not name.startswith("__"):
            names[name] = peer.encode(value)
    peer.send(names=names, errors=errors)
    while True:
        peer.answer(peer.receive())
