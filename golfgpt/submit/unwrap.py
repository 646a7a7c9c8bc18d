"""What a packed script executes, found by reading it. Nothing of it is executed.

A small evaluator knows constants, names that were assigned known values, and the decoders that packers use. Its results
are bounded, so a file that unpacks to gigabytes is refused. What it cannot follow is reported, never guessed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import contextlib
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golfgpt.errors import InputError
from golfgpt.quant.codecs import CODECS, whole_stream
from golfgpt.submit.pack import from_digits

MAX_BYTES = 8 * 2**20
"""Of a program, packed or not."""
MAX_PROGRAMS = 16
_MAX_DIGITS = 2**18
"""Of a number that stands for bytes; its value takes time with the square of it."""


@dataclass
class Code:
    """The programs that a script consists of."""

    texts: list[str] = field(default_factory=list)
    """The script, then what it executes, each as it was unpacked."""
    how: list[str] = field(default_factory=list)
    """The decoders on the way, in the order in which they were used."""
    files: set[str] = field(default_factory=set)
    """Files of the folder that it imports, executes or names."""
    unread: list[str] = field(default_factory=list)
    """Calls of exec and the like whose text reading cannot tell."""
    computed: list[str] = field(default_factory=list)
    """Imports of a computed name."""

    @property
    def program(self) -> ast.Module:
        """All texts as one tree."""
        return ast.Module([part for text in self.texts for part in ast.parse(text).body], [])


def read_code(folder: Path, name: str = "train_gpt.py") -> Code:
    """Raises InputError for a file that is no Python, or that unpacks to more than `MAX_BYTES`."""
    code, waiting = Code(), [name]
    for file in waiting:  # grows
        _follow(code, folder, _text(folder / file), file)
        waiting += sorted(other for other in code.files if other.endswith(".py") and other not in waiting)
    return code


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path.name} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 ({error}), so that nobody can read it as text") from None


def _follow(code: Code, folder: Path, text: str, name: str) -> None:
    if len(code.texts) == MAX_PROGRAMS:
        raise InputError(f"{name} unpacks more than {MAX_PROGRAMS} programs")
    try:
        tree = ast.parse(text)
        ast.unparse(tree)  # raises RecursionError for what the walks below could not do either
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{name} is no Python: {error}") from None
    code.texts.append(text)
    reader = Reader(folder, code)
    reader.run(tree.body)
    code.files |= _named(tree, folder)
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        called = reader.dotted(call.func)
        if called in EXECUTE:
            try:
                inner = reader.value(call.args[0])
                inner = inner.decode() if isinstance(inner, bytes) else inner
                if not isinstance(inner, str):
                    raise Unread(f"{called} of {type(inner).__name__}")
            except (Unread, IndexError, UnicodeDecodeError):
                code.unread.append(ast.unparse(call)[:100])
            else:
                _follow(code, folder, inner, f"what {name} unpacks")
        elif called in IMPORT and not (call.args and isinstance(call.args[0], ast.Constant)):
            code.computed.append(ast.unparse(call)[:100])
        elif called in LOAD:
            code.unread.append(ast.unparse(call)[:100])


EXECUTE = {"exec", "eval", "builtins.exec", "builtins.eval"}
IMPORT = {"__import__", "importlib.import_module"}
LOAD = {"runpy.run_path", "runpy.run_module", "marshal.loads", "pickle.loads", "pickle.load", "torch.hub.load"}
LOAD |= {"importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader"}


def _named(tree: ast.AST, folder: Path) -> set[str]:
    """Files of the folder that a program imports or that a text in it names."""
    names: set[str] = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            names |= {alias.name.split(".")[0] for alias in n.names}
        elif isinstance(n, ast.ImportFrom):
            names.add((n.module or "").split(".")[0])
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) < 200:
            names.add(n.value)
    found = set()
    for name in filter(None, names):
        for path in (folder / name, folder / f"{name}.py"):
            if "\0" not in name and ".." not in path.parts and path.is_relative_to(folder):
                if path.is_file():
                    found.add(str(path.relative_to(folder)))
                elif path.is_dir() and path != folder:
                    found |= {str(file.relative_to(folder)) for file in path.rglob("*") if file.is_file()}
    return found


class Unread(Exception):
    """An expression that is not evaluated here."""


class Reader:
    """The names of a module, as far as they are constants or decoded from constants."""

    def __init__(self, folder: Path, code: Code):
        self.folder, self.code = folder, code
        self.names: dict[str, Any] = {}
        self.imports: dict[str, str] = {}

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    root = alias.name.split(".")[0]
                    self.imports[alias.asname or root] = alias.name if alias.asname else root
            elif isinstance(statement, ast.ImportFrom):
                self.imports |= {a.asname or a.name: f"{statement.module}.{a.name}" for a in statement.names}
            elif isinstance(statement, ast.If | ast.With | ast.Try):
                self.run(statement.body)
            elif isinstance(statement, ast.For):
                self.digits(statement)
            elif isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
                self.names.pop(target.id, None)
                with contextlib.suppress(Unread):
                    self.names[target.id] = self.value(statement.value)

    def digits(self, loop: ast.For) -> None:
        """`for c in DIGITS: n = n * 95 + c - 32`, as golfgpt.submit.pack writes it."""
        if re.fullmatch(r"for (\w+) in b.*:\n    (\w+) = \2 \* 95 \+ \1 - 32", ast.unparse(loop), re.DOTALL):
            digits, name = self.value(loop.iter), loop.body[0].targets[0].id
            if self.names.get(name) == 0 and len(digits) <= _MAX_DIGITS:
                number = from_digits(digits, len(digits))
                self.names[name] = int.from_bytes(number, "big")
                self.code.how.append("base 95")

    def dotted(self, node: ast.expr) -> str | None:
        """The full name of a function or module: of `L.decompress` after `import lzma as L`, lzma.decompress."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return owner and f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and self.dotted(node.func) in ("__import__", "importlib.import_module"):
            named = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value
            return str(named) if named else None
        return None

    def value(self, node: ast.expr) -> Any:
        """Raises Unread for what it does not know, InputError for damage and for more than `MAX_BYTES`."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() if node.id in self.names:
                return self.names[node.id]
            case ast.List() | ast.Tuple():
                return [self.value(part) for part in node.elts]
            case ast.Dict() if None not in node.keys:
                return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values, strict=True)}
            case ast.BinOp(op=ast.BitOr() | ast.LShift() | ast.Add()):
                a, b = self.value(node.left), self.value(node.right)
                if isinstance(node.op, ast.Add) and type(a) is type(b) and isinstance(a, str | bytes):
                    return _bounded(a + b)
                if isinstance(a, int) and isinstance(b, int) and a.bit_length() <= 64 and 0 <= b < 2**64:
                    if not isinstance(node.op, ast.LShift):
                        return a | b if isinstance(node.op, ast.BitOr) else a + b
                    if b <= 64:
                        return a << b
            case ast.Attribute() if (name := self.dotted(node)) and name.startswith("lzma."):
                if isinstance(number := getattr(lzma, node.attr, None), int):
                    return number
            case ast.Call():
                return self.call(node)
        raise Unread(ast.unparse(node)[:100])

    def call(self, node: ast.Call) -> Any:
        name = self.dotted(node.func)
        if name in ("compile", "bytes", "memoryview") and node.args:
            return self.value(node.args[0])
        if name in ("open", "pathlib.Path", "io.open") and node.args:
            return _File(str(self.value(node.args[0])))
        if name in DECODERS or name in DECOMPRESSORS:
            args = [self.value(arg) for arg in node.args]
            options = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
            try:
                found = DECODERS[name](args[0]) if name in DECODERS else DECOMPRESSORS[name](*args, **options)
            except InputError:
                raise
            except Exception as error:  # each library has its own
                raise InputError(f"{name} refuses what the script holds: {error}") from None
            self.code.how.append(name)
            return _bounded(found)
        if isinstance(node.func, ast.Attribute):
            return self.method(self.value(node.func.value), node)
        raise Unread(name)

    def method(self, owner: Any, node: ast.Call) -> Any:
        match owner, node.func.attr:
            case _File(), "read" | "read_text" | "read_bytes" | "open":
                path = self.folder / owner
                if node.func.attr == "open":
                    return owner
                if path.is_relative_to(self.folder) and ".." not in path.parts and path.is_file():
                    self.code.files.add(str(path.relative_to(self.folder)))
                    return _text(path)
            case str(), "encode":
                return owner.encode(*[str(self.value(arg)) for arg in node.args])
            case bytes(), "decode":
                return owner.decode(*[str(self.value(arg)) for arg in node.args])
            case str() | bytes(), "strip" if not node.args:
                return owner.strip()
            case int(), "to_bytes" if node.args and not isinstance(owner, bool):
                size, order = self.value(node.args[0]), [self.value(arg) for arg in node.args[1:2]]
                if isinstance(size, int) and 0 <= size <= MAX_BYTES and (order or ["big"])[0] in ("big", "little"):
                    try:
                        return owner.to_bytes(size, (order or ["big"])[0])
                    except OverflowError as error:
                        raise InputError(f"the digits are not {size:,} bytes: {error}") from None
        raise Unread(ast.unparse(node)[:100])


class _File(str):
    """The name of a file that a script opens."""


def _bounded(value: Any) -> Any:
    if len(value) > MAX_BYTES:
        raise InputError(f"it unpacks to more than {MAX_BYTES:,} bytes")
    return value


def _lzma(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: Any = None, filters: Any = None) -> bytes:
    if filters:
        if any(part.get("dict_size", 0) > 2**26 for part in filters):
            raise InputError("its LZMA dictionary has more than 64 MB")
        return whole_stream(lzma.LZMADecompressor(format, filters=filters), data, MAX_BYTES)
    return whole_stream(lzma.LZMADecompressor(format, memlimit=2**28), data, MAX_BYTES)


def _zlib(data: bytes, wbits: int = zlib.MAX_WBITS, bufsize: int = 0) -> bytes:
    return whole_stream(zlib.decompressobj(wbits), data, MAX_BYTES)


DECODERS: dict[str | None, Callable[[Any], Any]] = {
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "base64.b32decode": base64.b32decode,
    "base64.b16decode": base64.b16decode,
    "base64.decodebytes": base64.decodebytes,
    "binascii.a2b_base64": binascii.a2b_base64,
    "binascii.unhexlify": binascii.unhexlify,
    "bytes.fromhex": bytes.fromhex,
}
DECOMPRESSORS: dict[str | None, Callable[..., bytes]] = {
    "lzma.decompress": _lzma,
    "zlib.decompress": _zlib,
    "gzip.decompress": lambda data: _zlib(data, 16 + zlib.MAX_WBITS),
    "bz2.decompress": lambda data: whole_stream(bz2.BZ2Decompressor(), data, MAX_BYTES),
    "brotli.decompress": lambda data: CODECS["brotli"].decompress(memoryview(data), MAX_BYTES),
    "zstandard.decompress": lambda data, *_: CODECS["zstd"].decompress(memoryview(data), MAX_BYTES),
}
