"""Partial evaluation of the package for one run: what its configuration decides is decided here, in the syntax trees.

    config.skip_gates and n > 0        ->  n > 0                   with skip_gates true
    if planned.xsa: …                  ->  nothing                 if no layer of the plan has it
    parameter_table(config)            ->  the table, written out

An expression is known if it follows from `Facts`: the configuration (a run has one object of each config class, so an
annotation tells which), fields in which all objects of a class agree (`LayerPlan`, `TensorFormat`, `RowQuant`), and
arguments and attributes that have one constant value in the whole program. Everything else is left as it is. Checks
whose only effect is an error about the input (`DROPPED`) go: packing made them with the package itself.
"""

from __future__ import annotations

import ast
import builtins
import copy
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from golfgpt.submit.source import Package, bound_in


class UNKNOWN:
    """The value of an expression that the configuration does not decide."""


class NOTHING:
    """The value of a function that does nothing, such as a progress callback by default."""


DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
"""Expressions that make a new object, which may be changed."""

FOLDED = (
    ast.Attribute, ast.Call, ast.Name, ast.Compare, ast.BoolOp, ast.IfExp, ast.BinOp, ast.UnaryOp, ast.Subscript
)  # fmt: skip
"""Expressions that are replaced by their value."""

SEED = "constant:seed"
"""What stands for the seed of the run."""

OUTSIDE = "outside"
"""The type of what has no method of the package and gives nothing of it: tensors, strings, numbers, paths."""

DROPPED = {"ValueError", "TypeError", "RuntimeError", "golfgpt.errors:InputError"}

BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
}  # fmt: skip
COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
LEAVES = {"import:torch:Tensor", "import:pathlib:Path", "bytes", "memoryview", "import:golfgpt_kernels:"}
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
        raises = [n for n in ast.walk(node) if isinstance(n, ast.Raise)]
        stores = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
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


class Scope:
    """Names of a function, with the scopes around it."""

    def __init__(self, names: set[str], stores: Counter, owner: str | None = None):
        self.names, self.stores, self.owner = names, stores, owner
        self.values: dict[str, Any] = {}
        self.types: dict[str, str] = {}


@dataclass
class Seen:
    """What a definition does to others."""

    calls: list[tuple[str | None, str, list | None, dict | None]] = field(default_factory=list)
    """(class of a method or None, function id or name of the method, values of the arguments in order and by name;
    None where there are * or **)."""
    escapes: set[tuple[str | None, str]] = field(default_factory=set)
    """Functions, and methods as above, that are used other than by a call."""
    stores: list[tuple[str | None, str, Any, str | None]] = field(default_factory=list)
    """(class, attribute, value, class of the value) of assignments to attributes."""


