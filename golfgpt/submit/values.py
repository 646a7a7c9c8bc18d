"""What the value and the class of an expression are, where the facts about a program decide them."""

from __future__ import annotations

import ast
import builtins
import operator
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from golfgpt.submit.facts import BUILTINS, NOTHING, OUTSIDE, SEED, UNKNOWN, Facts, is_literal
from golfgpt.submit.trees import walk

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


class Scope:
    """Names of a function, with the scopes around it."""

    def __init__(self, names: set[str], stores: Counter, owner: str | None = None):
        self.names, self.stores, self.owner = names, stores, owner
        self.values: dict[str, Any] = {}
        self.types: dict[str, str] = {}


class Values:
    """Reads the expressions of one definition. `id` is its own, as in Facts."""

    def __init__(self, facts: Facts, id: str):
        self.facts, self.id = facts, id
        self.scopes: list[Scope] = []
        self.classes: list[str] = []
        self.memo: dict[int, tuple[ast.AST, Any]] = {}
        self.type_memo: dict[int, tuple[ast.AST, str | None]] = {}

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
                    value = Values(self.facts, node.id).value(found.node.value)
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
        without_effect = all(map(pure, (*node.args, *(keyword.value for keyword in node.keywords))))
        if isinstance(function, ast.Name) and function.id in self.facts.returns and without_effect:
            return self.facts.returns[function.id]
        if isinstance(function, ast.Name) and function.id in self.facts.objects:
            return self.facts.objects[function.id]
        if self.value(function) is NOTHING and without_effect:
            return None
        if isinstance(function, ast.Attribute):
            method = f"{self.type_of(function.value)}.{function.attr}"
            if method in self.facts.returns and without_effect:
                return self.facts.returns[method]
        if isinstance(function, ast.Name) and function.id == "isinstance":
            asked, value = node.args[1], self.value(node.args[0])
            if isinstance(asked, ast.Name) and asked.id == "import:torch:Tensor" and is_plain(value):
                return False
            return False if isinstance(asked, ast.Name) and asked.id in self.facts.never else UNKNOWN
        arguments = [self.value(part) for part in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        if isinstance(function, ast.Name) and function.id in self.facts.decided and without_effect:
            return self.facts.decided[function.id](*arguments, **{name: v for name, v in named.items() if name})
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


VALUES = {
    getattr(ast, name.removeprefix("value_")): method
    for name, method in vars(Values).items()
    if name.startswith("value_")
}


def is_plain(value: Any) -> bool:
    return type(value) in (str, tuple, list, dict, frozenset, set, range, int, float, bool)


def pure(node: ast.AST) -> bool:
    """Whether evaluating the expression has no effect."""
    for n in walk(node):
        if isinstance(n, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
        if isinstance(n, ast.Call):
            name = n.func.id if isinstance(n.func, ast.Name) else getattr(n.func, "attr", "")
            if name not in (WITHOUT_EFFECT if isinstance(n.func, ast.Attribute) else BUILTINS | MAKERS):
                return False
    return True


MAKERS = {"isinstance", "zip", "enumerate", "import:functools:partial"}
"""Functions without an effect, whose results are not evaluated here."""
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


ASKING = WITHOUT_EFFECT | {
    "abs", "all", "any", "aminmax", "argmax", "count", "device_count", "endswith", "exists", "float",
    "frame_content_size", "is_available", "is_bf16_supported", "is_dir", "is_file", "is_floating_point", "is_nan",
    "isfinite", "item", "max", "min", "ndim", "reshape", "stat", "stride", "sum", "tolist",
}  # fmt: skip
"""Methods that tests of the input call, without an effect on what they ask."""
FUNCTIONS = BUILTINS | {"isinstance", "zip", "set", "_prefix", "cannot_run", "payload_bytes"}
"""Functions that they call, likewise."""


def asks(node: ast.AST) -> bool:
    """Whether evaluating a test has no effect: beside what is `pure` it may call ASKING and FUNCTIONS, and name
    results."""
    for n in walk(node):
        if isinstance(n, ast.Await | ast.Yield | ast.YieldFrom):
            return False
        if isinstance(n, ast.Call):
            is_name = isinstance(n.func, ast.Name)
            name = n.func.id.rpartition(":")[2] if is_name else getattr(n.func, "attr", "")
            if name not in (FUNCTIONS if is_name else ASKING):
                return False
    return True
