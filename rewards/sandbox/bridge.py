"""Lets tests in one sandbox call a program in another; the text of this file runs in both.

The program's process (`serve`) executes the program and answers calls. The tests' process (`judge`, in `judge.py`)
executes the tests and reports each result on its own output. Between them go messages of plain values, never code or
pickles, so that a hostile program can do one thing only: choose what its functions return, raise, or leave in the
lists that they were given.

Plain values (numbers, strings, bytes, None, lists, tuples, sets, dicts, deques, fractions, decimals, dates, and what
derives from them) are copied. Anything else stays where it is and the other side holds a `Remote`, which forwards
calls, attributes, items, iteration and conversions. A `Remote` is equal to no plain value, and has no order or
arithmetic with one: the program's process would see the expected value and could answer accordingly.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import os
import sys
import types

MAX_MESSAGE_BYTES = 8 * 2**20
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
MUTABLE = (list, dict, set, bytearray, collections.deque)
BY_TEXT = {
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
    "Fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "int": (int, hex, lambda text: int(text, 16)),
    "complex": (complex, repr, complex),
}
# What a derived class is reduced to: its own methods, such as a changed __eq__, do not travel.
PLAIN = (str, bytes, bytearray, int, float, complex, *CONTAINERS.values(), dict)

# What a Remote forwards, under the name of the special method (__len__) and of its operation here.
CONVERSIONS = [
    "len",
    "iter",
    "next",
    "reversed",
    "bool",
    "str",
    "repr",
    "hash",
    "int",
    "float",
    "complex",
    "round",
    "abs",
]
UNARY = ["index", "getitem", "setitem", "delitem", "neg", "pos", "invert"]
BINARY = [
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
]
OPERATIONS = {
    "call": lambda target, /, *args, **kwargs: target(*args, **kwargs),
    "enter": lambda target: target.__enter__(),
    "exit": lambda target, *error: target.__exit__(*error),
    "isinstance": lambda target, value: isinstance(value, target),
    **{name: getattr(builtins, name) for name in [*CONVERSIONS, "getattr", "setattr", "delattr"]},
    **{name: getattr(operator, name) for name in [*UNARY, *BINARY, "eq", "ne"]},
}
# The tests' process does no more than this for the program: attributes would lead to frames, and so to the results.
ALLOWED_TO_PROGRAM = ("call", "iter", "next")


class Peer:
    """One end of the connection: sends requests, and answers those that arrive while it waits."""

    def __init__(self, read_fd, write_fd, judges):
        self.input, self.output = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")
        self.judges = judges  # the tests' end, which must not be led astray
        self.objects = []
        self.exceptions = {}

    def gone(self):
        """The other end is silent or breaks the protocol: stop at once, before a test can catch it."""
        os._exit(0)

    def send(self, **message):
        data = json.dumps(message).encode()
        try:
            self.output.write(len(data).to_bytes(8, "big") + data)
            self.output.flush()
        except OSError:
            self.gone()

    def receive(self):
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

    def encode(self, value):
        """A plain value as JSON; for another object, its number on the side that holds it."""
        kind = type(value)
        if value is None or kind in (bool, str, float) or kind is int and abs(value) < 2**63:
            return value
        if kind is Remote:
            return {"yours": object.__getattribute__(value, "_number")}
        if kind is dict:
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        for name, container in CONTAINERS.items():
            if kind is container:
                return {name: [self.encode(item) for item in value]}
        for name, (plain, to_text, _) in BY_TEXT.items():
            if kind is plain:
                return {name: to_text(value)}
        for plain in PLAIN:
            if isinstance(value, plain):
                return self.encode(plain(value))
        if self.judges and getattr(builtins, getattr(value, "__name__", ""), None) is value:
            return {"builtin": value.__name__}
        self.objects.append(value)
        return {"mine": len(self.objects) - 1}

    def decode(self, data):
        """The value of `encode`'s JSON on this side; some error where the data is not of that form."""
        if not isinstance(data, dict):
            return data
        ((name, value),) = data.items()
        if name == "yours":
            return self.objects[value]
        if name == "mine":
            return Remote(self, value)
        if name == "dict":
            return {self.decode(key): self.decode(item) for key, item in value}
        if name in CONTAINERS:
            return CONTAINERS[name](self.decode(item) for item in value)
        if name == "builtin" and not self.judges:
            return getattr(builtins, value)
        return BY_TEXT[name][2](value)

    def ask(self, operation, target, /, *args, **kwargs):
        """Have the other end do an operation, answering its requests meanwhile; its result, or its exception."""
        self.send(
            do=operation,
            on=self.encode(target),
            args=[self.encode(value) for value in args],
            kwargs={name: self.encode(value) for name, value in kwargs.items()},
        )
        while "do" in (reply := self.receive()):
            self.answer(reply)
        given = [*args, *kwargs.values()]
        try:
            for position, changed in reply.get("changed", []):
                refill(given[position], self.decode(changed))
            if "result" in reply:
                return self.decode(reply["result"])
            error = self.exception(reply["raised"], reply["text"])
        except (LookupError, TypeError, ValueError, AttributeError):
            self.gone()
        raise error

    def answer(self, request):
        """Do what the other end asked for, and send the result, the exception and the containers that it changed."""
        try:
            operation = request["do"]
            if self.judges and operation not in ALLOWED_TO_PROGRAM:
                raise PermissionError(operation)
            args = [self.decode(value) for value in request["args"]]
            kwargs = {name: self.decode(value) for name, value in request["kwargs"].items()}
            result = OPERATIONS[operation](self.decode(request["on"]), *args, **kwargs)
            before = [*request["args"], *request["kwargs"].values()]
            after = [self.encode(value) if type(value) in MUTABLE else None for value in [*args, *kwargs.values()]]
            changed = [(i, now) for i, now in enumerate(after) if now is not None and now != before[i]]
            reply = {"result": self.encode(result), "changed": changed}
        except BaseException as error:  # noqa: BLE001 - SystemExit too belongs to whoever called
            text = error.args[0] if error.args and type(error.args[0]) is str else str(error)
            reply = {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}
        self.send(**reply)

    def exception(self, names, text):
        """An exception of the first of these classes that is known here."""
        for name in names:
            kind = self.exceptions.get(name) or getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                return kind(text)
        return Exception(text)


