"""What is known of the whole program that a bundle is cut out of, and how known values are written down again."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

from golfgpt.submit.source import Package
from golfgpt.submit.trees import walk


class UNKNOWN:
    """The value of an expression that the configuration does not decide."""


class NOTHING:
    """The value of a function that does nothing, such as a progress callback by default."""


SEED = "constant:seed"
"""What stands for the seed of the run."""

OUTSIDE = "outside"
"""The type of what has no method of the package and gives nothing of it: tensors, strings, numbers, paths."""

DROPPED = {"ValueError", "TypeError", "RuntimeError", "golfgpt.errors:InputError"}

LEAVES = {"import:torch:Tensor", "import:pathlib:Path", "bytes", "memoryview"}
"""Classes whose objects hold and give nothing of the package."""
BUILTINS = {"len", "max", "min", "sum", "abs", "bool", "int", "float", "str", "tuple", "set", "frozenset", "sorted",
            "range", "dict", "list", "any", "all", "round"}  # fmt: skip


@dataclass
class Facts:
    """What is known of the whole program. Keys of functions are ids; of methods "module:Class.method"."""

    package: Package
    objects: dict[str, Any]
    """Class id -> the only object of that class."""
    agreed: dict[str, Mapping[str, Any]]
    """Class id -> attributes in which its objects agree."""
    pure: dict[str, Callable]
    """Functions that may be called now, when their arguments are known."""
    decided: dict[str, Callable] = field(default_factory=dict)
    """Functions that are decided where the arguments that count are known; the others may be UNKNOWN."""
    returns: dict[str, Any] = field(default_factory=dict)
    """Function -> its constant result."""
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Function -> parameter -> constant value."""
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    """(class id, attribute) -> constant value."""
    types: dict[tuple[str, str], str] = field(default_factory=dict)
    """(class id, attribute) -> class id."""
    never: set[str] = field(default_factory=set)
    """Classes without objects."""
    globals: dict[str, Any] = field(default_factory=dict)
    """Module constants -> value, or UNKNOWN."""
    final: bool = False
    """Objects of `objects` become None: nothing reads them any more."""
    hoisted: dict[str, tuple[ast.expr, Any]] = field(default_factory=dict)
    """Name -> expression and value, of what is written out once and used by name."""

    def class_of(self, value: Any) -> str | None:
        """The class id of one of `objects`."""
        return next((cls for cls, each in self.objects.items() if each is value), None)

    def only_raises(self, node: ast.FunctionDef) -> bool:
        """Whether all that a function does is to raise errors about the input."""
        raises = [n for n in walk(node) if isinstance(n, ast.Raise)]
        stores = [n for n in walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        return bool(raises) and not stores and all(map(dropped, raises))

    def type_of_annotation(self, node: ast.expr | None) -> str | None:
        """The class of the package that an annotation names, alone or beside None; OUTSIDE for others."""
        if isinstance(node, ast.Name) and (node.id in LEAVES or node.id in BUILTINS - {"tuple", "dict", "list", "set"}):
            return OUTSIDE
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("import:torch:", "import:numpy:")
        ):
            return OUTSIDE
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [s for s in (node.left, node.right) if not (isinstance(s, ast.Constant) and s.value is None)]
            return self.type_of_annotation(sides[0]) if len(sides) == 1 else None
        if isinstance(node, ast.Name) and ":" in node.id and not node.id.startswith("import:"):
            found = self.package.find(node.id)
            if not found or not isinstance(found.node, ast.ClassDef):
                return None
            protocol = any(isinstance(b, ast.Name) and b.id.endswith(":Protocol") for b in found.node.bases)
            return None if protocol else node.id
        return None

    def hoist(self, value: Any, hint: str) -> ast.expr | None:
        """The name of a module-wide constant with this value; None if it cannot be written down."""
        quoted = self.quote(value)
        if quoted is None:
            return None
        text = ast.dump(quoted)
        for name, (known, _) in self.hoisted.items():
            if ast.dump(known) == text:
                return ast.Name(name, ast.Load())
        name = f"constant:{hint}_{len(self.hoisted)}"
        self.hoisted[name] = quoted, value
        return ast.Name(name, ast.Load())

    def quote(self, value: Any) -> ast.expr | None:
        """An expression that makes `value`: plain values, containers, dataclasses and functions of the package, and
        functools.partial of these."""
        if is_literal(value):
            return literal(value)
        if type(value) in (list, tuple, set, frozenset):
            parts = [self.quote(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
            if None in parts:
                return None
            if type(value) is frozenset:
                return ast.Call(ast.Name("frozenset", ast.Load()), [ast.Tuple(parts, ast.Load())], [])
            if type(value) is set:
                return ast.Call(ast.Name("set", ast.Load()), [ast.Tuple(parts, ast.Load())], [])
            return (ast.List if type(value) is list else ast.Tuple)(parts, ast.Load())
        if type(value) is dict:
            pairs = [(self.quote(k), self.quote(v)) for k, v in value.items()]
            if any(None in pair for pair in pairs):
                return None
            return ast.Dict([k for k, _ in pairs], [v for _, v in pairs])
        if isinstance(value, partial):
            function, arguments = self.quote(value.func), [self.quote(a) for a in value.args]
            named = {name: self.quote(v) for name, v in value.keywords.items()}
            if function is None or None in arguments or None in named.values():
                return None
            keywords = [ast.keyword(name, v) for name, v in named.items()]
            return ast.Call(ast.Name("import:functools:partial", ast.Load()), [function, *arguments], keywords)
        if str(type(value)) == "<class 'torch.dtype'>":
            return ast.Attribute(ast.Name("import:torch:", ast.Load()), str(value).removeprefix("torch."), ast.Load())
        home = f"{getattr(value, '__module__', '')}:{getattr(value, '__name__', '')}"
        if callable(value) and self.package.find(home):
            return ast.Name(home, ast.Load())
        cls = f"{type(value).__module__}:{type(value).__name__}"
        if is_dataclass(value) and cls not in self.objects and self.package.find(cls):
            named = {f.name: getattr(value, f.name) for f in fields(value)}
            defaults = {f.name: f.default for f in fields(value)}
            shown = {
                name: self.quote(v) for name, v in named.items() if v is not defaults[name] and v != defaults[name]
            }
            if None in shown.values():
                return None
            return ast.Call(ast.Name(cls, ast.Load()), [], [ast.keyword(name, v) for name, v in shown.items()])
        return None


def dropped(statement: ast.stmt) -> bool:
    """Whether it raises an error about the input, and nothing else."""
    if not isinstance(statement, ast.Raise) or statement.exc is None:
        return False
    error = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
    return isinstance(error, ast.Name) and error.id in DROPPED


def is_literal(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(is_literal, value))
    if type(value) is float:
        return value == value and abs(value) != float("inf")
    return value is None or type(value) in (bool, int, str, bytes)


def literal(value: Any) -> ast.expr:
    if type(value) is tuple:
        return ast.Tuple([literal(item) for item in value], ast.Load())
    if type(value) in (int, float) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)
