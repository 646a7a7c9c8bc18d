"""What a packed script executes, found by reading it. Nothing of it is executed.

A small evaluator knows constants, names that were assigned known values, and the decoders that packers use. Its results
are bounded, so a file that unpacks to gigabytes is refused. What it cannot follow is reported, never guessed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import bz2
import contextlib
import lzma
import re
import sys
import zlib
from collections import Counter
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


def read_code(folder: Path, name: str = "train_gpt.py") -> Code:
    """Raises InputError for a file that is no Python, or that unpacks to more than `MAX_BYTES`."""
    code, waiting = Code(), [name]
    for file in waiting:  # grows
        _follow(code, folder, _text(folder / file), file)
        waiting += sorted(other for other in code.files if other.endswith(".py") and other not in waiting)
    for names, inside in code.relied:
        others = [bound for i, bound in enumerate(code.bound) if i not in inside]
        code.unread += [f"{name}, which another text binds" for name in sorted(names) if any(o[name] for o in others)]
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
    first = len(code.texts)
    code.texts.append(text)
    reader = Reader(folder, code, tree)
    code.bound.append(bindings(tree, plain_imports=False))
    code.files |= _named(tree, folder)
    _survey(reader)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    executing = [call for call in calls if reader.spellings(call.func) & EXECUTE]
    once = len(executing) == 1 and any(isinstance(s, ast.Expr) and s.value is executing[0] for s in tree.body)
    for call in executing:
        _execute(reader, call, once, first, name)


def _execute(reader: Reader, call: ast.Call, once: bool, first: int, name: str) -> None:
    """Follow what one exec or eval executes. With `once` it runs a single time, and no other one runs."""
    code, shown = reader.code, ast.unparse(call)[:100]
    reader.relied = set()
    try:
        reader.rely(call.func)
        inner = reader.value(call.args[0])
        inner = inner.decode() if isinstance(inner, bytes) else inner
        if not isinstance(inner, str):
            raise Unread(shown)
        if not once and reader.relied - EXECUTE - {"compile"}:
            raise Unread(shown)  # what it executes could bind these names, and it or another runs after that
    except (Unread, IndexError, UnicodeDecodeError):
        code.unread.append(shown)
        return
    relied = reader.relied
    _follow(code, reader.folder, inner, f"what {name} unpacks")
    code.relied.append((relied, range(first, len(code.texts))))


EXECUTE = {"exec", "eval", "builtins.exec", "builtins.eval"}
IMPORT = {"__import__", "importlib.import_module", "importlib.__import__", "builtins.__import__"}
DIRECT = {"exec", "eval", "compile", "__import__", "builtins", "__builtins__"}
"""Names that only a direct call may use, since reading follows no alias of them."""
_ALIASED = IMPORT | {f"builtins.{name}" for name in DIRECT}
UNREADABLE = {"runpy", "marshal", "ctypes", "_ctypes", "cffi", "dill", "cloudpickle", "joblib", "code", "codeop", "imp"}
UNREADABLE |= {"pickle.loads", "pickle.load", "pickle.Unpickler", "_pickle", "types.FunctionType", "types.LambdaType"}
UNREADABLE |= {"types.CodeType", "torch.hub", "torch.package", "torch.jit.load", "torch.ops.load_library", "zipimport"}
UNREADABLE |= {"torch.classes.load_library", "torch.utils.cpp_extension", "importlib.util", "importlib.machinery"}
UNREADABLE |= {"sys.modules", "sys._getframe", "timeit", "cProfile", "profile", "pdb", "bdb", "trace", "shelve"}
"""Modules and functions that execute or build code which is no text of the program."""
_ATTRIBUTES = {"getattr", "setattr", "delattr"}
INSIDE = {"__globals__", "__builtins__", "__subclasses__", "f_globals", "f_builtins", "__loader__"}
"""Attributes that lead to every name of a module."""
WHOLE = {"os", "sys", "importlib", "builtins", "pickle", "types", "torch", "base64", "lzma", "zlib"}
"""Modules that stand only before a dot: what gets one as a value can call or change anything in it."""
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket", "socketserver"}
NETWORK |= {"subprocess", "telnetlib", "urllib", "urllib3", "xmlrpc", "_socket", "ssl", "_ssl", "pty", "ctypes"}
NETWORK |= {"multiprocessing", "_posixsubprocess", "posix", "poplib", "imaplib", "nntplib", "webbrowser", "cffi"}
"""Modules that reach the network, or start a program that may."""
_STARTS = re.compile(r"os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|startfile)|asyncio\.(streams|subprocess)\b.*")
_CONNECTS = {"open_connection", "open_unix_connection", "start_server", "start_unix_server", "create_connection"}
_CONNECTS |= {"create_server", "create_datagram_endpoint", "create_unix_connection", "sock_connect"}
_CONNECTS |= {"create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"}
_CONNECTS |= {"ProcessPoolExecutor", "load_state_dict_from_url", "download_url_to_file"}
_READ = {"open", "io.open", "os.open", "glob.glob", "glob.iglob", "os.listdir", "os.scandir", "os.walk", "torch.load"}
_READ |= {"torch.from_file", *(f"numpy.{name}" for name in ("load", "fromfile", "memmap", "loadtxt", "genfromtxt"))}
_READ_METHODS = {"read_bytes", "read_text", "iterdir", "glob", "rglob", "walk", "open"}


def _survey(reader: Reader) -> None:
    """Note the imports, loaders, aliases, connections and reads of files in one text."""
    code = reader.code
    called = {id(n.func) for n in ast.walk(reader.tree) if isinstance(n, ast.Call)}
    calls = [n for n in ast.walk(reader.tree) if isinstance(n, ast.Call) and reader.spellings(n.func) & EXECUTE]
    passed = {id(arg.func) for call in calls for arg in call.args[1:] if isinstance(arg, ast.Call)}
    owners = {id(n.value) for n in ast.walk(reader.tree) if isinstance(n, ast.Attribute)}
    owners |= {id(n.args[0]) for n in ast.walk(reader.tree) if isinstance(n, ast.Call) and reader.constant_getattr(n)}
    for n in ast.walk(reader.tree):
        if _star(n) or _other_code(n) or (isinstance(n, ast.Call) and _other_names(reader, n)):
            code.unread.append(ast.unparse(n)[:100])
        if not isinstance(n, ast.Name | ast.Attribute | ast.Call):
            continue
        names, shown = reader.spellings(n), f"line {n.lineno}: {ast.unparse(n)[:100]}"
        reached = isinstance(n, ast.Name) and names & {"globals", "locals"} and id(n) not in passed
        if reached or _hides_code(n, names, id(n) in called, id(n) in owners):
            code.unread.append(shown)
        last = {name.split(".")[-1] for name in names} | ({n.attr} if isinstance(n, ast.Attribute) else set())
        if last & _CONNECTS or any(_STARTS.fullmatch(x) or ("." in x and x.split(".")[0] in NETWORK) for x in names):
            code.network.append(shown)
        if isinstance(n, ast.Call):
            _survey_call(reader, n, shown)


def _star(n: ast.AST) -> bool:
    return isinstance(n, ast.ImportFrom) and n.names[0].name == "*"


def _other_names(reader: Reader, call: ast.Call) -> bool:
    """Whether a call gets a module's names as a dict, other than for the text that exec gets."""
    names = reader.spellings(call.func)
    if names & EXECUTE:
        return not all(_plain(arg) for arg in call.args[1:]) or bool(call.keywords)
    modules = reader.modules | WHOLE
    return "vars" in names and (not call.args or bool(reader.spellings(call.args[0]) & modules))