def refill(container, new):
    """Give a container the contents that its copy has now."""
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

    def __init__(self, peer, number):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name):
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._peer.ask("setattr", self, name, value)

    def __delattr__(self, name):
        self._peer.ask("delattr", self, name)

    def __instancecheck__(self, value):
        return type(value) is Remote and self._peer.ask("isinstance", self, value) is True

    def __eq__(self, other):
        return type(other) is Remote and self._peer.ask("eq", self, other) is True

    def __ne__(self, other):
        return type(other) is not Remote or self._peer.ask("ne", self, other) is True


def forward(operation):
    def method(self, /, *args, **kwargs):
        if operation in BINARY and type(args[0]) is not Remote:
            return NotImplemented
        return self._peer.ask(operation, self, *args, **kwargs)

    return method


for _name in ["call", "enter", "exit", *CONVERSIONS, *UNARY, *BINARY]:
    setattr(Remote, f"__{_name.rstrip('_')}__", forward(_name))


def serve(program, read_fd, write_fd):
    """Execute the program as the module `solution`, then answer the tests' requests until they end."""
    peer = Peer(read_fd, write_fd, judges=False)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(program, "solution.py", "exec"), module.__dict__)
    names, errors = {}, {}
    for name, value in module.__dict__.items():
        if isinstance(value, types.ModuleType):
            names[name] = {"module": value.__name__}
        elif isinstance(value, type) and issubclass(value, BaseException):
            errors[name] = [kind.__name__ for kind in value.__mro__]
        elif not name.startswith("__"):
            names[name] = peer.encode(value)
    peer.send(names=names, errors=errors)
    while True:
        peer.answer(peer.receive())
