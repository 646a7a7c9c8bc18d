"""What a packed script executes, found by reading it. Nothing of it is executed.

A small evaluator knows constants, names that were assigned known values, and the decoders that packers use. Its results
are bounded, so a file that unpacks to gigabytes is refused. What it cannot follow is reported, never guessed.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

from golfgpt.errors import InputError
from golfgpt.submit.names import bindings
from golfgpt.submit.reader import IMPORT, Code, Reader, Unread, is_constant, text_of

MAX_PROGRAMS = 16


def read_code(folder: Path, name: str = "train_gpt.py") -> Code:
    """Raises InputError for a file that is no Python, or that unpacks to more than `MAX_BYTES`."""
    code, waiting = Code(), [name]
    for file in waiting:  # grows
        _follow(code, folder, text_of(folder / file), file)
        waiting += sorted(other for other in code.files if other.endswith(".py") and other not in waiting)
    for names, inside in code.relied:
        others = [bound for i, bound in enumerate(code.bound) if i not in inside]
        code.unread += [f"{name}, which another text binds" for name in sorted(names) if any(o[name] for o in others)]
    return code


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
    _survey(reader, name)
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
DIRECT = {"exec", "eval", "compile", "__import__", "builtins", "__builtins__"}
"""Names that only a direct call may use, since reading follows no alias of them."""
_ALIASED = IMPORT | {f"builtins.{name}" for name in DIRECT}
UNREADABLE = {"runpy", "marshal", "ctypes", "_ctypes", "cffi", "dill", "cloudpickle", "joblib", "code", "codeop", "imp"}
UNREADABLE |= {"pickle.loads", "pickle.load", "pickle.Unpickler", "_pickle", "types.FunctionType", "types.LambdaType"}
UNREADABLE |= {"types.CodeType", "torch.hub", "torch.package", "torch.jit.load", "torch.ops.load_library", "zipimport"}
UNREADABLE |= {"torch.classes.load_library", "torch.utils.cpp_extension", "importlib.util", "importlib.machinery"}
UNREADABLE |= {"sys.modules", "sys._getframe", "timeit", "cProfile", "profile", "pdb", "bdb", "trace", "shelve"}
UNREADABLE |= {"linecache", "torch.cuda._compile_kernel", "torch.cuda._utils", "torch._inductor.codecache"}
UNREADABLE |= {f"triton.{name}" for name in ("compile", "compiler", "runtime", "backends", "tools.compile", "_C")}
"""Modules and functions that execute or build code which is no text of the program."""
_ATTRIBUTES = {"getattr", "setattr", "delattr"}
INSIDE = {"__globals__", "__builtins__", "__subclasses__", "f_globals", "f_builtins", "__loader__"}
"""Attributes that lead to every name of a module."""
SOURCES = {"_src", "raw_src"}
"""Attributes of a kernel with the text that Triton compiles. To set one is to replace the text."""
WHOLE = {"os", "sys", "importlib", "builtins", "pickle", "types", "torch", "base64", "lzma", "zlib", "triton"}
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


def _survey(reader: Reader, name: str) -> None:
    """Note the imports, loaders, aliases, connections and reads of files in one text, called `name`."""
    code = reader.code
    called = {id(n.func) for n in ast.walk(reader.tree) if isinstance(n, ast.Call)}
    calls = [n for n in ast.walk(reader.tree) if isinstance(n, ast.Call) and reader.spellings(n.func) & EXECUTE]
    passed = {id(arg.func) for call in calls for arg in call.args[1:] if isinstance(arg, ast.Call)}
    owners = {id(n.value) for n in ast.walk(reader.tree) if isinstance(n, ast.Attribute)}
    owners |= {id(n.args[0]) for n in ast.walk(reader.tree) if isinstance(n, ast.Call) and reader.constant_getattr(n)}
    shows = {id(n) for pair in itertools.pairwise(reader.tree.body) if _shows(reader, *pair) for n in ast.walk(pair[0])}
    for n in ast.walk(reader.tree):
        if id(n) in shows:
            continue
        if _star(n) or _other_code(n) or (isinstance(n, ast.Call) and _other_names(reader, n)):
            code.unread.append(ast.unparse(n)[:100])
        if not isinstance(n, ast.Name | ast.Attribute | ast.Call):
            continue
        names, shown = reader.spellings(n), f"line {n.lineno} of {name}: {ast.unparse(n)[:100]}"
        reached = isinstance(n, ast.Name) and names & {"globals", "locals"} and id(n) not in passed
        inside = _gives_inside(reader, n)
        if reached or inside or _hides_code(n, names, id(n) in called, id(n) in owners):
            code.unread.append(shown)
        last = {name.split(".")[-1] for name in names} | ({n.attr} if isinstance(n, ast.Attribute) else set())
        if last & _CONNECTS or any(_STARTS.fullmatch(x) or ("." in x and x.split(".")[0] in NETWORK) for x in names):
            code.network.append(shown)
        if isinstance(n, ast.Call):
            _survey_call(reader, n, shown)


def _shows(reader: Reader, statement: ast.stmt, after: ast.stmt) -> bool:
    """Whether a statement gives Triton, through linecache, the text that the one after it executes."""
    match after:
        case ast.Expr(
            ast.Call(ast.Name("exec"), [ast.Call(ast.Name("compile"), [ast.Name(text), ast.Constant(name), _])])
        ):
            same = f"linecache.cache[{name!r}] = (len({text}), None, {text}.splitlines(True), {name!r})"
            return text in reader.names and ast.unparse(statement) == same
    return False


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


def _gives_inside(reader: Reader, n: ast.expr) -> bool:
    """Whether an attribute, or a call of getattr or setattr with its name, leads to all names or replaces a text."""
    match n:
        case ast.Attribute(attr=name):
            sets = not isinstance(n.ctx, ast.Load)
        case ast.Call(args=[_, ast.Constant(value=name), *_]) if found := reader.spellings(n.func) & _ATTRIBUTES:
            sets = found != {"getattr"}
        case _:
            return False
    return name in INSIDE or name == "_unsafe_update_src" or (sets and name in SOURCES)


def _hides_code(n: ast.expr, names: set[str], called: bool, owner: bool) -> bool:
    """Whether a name, an attribute or a call leads to code that is not read."""
    if any(".".join(name.split(".")[:i]) in UNREADABLE for name in names for i in (1, 2, 3)):
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
        if None in options or "pickle_module" in options or len(call.args) > 2 or not is_constant(given, value):
            code.unread.append(shown)
    if names & _ATTRIBUTES and call.args and not reader.constant_getattr(call):
        first = call.args[0]
        if isinstance(first, ast.Starred) or reader.spellings(first) & (reader.modules | WHOLE):
            code.unread.append(shown)
    method = isinstance(call.func, ast.Attribute) and call.func.attr in _READ_METHODS and not names & _READ
    file = call.func.value if method else call.args[0] if call.args else None
    if (method or names & _READ) and not (file and reader.given(file)):
        code.reads.append(shown)


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
