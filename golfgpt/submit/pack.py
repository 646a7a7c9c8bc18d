"""The counted train_gpt.py: a readable program, minified, compressed, and written as text that unpacks itself.

    import lzma
    n=0
    for c in rb'''…''':n=n*95+c-32
    exec(lzma.decompress(n.to_bytes(…,"big"),…))

A program with kernels has its text in linecache too, where Triton looks for it:

    t=lzma.decompress(…).decode()
    linecache.cache['k']=len(t),None,t.splitlines(True),'k'
    exec(compile(t,'k','exec'))

The bytes are one number in base 95, whose digits are the printable characters of ASCII. A digit holds 6.57 bits, one
of base 85 holds 6.41; this saves 2.4 percent of the file. Reading 22 kB takes 0.1 s. `exec` runs in the module's own
namespace, so that __file__ and __name__ are those of the file.
"""

from __future__ import annotations

import ast
import itertools
import lzma
import math
import zlib
from collections.abc import Iterator

BASE = 95


def packed(source: str) -> bytes:
    """The smallest file found that runs `source`. Raises ImportError if python-minifier is not installed, SyntaxError
    if `source` is no Python."""
    text, needs = minified(source), imports(source)
    candidates = sorted(_compressed(text, "brotli" in needs), key=lambda c: math.log(256, BASE) * len(c[1]) + len(c[2]))
    return next(filter(None, (_file(*candidate, kernels="triton" in needs) for candidate in candidates)))


def minified(source: str) -> str:
    """`source` with short names and without docstrings and annotations. Names of attributes and arguments stay."""
    import python_minifier

    tree = ast.parse(source)
    kernels = [node for node in tree.body if "jit" in map(ast.unparse, getattr(node, "decorator_list", []))]
    parameters = [arg.arg for kernel in kernels for arg in kernel.args.args]
    of_kernels = {id(n) for kernel in kernels for n in ast.walk(kernel)}
    for node in ast.walk(tree):
        if id(node) in of_kernels:  # Triton reads their annotations
            continue
        if isinstance(node, ast.FunctionDef) and not any("custom_op" in ast.dump(d) for d in node.decorator_list):
            node.returns = None  # torch derives the schema of a custom op from its annotations
            every = node.args
            for arg in [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]:
                if arg:
                    arg.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)  # a field of a dataclass needs one, whatever it says
    text = python_minifier.minify(
        ast.unparse(tree),
        remove_annotations=python_minifier.RemoveAnnotationsOptions(
            remove_variable_annotations=not kernels,
            remove_return_annotations=False,
            remove_argument_annotations=False,
            remove_class_attribute_annotations=False,
        ),
        remove_literal_statements=True,
        rename_globals=True,
        preserve_locals=parameters,  # else the minifier copies them to short names, and a constant's copy is a tensor
        preserve_globals=["tl"],  # Triton's interpreter knows a constant by the annotation tl.constexpr only
        hoist_literals=False,  # LZMA finds them itself: 120 bytes less
    )
    for node in ast.walk(tree):
        if not node._fields:  # Load and the like are one object for all trees, and the minifier leaves its own tree
            vars(node).clear()  # hanging from them: a later copy of any tree would copy that too
    return text


def imports(source: str) -> set[str]:
    """The top-level names of the modules that a program imports by name, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str()):
                found.add(node.module)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str()), *_],
            ):
                found.add(node.args[0].value)
    return {name.split(".")[0] for name in found}


def _compressed(text: str, has_brotli: bool) -> Iterator[tuple[str, bytes, str]]:
    """(import, compressed bytes, call that decompresses `x`) of every candidate."""
    data = text.encode()
    yield "zlib", zlib.compress(data, 9), "zlib.decompress(x)"
    if has_brotli:  # the program needs it in any case
        import brotli

        yield "brotli", brotli.compress(data, mode=brotli.MODE_TEXT), "brotli.decompress(x)"
    for lc, nice in itertools.product((2, 3, 4), (64, 128, 273)):
        filters = {"preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "pb": 0, "nice_len": nice}
        one, two = ([{"id": id, **filters}] for id in (lzma.FILTER_LZMA1, lzma.FILTER_LZMA2))
        yield "lzma", lzma.compress(data, lzma.FORMAT_ALONE, filters=one), "lzma.decompress(x)"
        yield "lzma", lzma.compress(data, lzma.FORMAT_RAW, filters=two), "lzma.decompress(x,3,None,[{'id':33}])"


def execution(call: str, kernels: bool) -> str:
    """The lines that execute what `call` decompresses."""
    if not kernels:
        return f"exec({call})"
    return f"t={call}.decode()\nlinecache.cache['k']=len(t),None,t.splitlines(True),'k'\nexec(compile(t,'k','exec'))"


def _file(module: str, code: bytes, call: str, *, kernels: bool) -> bytes | None:
    """The file that unpacks `code`; None if its digits would end the literal that they stand in."""
    digits = to_digits(code)
    fitting = (q for q in (b"'", b'"') if q * 3 not in digits and not digits.endswith((q, b"\\")))
    if (quote := next(fitting, None)) is None:
        return None
    call = call.replace("x", f"n.to_bytes({len(code)},'big')", 1)
    modules = f"{module},linecache" if kernels else module
    first, last = f"import {modules}\nn=0\nfor c in rb".encode(), f":n=n*95+c-32\n{execution(call, kernels)}\n".encode()
    return first + quote * 3 + digits + quote * 3 + last


def to_digits(data: bytes) -> bytes:
    """The big-endian number `data` in base 95, each digit plus 32."""
    number, digits = int.from_bytes(data, "big"), bytearray()
    while number:
        number, digit = divmod(number, BASE)
        digits.append(digit + 32)
    return bytes(digits[::-1])


def from_digits(digits: bytes, length: int) -> bytes:
    """The inverse of `to_digits`. Raises OverflowError if the number has more than `length` bytes."""
    number = 0
    for digit in digits:
        number = number * BASE + digit - 32
    return number.to_bytes(length, "big")
