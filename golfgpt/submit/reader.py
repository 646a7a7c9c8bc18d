"""A small evaluator of a script's constants, names and decoders. Nothing is executed, and results are bounded."""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import bz2
import contextlib
import lzma
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golfgpt.errors import InputError
from golfgpt.quant.codecs import CODECS, whole_stream, zstd_frame
from golfgpt.submit.names import bindings, bound_names, locals_of
from golfgpt.submit.pack import from_digits

MAX_BYTES = 8 * 2**20
"""Of a program, packed or not."""
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
    imported: set[str] = field(default_factory=set)
    """Modules that calls import by a constant name, whatever the function is called."""
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """What imports of the texts so far bind to a name: a text that they execute has these names too."""
    network: list[str] = field(default_factory=list)
    """Calls that reach the network or start a program."""
    reads: list[str] = field(default_factory=list)
    """Reads of files that are named neither by a constant, sys.argv nor DATA_PATH."""
    bound: list[Counter[str]] = field(default_factory=list)
    """Of each text: how often it binds each name, in any scope, or an attribute of that name."""
    relied: list[tuple[set[str], range]] = field(default_factory=list)
    """Names that a value was read by, and the texts that cannot change them: their own and what that executes."""

    @property
    def program(self) -> ast.Module:
        """All texts as one tree."""
        return ast.Module([part for text in self.texts for part in ast.parse(text).body], [])


IMPORT = {"__import__", "importlib.import_module", "importlib.__import__", "builtins.__import__"}


def text_of(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path.name} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 ({error}), so that nobody can read it as text") from None


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


class Unread(Exception):
    """An expression that is not evaluated here."""