def _plain(names: ast.expr) -> bool:
    """Whether the names that exec gets are the module's own, or none but __name__ and __file__."""
    match names:
        case ast.Call(func=ast.Name(id="globals" | "locals"), args=[], keywords=[]):
            return True
        case ast.Dict(keys=keys):
            return all(isinstance(key, ast.Constant) and key.value in ("__name__", "__file__") for key in keys)
    return False


def _other_code(n: ast.AST) -> bool:
    """Whether a statement gives a function other code. `f.__code__ = f.__code__.replace()` copies its own."""
    if not isinstance(n, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.For | ast.With | ast.NamedExpr):
        return False
    targets = n.targets if isinstance(n, ast.Assign) else [n]
    for target in targets:
        stored = [x for x in ast.walk(target) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)]
        if any(x.attr == "__code__" for x in stored):
            return not (target in stored and ast.unparse(n.value) == f"{ast.unparse(target)}.replace()")
    return False


def _hides_code(n: ast.expr, names: set[str], called: bool, owner: bool) -> bool:
    """Whether a name, an attribute or a call leads to code that is not read."""
    if any(".".join(name.split(".")[:i]) in UNREADABLE for name in names for i in (1, 2, 3)):
        return True
    if isinstance(n, ast.Attribute) and n.attr in INSIDE:
        return True
    if isinstance(n, ast.Attribute) and n.attr == "__dict__" and names & {f"{name}.__dict__" for name in WHOLE}:
        return True
    if not owner and names & WHOLE:
        return True
    if isinstance(n, ast.Call):
        return False
    if isinstance(n, ast.Name) and (n.id in DIRECT or names & _ALIASED):
        return not called
    if any(name.split(".")[0] in ("builtins", "__builtins__") for name in names):
        return not called and not (owner and "builtins" in names)
    if isinstance(n, ast.Attribute) and (n.attr in DIRECT or names & IMPORT):
        return not called and not any(name.startswith(("torch.", "re.")) for name in names)
    return False