class Fold(ast.NodeTransformer):
    """Folds one definition. `id` is its own, as in Facts."""

    def __init__(self, facts: Facts, id: str):
        self.facts, self.id = facts, id
        self.scopes: list[Scope] = []
        self.classes: list[str] = []
        self.seen = Seen()
        self.hoists = True
        self.memo: dict[int, tuple[ast.AST, Any]] = {}
        self.type_memo: dict[int, tuple[ast.AST, str | None]] = {}

    # What an expression is

    def lookup(self, name: str, table: str) -> Any:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return getattr(scope, table).get(name, UNKNOWN if table == "values" else None)
        return UNKNOWN if table == "values" else None

    def value(self, node: ast.AST | None) -> Any:
        """The value of an expression, or UNKNOWN."""
        method = VALUES.get(type(node))
        if method is None:
            return UNKNOWN
        known = self.memo.get(id(node))
        if known is None or known[0] is not node:
            try:
                value = method(self, node)
            except (TypeError, ArithmeticError, LookupError, AttributeError, ValueError):
                value = UNKNOWN  # it will raise where it is, or is not what it seems
            known = self.memo[id(node)] = node, value
        return known[1]

    def value_Constant(self, node: ast.Constant) -> Any:
        return node.value

    def value_Name(self, node: ast.Name) -> Any:
        if node.id in self.facts.hoisted:
            return self.facts.hoisted[node.id][1]
        if ":" in node.id:
            known = self.facts.globals
            if node.id not in known:
                known[node.id], found = UNKNOWN, self.facts.package.find(node.id)
                if found and isinstance(found.node, ast.Assign) and not isinstance(found.node.targets[0], ast.Name):
                    found = None
                if found and isinstance(found.node, ast.Assign) and len(found.node.targets) > 1:
                    found = None
                if found and isinstance(found.node, ast.Assign | ast.AnnAssign) and found.node.value is not None:
                    value = Fold(self.facts, node.id).value(found.node.value)
                    known[node.id] = value if is_literal(value) else UNKNOWN
            return known[node.id]
        return self.lookup(node.id, "values")

    def value_Attribute(self, node: ast.Attribute) -> Any:
        base = self.value(node.value)
        if self.is_seed(node):
            return UNKNOWN
        if self.facts.class_of(base) or is_plain(base):
            found = getattr(base, node.attr, UNKNOWN)
            return UNKNOWN if callable(found) and not isinstance(found, partial) else found
        if base is not UNKNOWN or (cls := self.type_of(node.value)) is None:
            return UNKNOWN
        if node.attr in self.facts.agreed.get(cls, ()):
            return self.facts.agreed[cls][node.attr]
        kind = self.facts.types.get((cls, node.attr))
        return self.facts.attributes.get((cls, node.attr), self.facts.objects.get(kind, UNKNOWN))

    def is_seed(self, node: ast.AST) -> bool:
        """Whether it is the seed of the run, which the program takes from its environment."""
        is_name = isinstance(node, ast.Attribute) and node.attr == "seed" and SEED in self.facts.hoisted
        return is_name and (self.facts.class_of(self.value(node.value)) or "").endswith(":RunConfig")

    def value_Lambda(self, node: ast.Lambda) -> Any:
        return NOTHING if isinstance(node.body, ast.Constant) and node.body.value is None else UNKNOWN

    def value_Tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Any:
        values = [self.value(part) for part in node.elts]
        return UNKNOWN if UNKNOWN in values else {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)](values)

    value_List = value_Set = value_Tuple

    def value_Dict(self, node: ast.Dict) -> Any:
        pairs = [(self.value(k), self.value(v)) for k, v in zip(node.keys, node.values, strict=True)]
        return UNKNOWN if any(UNKNOWN in pair for pair in pairs) else dict(pairs)

    def value_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if value is UNKNOWN:
            return UNKNOWN
        return {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.inv}[
            type(node.op)
        ](value)

    def value_BinOp(self, node: ast.BinOp) -> Any:
        a, b = self.value(node.left), self.value(node.right)
        return UNKNOWN if UNKNOWN in (a, b) or type(node.op) not in BINARY else BINARY[type(node.op)](a, b)

    def value_BoolOp(self, node: ast.BoolOp) -> Any:
        is_and, result = isinstance(node.op, ast.And), UNKNOWN
        for part in node.values:
            result = self.value(part)
            if result is UNKNOWN:
                return UNKNOWN
            if bool(result) != is_and:
                return result
        return result

    def value_Compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = self.value(part)
            if left is UNKNOWN or right is UNKNOWN:
                return UNKNOWN
            if not COMPARE[type(op)](left, right):
                return False
            left = right
        return True

    def value_IfExp(self, node: ast.IfExp) -> Any:
        test = self.value(node.test)
        return UNKNOWN if test is UNKNOWN else self.value(node.body if test else node.orelse)

    def value_Subscript(self, node: ast.Subscript) -> Any:
        base, index = self.value(node.value), self.value(node.slice)
        if base is UNKNOWN and self.classes and isinstance(node.value, ast.Name) and node.value.id == "group":
            return self.facts.attributes.get((self.classes[-1], f"[{index}]"), UNKNOWN)
        return UNKNOWN if base is UNKNOWN or index is UNKNOWN else base[index]

    def value_Call(self, node: ast.Call) -> Any:
        function = node.func
        if isinstance(function, ast.Name) and function.id in self.facts.returns:
            return self.facts.returns[function.id]
        if isinstance(function, ast.Name) and function.id in self.facts.objects:
            return self.facts.objects[function.id]
        if self.value(function) is NOTHING:
            return None
        if isinstance(function, ast.Attribute):
            method = f"{self.type_of(function.value)}.{function.attr}"
            if method in self.facts.returns:
                return self.facts.returns[method]
        if isinstance(function, ast.Name) and function.id == "isinstance":
            asked, value = node.args[1], self.value(node.args[0])
            if isinstance(asked, ast.Name) and asked.id == "import:torch:Tensor" and is_plain(value):
                return False
            return False if isinstance(asked, ast.Name) and asked.id in self.facts.never else UNKNOWN
        arguments = [self.value(part) for part in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        if any(value is UNKNOWN for value in (*arguments, *named.values())) or None in named:
            return UNKNOWN
        if isinstance(function, ast.Name) and function.id == "import:dataclasses:replace":
            same = self.facts.class_of(arguments[0]) and replace(arguments[0], **named) == arguments[0]
            return arguments[0] if same else UNKNOWN
        if isinstance(function, ast.Name) and function.id in self.facts.pure:
            return self.facts.pure[function.id](*arguments, **named)
        if isinstance(function, ast.Name) and function.id in BUILTINS and not named:
            return getattr(builtins, function.id)(*arguments)
        if isinstance(function, ast.Attribute):
            base = self.value(function.value)
            if self.facts.class_of(base) or is_plain(base):
                return getattr(base, function.attr)(*arguments, **named)
        return UNKNOWN

    def type_of(self, node: ast.AST) -> str | None:
        known = self.type_memo.get(id(node))
        if known is None or known[0] is not node:
            known = self.type_memo[id(node)] = node, self._type_of(node)
        return known[1]

    def forget(self) -> None:
        """Names have other values from here on."""
        self.memo.clear()
        self.type_memo.clear()

    def _type_of(self, node: ast.AST) -> str | None:
        """The class of the package that the value of an expression is an object of."""
        value = self.value(node)
        if value is not UNKNOWN:
            plain = is_plain(value) and not isinstance(value, tuple | list | dict)
            return OUTSIDE if plain else self.facts.class_of(value)
        if isinstance(node, ast.JoinedStr | ast.Compare):
            return OUTSIDE
        if isinstance(node, ast.IfExp):
            kinds = {self.type_of(node.body), self.type_of(node.orelse)}
            return kinds.pop() if len(kinds) == 1 else None
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Subscript):
            sides = (
                [node.left, node.right]
                if isinstance(node, ast.BinOp)
                else [getattr(node, "operand", None) or node.value]
            )
            return OUTSIDE if OUTSIDE in map(self.type_of, sides) else None
        if isinstance(node, ast.Name):
            return self.lookup(node.id, "types")
        if isinstance(node, ast.Attribute):
            cls = self.type_of(node.value)
            return cls if cls == OUTSIDE else cls and self.facts.types.get((cls, node.attr))
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                if node.func.attr in ("to", "eval", "detach", "_replace"):
                    return self.type_of(node.func.value)
                if isinstance(node.func.value, ast.Name) and self.facts.type_of_annotation(node.func.value):
                    return self.facts.types.get((node.func.value.id, node.func.attr))
                base = node.func.value
                if isinstance(base, ast.Name) and base.id.startswith("import:"):
                    return self.type_of(node.args[0]) if node.func.attr == "compile" else OUTSIDE
                cls = self.type_of(base)
                return cls if cls == OUTSIDE else cls and self.facts.types.get((cls, node.func.attr))
            if isinstance(node.func, ast.Name) and ":" in node.func.id:
                found = self.facts.package.find(node.func.id)
                if found and isinstance(found.node, ast.ClassDef):
                    return node.func.id
                if found and isinstance(found.node, ast.FunctionDef):
                    return self.facts.type_of_annotation(found.node.returns)
        return None

    # Expressions

    def visit(self, node: ast.AST) -> Any:
        reads = isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
        value = self.value(node) if reads and isinstance(node, FOLDED) else UNKNOWN
        if value is not UNKNOWN:
            if is_literal(value):
                return literal(value)
            if self.facts.final and self.facts.class_of(value):
                return ast.Constant(None)
            if self.hoists and self.lasts(node, value) and (found := self.facts.hoist(value, hint(node))) is not None:
                return found
        return super().visit(node)

    def lasts(self, node: ast.expr, value: Any) -> bool:
        """Whether the value may be made once: it cannot change, or the package makes it once too."""
        if isinstance(node, ast.Name):
            return False
        if isinstance(value, list | dict | set):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.facts.pure
            return called or isinstance(node, ast.Attribute)
        return True

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        is_and, as_test, kept = isinstance(node.op, ast.And), self.as_test, []
        for i, part in enumerate(node.values):
            part = self.test(part) if as_test else self.plain(part)
            value = self.value(part)
            if value is UNKNOWN:
                kept.append(part)
            elif bool(value) != is_and:  # it decides
                if as_test and all(map(pure, kept)):
                    return ast.Constant(not is_and)
                kept.append(part)
                break
            elif i == len(node.values) - 1 and not as_test:
                kept.append(part)
        if not kept:
            return ast.Constant(is_and)
        return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)

    as_test = False

    def test(self, node: ast.expr) -> ast.expr:
        """A folded expression of which only the truth matters."""
        before, self.as_test = self.as_test, True
        node = self.visit(node)
        self.as_test = before
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        node.operand = self.test(node.operand) if isinstance(node.op, ast.Not) else self.plain(node.operand)
        return node

    def plain(self, node: ast.expr) -> ast.expr:
        before, self.as_test = self.as_test, False
        node = self.visit(node)
        self.as_test = before
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        before, self.as_test = self.as_test, False
        node = super().generic_visit(node)
        self.as_test = before
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = self.test(node.test)
        value = self.value(node.test)
        if value is not UNKNOWN:
            return self.plain(node.body if value else node.orelse)
        node.body, node.orelse = self.plain(node.body), self.plain(node.orelse)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node = self.generic_visit(node)
        index = self.value(node.slice)
        table = node.value
        if isinstance(table, ast.Name) and ":" in table.id and (found := self.facts.package.find(table.id)):
            table = getattr(found.node, "value", None)
        if index is not UNKNOWN and isinstance(table, ast.Dict) and isinstance(node.ctx, ast.Load):
            for key, value in zip(table.keys, table.values, strict=True):
                if key is not None and self.value(key) == index:
                    return copy.deepcopy(value)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        node = self.generic_visit(node)
        inside = [n for part in node.values if isinstance(part, ast.FormattedValue) for n in ast.walk(part.value)]
        if not any(isinstance(n, ast.Constant) and "\\" in repr(n.value) for n in inside):
            return node
        parts = []  # Python before 3.12 has no backslashes inside the braces
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                shown = part.value
                if part.conversion == ord("r"):
                    shown = ast.Call(ast.Name("repr", ast.Load()), [shown], [])
                part = ast.Call(ast.Name("format", ast.Load()), [shown, part.format_spec or ast.Constant("")], [])
            parts.append(part)
        return ast.Call(ast.Attribute(ast.Constant(""), "join", ast.Load()), [ast.List(parts, ast.Load())], [])

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        node.value = self.plain(node.value)
        value = self.value(node.value)
        return ast.Constant(value) if type(value) is str and not node.format_spec and node.conversion == -1 else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute) and (cls := self.facts.class_of(self.value(node.func.value))):
            # A method of the configuration with arguments that are not known: a function of its own.
            name = f"{cls}.{node.func.attr}"
            node.func, node.args = ast.Name(name, ast.Load()), [ast.Constant(None), *node.args]
        if isinstance(node.func, ast.Attribute):
            node.func.value = self.plain(node.func.value)
        elif not isinstance(node.func, ast.Name):
            node.func = self.plain(node.func)
        kinds = isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        node.args = [part if kinds and i else self.plain(part) for i, part in enumerate(node.args)]
        for keyword in node.keywords:
            keyword.value = self.plain(keyword.value)
        self._record(node)
        return node

    def _record(self, node: ast.Call) -> None:
        starred = any(isinstance(part, ast.Starred) for part in node.args)
        positional = None if starred else [self.value(part) for part in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        by_name = named  # None is among the names of a call with **
        if isinstance(node.func, ast.Attribute):
            cls = self.type_of(node.func.value)
            if isinstance(node.func.value, ast.Name) and self.facts.type_of_annotation(node.func.value):
                cls = node.func.value.id
            self.seen.calls.append((cls, node.func.attr, positional, by_name))
        elif isinstance(node.func, ast.Name):
            self.seen.calls.append(("", node.func.id, positional, by_name))
        anonymous = not (isinstance(node.func, ast.Name) and ":" in node.func.id)
        if anonymous and ":" in (cls := self.type_of(node.func) or ""):
            self.seen.calls.append((cls, "__call__", positional, by_name))
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("_replace", "import:dataclasses:replace"):
            for key, value in named.items():
                self.seen.stores.append((None, key or "", value, None))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if ":" in node.id and isinstance(node.ctx, ast.Load):
            self.seen.escapes.add((None, node.id))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if self.is_seed(node):
            return ast.Name(SEED, ast.Load())
        node.value = self.plain(node.value)
        base = self.value(node.value)
        if (
            isinstance(node.ctx, ast.Load)
            and (cls := self.facts.class_of(base))
            and callable(getattr(base, node.attr, None))
        ):
            method = f"{cls}.{node.attr}"  # of the configuration, used as a value
            self.seen.escapes.add((None, method))
            bound = [ast.Name(method, ast.Load()), ast.Constant(None)]
            return ast.Call(ast.Name("import:functools:partial", ast.Load()), bound, [])
        if isinstance(node.ctx, ast.Load):
            self.seen.escapes.add((self.type_of(node.value), node.attr))
        elif isinstance(node.ctx, ast.Store):
            self.seen.stores.append((self.type_of(node.value), node.attr, UNKNOWN, None))
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.iter = self.plain(node.iter)
        node.ifs = [
            test for test in map(self.test, node.ifs) if not (self.value(test) is not UNKNOWN and self.value(test))
        ]
        return node

    # Scopes

    def _scope(self, node: ast.AST) -> ast.AST:
        self.scopes.append(Scope(bound_in(node), Counter()))
        self.forget()
        if isinstance(node, ast.Lambda):
            self._parameters(node, {})
        node = self.generic_visit(node)
        self.scopes.pop()
        self.forget()
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda = _scope

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.classes.append(self.id)
        self.scopes.append(Scope(set(), Counter()))
        self.generic_visit(node)
        self.scopes.pop()
        self.classes.pop()
        return node

    def _parameters(self, node: ast.FunctionDef | ast.Lambda, known: Mapping[str, Any]) -> None:
        scope = self.scopes[-1]
        stores = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            cls = self.facts.type_of_annotation(arg.annotation)
            if cls and not stores[arg.arg]:
                scope.types[arg.arg] = cls
                whole = isinstance(arg.annotation, ast.Name)
                if cls in self.facts.objects and whole:
                    scope.values[arg.arg] = self.facts.objects[cls]
            if arg.arg in known and not stores[arg.arg]:
                scope.values.setdefault(arg.arg, known[arg.arg])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        nested = any(isinstance(scope, Scope) and scope.owner for scope in self.scopes)
        method = bool(self.classes) and not nested
        key = f"{self.id}.{node.name}" if method else self.id if not nested else ""
        self.hoists = False  # defaults are evaluated before the constants
        node.args.defaults = [self.plain(part) for part in node.args.defaults]
        node.args.kw_defaults = [part and self.plain(part) for part in node.args.kw_defaults]
        self.hoists = True
        scope = Scope(bound_in(node), stores_of(node), owner=node.name)
        self.scopes.append(scope)
        self.forget()
        self._parameters(node, self.facts.arguments.get(key, {}))
        static = any(isinstance(d, ast.Name) and d.id in ("staticmethod", "classmethod") for d in node.decorator_list)
        if method and not static and node.args.args:
            first = node.args.args[0].arg
            scope.types[first] = self.classes[-1]
            if self.classes[-1] in self.facts.objects:
                scope.values[first] = self.facts.objects[self.classes[-1]]
        node.body = self.block(node.body)
        tidy(node)
        self.scopes.pop()
        self.forget()
        return node

    # Statements

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for statement in body:
            self.forget()
            found = self.visit(statement)
            out += found if isinstance(found, list) else [] if found is None else [found]
            if out and isinstance(out[-1], ast.Return | ast.Raise | ast.Continue | ast.Break):
                break
        return out

    def visit_Assign(self, node: ast.Assign) -> Any:
        target = node.targets[0]
        if len(node.targets) == 1 and isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            stored_attributes = {ast.unparse(t) for t in target.elts if isinstance(t, ast.Attribute)}
            reads = {ast.unparse(n) for n in ast.walk(node.value) if isinstance(n, ast.Attribute)}
            simple = not any(isinstance(part, ast.Starred) for part in (*target.elts, *node.value.elts))
            stores = {
                n.id
                for t in target.elts
                for n in ast.walk(t)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            if simple and not (stores & read) and not (stored_attributes & reads) and names:
                pairs = zip(target.elts, node.value.elts, strict=True)
                return self.block([ast.Assign([t], v, lineno=0) for t, v in pairs])
        before = self.value(node.value)
        node.value = self.plain(node.value)
        if len(node.targets) == 1 and isinstance(target, ast.Attribute):
            target.value = self.plain(target.value)
            self._store(target, node.value)
            return node
        node.targets = [self.visit(t) for t in node.targets]
        if (
            self.classes
            and isinstance(target, ast.Name)
            and target.id == "defaults"
            and isinstance(node.value, ast.Call)
        ):
            for keyword in node.value.keywords:  # of an optimizer's groups
                self.seen.stores.append((self.classes[-1], f"[{keyword.arg}]", self.value(keyword.value), None))
        if len(node.targets) == 1 and isinstance(target, ast.Name) and self.scopes:
            self._bind(target.id, node.value, before)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = node.value and self.plain(node.value)
        if isinstance(node.target, ast.Attribute):
            node.target.value = self.plain(node.target.value)
            self._store(node.target, node.value)
        elif node.value is not None and self.scopes and not self._in_class():
            self._bind(node.target.id, node.value)
        return node

    def _in_class(self) -> bool:
        return bool(self.classes) and not any(scope.owner for scope in self.scopes)

    def _store(self, target: ast.Attribute, value: ast.expr | None) -> None:
        """Record an assignment to an attribute; what may change afterwards has no value."""
        known = UNKNOWN if isinstance(value, DISPLAYS) else self.value(value)
        self.seen.stores.append((self.type_of(target.value), target.attr, known, self.type_of(value)))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.AST:
        node.value = self.plain(node.value)
        return node

    def _bind(self, name: str, value: ast.expr, before: Any = UNKNOWN) -> None:
        """Note what a name stands for; `before`: the value when `value` was not folded yet."""
        scope = self.scopes[-1]
        if scope.stores[name] == 1:
            known, cls = self.value(value), self.type_of(value)
            if self.facts.class_of(before):
                known = before
            if known is not UNKNOWN and not isinstance(value, DISPLAYS):
                scope.values[name] = known
                self.forget()
            if cls:
                scope.types[name] = cls

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.test(node.test)
        value = self.value(node.test)
        if value is not UNKNOWN:
            return self.block(node.body if value else node.orelse)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        *before, last = node.body or [ast.Pass()]
        only_raises = dropped(last) and all(isinstance(part, ast.Assign) and pure(part.value) for part in before)
        walrus = any(isinstance(n, ast.NamedExpr) for n in ast.walk(node.test))
        if only_raises and not walrus:
            return node.orelse
        if only_raises and walrus and not node.orelse:
            names = {n.target.id for n in ast.walk(node.test) if isinstance(n, ast.NamedExpr)}
            scope = next((s for s in reversed(self.scopes) if s.owner), None)
            if scope and not any(self.read_elsewhere(name, node) for name in names):
                return None
        if not node.body and not node.orelse:
            return None if pure(node.test) else ast.Expr(node.test)
        if not node.body:
            return ast.If(ast.UnaryOp(ast.Not(), node.test), node.orelse, [])
        return node

    def read_elsewhere(self, name: str, node: ast.AST) -> bool:
        inside = sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
        return self.reads[name] > inside

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):  # what a message is computed from need not be in the program
            node.exc.args = [part for part in map(self.plain, node.exc.args) if pure(part)]
        return node

    def visit_Try(self, node: ast.Try) -> Any:
        node.body = self.block(node.body)
        for handler in node.handlers:
            handler.body = self.block(handler.body)
        node.orelse, node.finalbody = self.block(node.orelse), self.block(node.finalbody)
        if not node.orelse and not node.finalbody and all(
            len(h.body) == 1 and dropped(h.body[0]) for h in node.handlers
        ):  # fmt: skip
            return node.body
        return node

    def visit_For(self, node: ast.For) -> Any:
        node.iter = self.plain(node.iter)
        value = self.value(node.iter)
        if value is not UNKNOWN and not len(value) and not node.orelse:
            return None
        node.target = self.visit(node.target)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        if all(isinstance(part, ast.Pass) for part in node.body) and not node.orelse and pure(node.iter):
            return None
        node.body = node.body or [ast.Pass()]
        return node

    def visit_While(self, node: ast.While) -> Any:
        node.test = self.test(node.test)
        node.body = self.block(node.body) or [ast.Pass()]
        return node

    def visit_With(self, node: ast.With) -> Any:
        for item in node.items:
            item.context_expr = self.plain(item.context_expr)
        node.body = self.block(node.body) or [ast.Pass()]
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Constant):
            return node  # a docstring
        node.value = self.plain(node.value)
        return None if pure(node.value) or self.only_checks(node.value) else node

    def only_checks(self, node: ast.expr) -> bool:
        """Whether it calls a function named check_… that does nothing but raise errors about the input."""
        if not isinstance(node, ast.Call):
            return False
        name, found = "", None
        if isinstance(node.func, ast.Name) and ":" in node.func.id:
            found = self.facts.package.find(node.func.id)
        elif isinstance(node.func, ast.Attribute) and (cls := self.type_of(node.func.value)) and ":" in cls:
            found = self.facts.package.find(f"{cls}.{node.func.attr}")
        if found is None or not isinstance(found.node, ast.FunctionDef):
            return False
        name = found.id.replace(".", ":").rpartition(":")[2].lstrip("_")
        raises = [n for n in ast.walk(found.node) if isinstance(n, ast.Raise)]
        calls = [n.value for n in ast.walk(found.node) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        return name.startswith("check") and all(map(dropped, raises)) and (
            bool(raises) or all(self.only_checks(call) for call in calls)
        )  # fmt: skip

    def run(self, node: ast.stmt) -> ast.stmt:
        """Fold a top-level statement, in place."""
        self.reads = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        found = self.visit(node)
        return found


VALUES = {
    getattr(ast, name.removeprefix("value_")): method
    for name, method in vars(Fold).items()
    if name.startswith("value_")
}


def is_plain(value: Any) -> bool:
    return type(value) in (str, tuple, list, dict, frozenset, set, range, int, float, bool)


def hint(node: ast.AST) -> str:
    """A name for the value of an expression."""
    node = node.func if isinstance(node, ast.Call) else node
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    return node.id.rpartition(":")[2].strip("_") if isinstance(node, ast.Name) else "value"


def pure(node: ast.AST) -> bool:
    """Whether evaluating the expression has no effect."""
    for n in ast.walk(node):
        if isinstance(n, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
        if isinstance(n, ast.Call):
            name = n.func.id if isinstance(n.func, ast.Name) else getattr(n.func, "attr", "")
            if name not in (
                WITHOUT_EFFECT if isinstance(n.func, ast.Attribute) else BUILTINS | {"isinstance", "zip", "enumerate"}
            ):
                return False
    return True


WITHOUT_EFFECT = {
    "values",
    "items",
    "keys",
    "get",
    "size",
    "numel",
    "perf_counter",
    "startswith",
    "is_contiguous",
    "new_empty",
}


def stores_of(node: ast.FunctionDef) -> Counter:
    """How often each name is bound in a function, its scopes inside included."""
    found = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
    found.update(n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name))
    for n in ast.walk(node):
        if isinstance(n, ast.Global | ast.Nonlocal):
            found.update(n.names)
    return found


def tidy(node: ast.FunctionDef) -> None:
    """Drop assignments to local names that nothing reads, and give an empty body a statement."""
    while True:
        read = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store))
        read.update(
            n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)
        )
        kept = {name for n in ast.walk(node) if isinstance(n, ast.Global | ast.Nonlocal) for name in n.names}
        dropper = _Drop({*read, *kept})
        dropper.body_of(node)
        if not dropper.dropped:
            return


class _Drop(ast.NodeTransformer):
    def __init__(self, read: set[str]):
        self.read, self.dropped = read, 0

    def body_of(self, node: ast.FunctionDef) -> None:
        node.body = [found for part in node.body if (found := self.visit(part)) is not None] or [ast.Pass()]

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        names = [n for target in node.targets for n in ast.walk(target) if not isinstance(n, ast.expr_context)]
        local = all(isinstance(n, ast.Name | ast.Tuple | ast.Starred) for n in names)
        read = any(isinstance(n, ast.Name) and n.id in self.read for n in names)
        if local and not read and pure(node.value):
            self.dropped += 1
            return None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if isinstance(node.target, ast.Name) and node.target.id not in self.read and (
            node.value is None or pure(node.value)
        ):  # fmt: skip
            self.dropped += 1
            return None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node

    def _block(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if hasattr(node, "body") and isinstance(node.body, list) and not node.body:
            node.body = [ast.Pass()]
        return node

    visit_If = visit_For = visit_While = visit_With = visit_Try = visit_FunctionDef = visit_ExceptHandler = _block