class Reader:
    """The names of a module, as far as they are constants or decoded from constants."""

    def __init__(self, folder: Path, code: Code, tree: ast.Module):
        self.folder, self.code, self.tree = folder, code, tree
        self.names: dict[str, Any] = {}
        self.looped: set[str] = set()
        """Of these the ones that the loop over the digits fills."""
        self.relied: set[str] = set()
        """Names by which values were read."""
        self.relies: dict[str, set[str]] = {}
        """Of these what the value of a name relies on."""
        self.bound = bindings(tree)
        self.local = locals_of(tree)
        self.modules: set[str] = set()
        self.imports: dict[str, list[str]] = {}
        """All that imports, and assignments of a builtin, anywhere bind to a name."""
        for n in ast.walk(tree):
            if isinstance(n, ast.Import | ast.ImportFrom | ast.Assign):
                for name, full in bound_names(n):
                    self.imports.setdefault(name, []).append(full)
                    self.modules |= {full} - {full if isinstance(n, ast.Assign) else ""}
        for name, full in self.imports.items():
            code.aliases.setdefault(name, []).extend(full)
        self.run(tree.body)

    def run(self, body: list[ast.stmt]) -> None:
        """Keep the value of a name that the whole program binds once, here, to something that cannot change."""
        for statement in body:
            match statement:
                case ast.For():
                    self.digits(statement)
                case ast.Assign(targets=[ast.Name(id=name)]) if self.bound[name] == 1 or is_constant(
                    statement.value, 0
                ):
                    self.relied = set()
                    with contextlib.suppress(Unread):
                        value = self.value(statement.value)
                        if isinstance(value, str | bytes | int) and self.bound[name] <= 2:
                            self.names[name], self.relies[name] = value, self.relied
        for name in [name for name in self.names if self.bound[name] > 1 and name not in self.looped]:
            del self.names[name]

    def digits(self, loop: ast.For) -> None:
        """`for c in DIGITS: n = n * 95 + c - 32`, as golfgpt.submit.pack writes it."""
        match loop:
            case ast.For(
                target=ast.Name(id=c), iter=ast.Constant(value=bytes(digits)),
                body=[ast.Assign(targets=[ast.Name(id=n)]) as line], orelse=[],
            ) if ast.unparse(line) == f"{n} = {n} * 95 + {c} - 32" and n != c:  # fmt: skip
                if self.names.get(n) == 0 and self.bound[n] == 2 and len(digits) <= _MAX_DIGITS:
                    self.names[n] = int.from_bytes(from_digits(digits, len(digits)), "big")
                    self.looped.add(n)
                    self.code.how.append("base 95")

    def spellings(self, node: ast.expr) -> set[str]:
        """All that a function or module may be called in full, for finding what is not wanted."""
        if isinstance(node, ast.Name):
            if id(node) in self.local:
                return {name for name in self.local[id(node)] if name != node.id or node.id in self.imports}
            if node.id in self.imports:
                return set(self.imports[node.id])
            if self.bound[node.id] and not hasattr(builtins, node.id):
                return set()  # a variable, although a module may be called so
            return set(self.code.aliases.get(node.id, [node.id]))
        if isinstance(node, ast.Attribute):
            return {_inner(f"{owner}.{node.attr}") for owner in self.spellings(node.value)}
        if self.constant_getattr(node):
            return {_inner(f"{owner}.{node.args[1].value}") for owner in self.spellings(node.args[0])}
        if isinstance(node, ast.Call) and self.spellings(node.func) & IMPORT:
            return {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
        return set()

    def constant_getattr(self, node: ast.expr) -> bool:
        """Whether it is getattr of a constant name, which is read like the attribute itself."""
        called = isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
        return called and "getattr" in self.spellings(node.func)

    def given(self, node: ast.expr) -> bool:
        """Whether a file is named by a constant, which counts it, or by who starts the program."""
        match node:
            case ast.Constant(value=str(name)):
                path = Path(name)
                inside = not path.is_absolute() and ".." not in path.parts and not set("*?[") & set(name)
                return inside and not (self.folder / path).is_dir()
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id="sys"), attr="argv")):
                return True
            case ast.Subscript(value=owner, slice=ast.Constant(value="DATA_PATH")):
                return "os.environ" in self.spellings(owner)
            case ast.Call(func=func, args=[ast.Constant(value="DATA_PATH"), *_]):
                return bool(self.spellings(func) & {"os.environ.get", "os.getenv"})
            case ast.Call(func=func, args=[first]):
                return bool(self.spellings(func) & {"pathlib.Path", "str"}) and self.given(first)
            case ast.BinOp(left=left, op=ast.Div()):
                return not isinstance(left, ast.Constant) and self.given(left)
        return False

    def rely(self, node: ast.expr) -> str | None:
        """The full name of a function that certainly is the one of that name. Raises Unread if the program or a file
        of the folder may have replaced it."""
        name = self.dotted(node)
        root = next((n for n in ast.walk(node) if isinstance(n, ast.Name)), None)
        if name is None or root is None:
            return name
        imports = self.imports.get(root.id, [])
        if self.bound[root.id] != len(imports) or len(set(imports)) > 1:
            raise Unread(f"{root.id}, which the program binds")
        parts = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)] + [name.split(".")[-1]]
        if any(self.bound[part] for part in parts if part != root.id):
            raise Unread(f"{name}, which the program binds")
        top = name.split(".")[0]
        if (self.folder / top).exists() or (self.folder / f"{top}.py").exists():
            raise Unread(f"{top} of the folder")
        self.relied |= {root.id, *parts}
        return name

    def dotted(self, node: ast.expr) -> str | None:
        """The full name of a function or module: of `L.decompress` after `import lzma as L`, lzma.decompress."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, [node.id])[-1]
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
                self.relied |= {node.id, *self.relies[node.id]}
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
            case ast.Attribute() if (self.dotted(node) or "").startswith("lzma."):
                self.rely(node)
                if isinstance(number := getattr(lzma, node.attr, None), int):
                    return number
            case ast.Call():
                return self.call(node)
        raise Unread(ast.unparse(node)[:100])

    def call(self, node: ast.Call) -> Any:
        name = self.dotted(node.func)
        if name in KNOWN or name in DECODERS or name in DECOMPRESSORS:
            self.rely(node.func)
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
                    return text_of(path)
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


KNOWN = {"compile", "bytes", "memoryview", "open", "pathlib.Path", "io.open"}


def _inner(name: str) -> str:
    """Of `shutil.os.system`, os.system: modules have the modules that they import as attributes."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.lstrip("_") in _REACHED), default=0)
    return ".".join([parts[last].lstrip("_") if last else parts[0], *parts[last + 1 :]])


_REACHED = {"os", "sys", "builtins", "subprocess", "socket", "ctypes", "pickle", "marshal", "multiprocessing"}
_REACHED |= {"linecache", "triton"}


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
    "brotli.decompress": lambda data: b"".join(CODECS["brotli"].decompress(memoryview(data), MAX_BYTES)),
    "zstandard.decompress": lambda data, *_: zstd_frame(data, MAX_BYTES),
}