def _survey_call(reader: Reader, call: ast.Call, shown: str) -> None:
    code, names = reader.code, reader.spellings(call.func)
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if names & IMPORT:
        if call.args and isinstance(call.args[0], ast.Constant):
            code.imported.add(str(call.args[0].value).split(".")[0])
        else:
            code.computed.append(shown)
    safe = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
    for key, value in (safe[name] for name in names & safe.keys()):
        given = options.get(key, ast.Constant(value))
        if None in options or "pickle_module" in options or len(call.args) > 2 or not _is(given, value):
            code.unread.append(shown)
    if names & _ATTRIBUTES and call.args and not reader.constant_getattr(call):
        first = call.args[0]
        if isinstance(first, ast.Starred) or reader.spellings(first) & (reader.modules | WHOLE):
            code.unread.append(shown)
    method = isinstance(call.func, ast.Attribute) and call.func.attr in _READ_METHODS and not names & _READ
    file = call.func.value if method else call.args[0] if call.args else None
    if (method or names & _READ) and not (file and reader.given(file)):
        code.reads.append(shown)


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def bindings(tree: ast.AST, *, plain_imports: bool = True) -> Counter[str]:
    """How often a program binds each name, in any scope, or sets or deletes an attribute of that name. Without
    `plain_imports`, `import zlib` binds nothing: it gives the name the same value everywhere."""
    found: Counter[str] = Counter()
    for n in ast.walk(tree):
        match n:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                found[name] += 1
            case ast.Attribute(attr=name, ctx=ast.Store() | ast.Del()):
                found[name] += 1
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] += 1
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                found[name] += 1
            case ast.MatchMapping(rest=str(name)):
                found[name] += 1
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                found.update(names)
            case ast.alias() if plain_imports or n.asname or not _is_module(n):
                found[n.asname or n.name.split(".")[0]] += 1
            case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found[name] += 1
    return found


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _locals(tree: ast.AST) -> dict[int, set[str]]:
    """By the id of a node, the full names of what a function calls so itself, whatever the module calls so."""
    found: dict[int, set[str]] = {}
    waiting: list[tuple[ast.AST, dict[str, set[str]]]] = [(tree, {})]
    while waiting:
        node, known = waiting.pop()
        if isinstance(node, _SCOPES):
            known = known | _scope(node)
        if isinstance(node, ast.Name) and node.id in known:
            found[id(node)] = known[node.id]
        waiting += [(child, known) for child in ast.iter_child_nodes(node)]
    return found


