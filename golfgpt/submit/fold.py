"""Partial evaluation of the package for one run: what its configuration decides is decided here, in the syntax trees.

    config.skip_gates and n > 0        ->  n > 0                   with skip_gates true
    if planned.xsa: …                  ->  nothing                 if no layer of the plan has it
    parameter_table(config)            ->  the table, written out

An expression is known if it follows from `Facts`: the configuration (a run has one object of each config class, so an
annotation tells which), fields in which all objects of a class agree (`LayerPlan`, `TensorFormat`, `RowQuant`), and
arguments and attributes that have one constant value in the whole program. Everything else is left as it is. Checks
whose only effect is an error about the input (`DROPPED`) are left out: packing has made them with the package itself.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from golfgpt.submit.facts import SEED, UNKNOWN, Facts, dropped, is_literal, literal
from golfgpt.submit.source import bound_in
from golfgpt.submit.trees import clone, walk
from golfgpt.submit.values import Scope, Values, asks, pure

DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
"""Expressions that make a new object, which may be changed."""

FOLDED = (
    ast.Attribute, ast.Call, ast.Name, ast.Compare, ast.BoolOp, ast.IfExp, ast.BinOp, ast.UnaryOp, ast.Subscript
)  # fmt: skip
"""Expressions that are replaced by their value."""


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


class Fold(Values, ast.NodeTransformer):
    """Folds one definition in place."""

    def __init__(self, facts: Facts, id: str):
        super().__init__(facts, id)
        self.seen = Seen()
        self.hoists = False
        """Whether constants of the program may stand here: they come after all definitions."""

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
                    return clone(value)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        node = self.generic_visit(node)
        inside = [n for part in node.values if isinstance(part, ast.FormattedValue) for n in walk(part.value)]
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
        stores = Counter(n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
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
        outer, self.hoists = self.hoists, False  # defaults are evaluated before the constants
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
        self.hoists = outer
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
            names = {n.id for n in walk(target) if isinstance(n, ast.Name)}
            read = {n.id for n in walk(node.value) if isinstance(n, ast.Name)}
            stored_attributes = {ast.unparse(t) for t in target.elts if isinstance(t, ast.Attribute)}
            reads = {ast.unparse(n) for n in walk(node.value) if isinstance(n, ast.Attribute)}
            simple = not any(isinstance(part, ast.Starred) for part in (*target.elts, *node.value.elts))
            stores = {
                n.id for t in target.elts for n in walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
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
        known = self.value(value)
        known = known if stays(value, known) else UNKNOWN
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
            if known is not UNKNOWN and stays(value, known):
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
        walrus = any(isinstance(n, ast.NamedExpr) for n in walk(node.test))
        if only_raises and not walrus and asks(node.test):
            return node.orelse
        if only_raises and walrus and not node.orelse and asks(node.test):
            names = {n.target.id for n in walk(node.test) if isinstance(n, ast.NamedExpr)}
            scope = next((s for s in reversed(self.scopes) if s.owner), None)
            if scope and not any(self.read_elsewhere(name, node) for name in names):
                return None
        if not node.body and not node.orelse:
            return None if pure(node.test) else ast.Expr(node.test)
        if not node.body:
            return ast.If(ast.UnaryOp(ast.Not(), node.test), node.orelse, [])
        if pure(node.test) and list(map(ast.dump, node.body)) == list(map(ast.dump, node.orelse)):
            return node.body
        return node

    def read_elsewhere(self, name: str, node: ast.AST) -> bool:
        inside = sum(isinstance(n, ast.Name) and n.id == name for n in walk(node))
        return self.reads[name] > inside

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):  # what a message is computed from need not be in the program
            node.exc.args = [part for part in map(self.plain, node.exc.args) if pure(part)]
            self._record(node.exc)
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
            item.optional_vars = item.optional_vars and self.visit(item.optional_vars)
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
        raises = [n for n in walk(found.node) if isinstance(n, ast.Raise)]
        calls = [n.value for n in walk(found.node) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        return name.startswith("check") and all(map(dropped, raises)) and (
            bool(raises) or all(self.only_checks(call) for call in calls)
        )  # fmt: skip

    def run(self, node: ast.stmt) -> ast.stmt:
        """Fold a top-level statement, in place."""
        self.reads = Counter(n.id for n in walk(node) if isinstance(n, ast.Name))
        found = self.visit(node)
        return found


def hint(node: ast.AST) -> str:
    """A name for the value of an expression."""
    node = node.func if isinstance(node, ast.Call) else node
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    return node.id.rpartition(":")[2].strip("_") if isinstance(node, ast.Name) else "value"


def stores_of(node: ast.FunctionDef) -> Counter:
    """How often each name is bound in a function, as a parameter too, its scopes inside included."""
    found = Counter(n.id for n in walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
    found.update(n.target.id for n in walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name))
    for n in walk(node):
        if isinstance(n, ast.Global | ast.Nonlocal):
            found.update(n.names)
        elif isinstance(n, ast.arg):
            found[n.arg] += 1
        elif isinstance(n, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name.split(".")[0] for alias in n.names)
        elif isinstance(n, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and n.name:
            found[n.name] += 1
    return found


def stays(node: ast.expr | None, value: Any) -> bool:
    """Whether a name that is bound to an expression keeps its value: it cannot change, or it is a constant."""
    return isinstance(node, ast.Name | ast.Attribute) or not isinstance(value, list | dict | set)


def tidy(node: ast.FunctionDef) -> None:
    """Drop assignments to local names that nothing reads, and give an empty body a statement."""
    while True:
        read = Counter(n.id for n in walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store))
        read.update(n.target.id for n in walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name))
        kept = {name for n in walk(node) if isinstance(n, ast.Global | ast.Nonlocal) for name in n.names}
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
        names = [n for target in node.targets for n in walk(target)]
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