def _scope(function: ast.AST) -> dict[str, set[str]]:
    """The names that a function binds itself: {name: full names}."""
    bound: dict[str, set[str]] = {}
    outside: set[str] = set()
    waiting = list(ast.iter_child_nodes(function))
    for n in waiting:  # grows
        if isinstance(n, ast.Global | ast.Nonlocal):
            outside |= set(n.names)
        for name, full in _bound_names(n):
            bound.setdefault(name, set()).add(full)
        if not isinstance(n, (*_SCOPES, ast.ClassDef)):
            waiting += ast.iter_child_nodes(n)
    return {name: full for name, full in bound.items() if name not in outside}


def _bound_names(n: ast.AST) -> list[tuple[str, str]]:
    """(name, full name) of what a parameter, a variable, an import or an alias of a builtin binds."""
    match n:
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
            return [(name, name)]
        case ast.Import():
            roots = [(a, a.name.split(".")[0]) for a in n.names]
            return [(a.asname or root, a.name if a.asname else root) for a, root in roots]
        case ast.ImportFrom():
            return [(a.asname or a.name, f"{n.module}.{a.name}") for a in n.names]
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=full)) if hasattr(builtins, full):
            return [(name, full)]
    return []


def _is_module(alias: ast.alias) -> bool:
    return alias.name.split(".")[0] in sys.stdlib_module_names


def _named(tree: ast.AST, folder: Path) -> set[str]:
    """Files of the folder that a program imports or that a text in it names."""
    names: set[str] = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            names |= {alias.name.split(".")[0] for alias in n.names}
        elif isinstance(n, ast.ImportFrom):
            names.add((n.module or "").split(".")[0])
        elif isinstance(n, ast.Constant) and isinstance(n.value, str | bytes) and len(n.value) < 200:
            names.add(n.value if isinstance(n.value, str) else n.value.decode("latin-1"))
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

    def __init__(self, folder: Path, code: Code, tree: ast.Module):
        self.folder, self.code, self.tree = folder, code, tree
        self.names: dict[str, Any] = {}
        self.looped: set[str] = set()
        """Of these the ones that the loop over the digits fills."""
        self.relied: set[str] = set()
        """Names by which values were read."""
        self.bound = bindings(tree)
        self.local = _locals(tree)
        self.modules: set[str] = set()
        self.imports: dict[str, list[str]] = {}
        """All that imports, and assignments of a builtin, anywhere bind to a name."""
        for n in ast.walk(tree):
            if isinstance(n, ast.Import | ast.ImportFrom | ast.Assign):
                for name, full in _bound_names(n):
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
                case ast.Assign(targets=[ast.Name(id=name)]) if self.bound[name] == 1 or _is(statement.value, 0):
                    with contextlib.suppress(Unread):
                        value = self.value(statement.value)
                        if isinstance(value, str | bytes | int) and self.bound[name] <= 2:
                            self.names[name] = value
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
                self.relied.add(node.id)
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


KNOWN = {"compile", "bytes", "memoryview", "open", "pathlib.Path", "io.open"}


def _inner(name: str) -> str:
    """Of `shutil.os.system`, os.system: modules have the modules that they import as attributes."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.lstrip("_") in _REACHED), default=0)
    return ".".join([parts[last].lstrip("_") if last else parts[0], *parts[last + 1 :]])


_REACHED = {"os", "sys", "builtins", "subprocess", "socket", "ctypes", "pickle", "marshal", "multiprocessing"}


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
