"""The package as one program: every global name of every module, resolved to the definition that it stands for.

Names are made unique before anything is cut out. In the trees that `Package` returns, a reference to a definition of
the package is the name "module:name", and one to anything else that a module imports "import:module:name" (of a module
itself, without the last part). Local names hold no colon, so nothing can collide; `golfgpt.submit.bundle` gives all of
them short names again when it writes the program down.
"""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from golfgpt.submit.trees import clone, walk

PACKAGES = ("golfgpt", "golfgpt_kernels")
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Definition:
    """A global name of a module: the statement that binds it, and those that register something with it."""

    id: str
    node: ast.stmt
    more: list[ast.stmt] = field(default_factory=list)
    """Such as `op.register_autograd(…)` and `@op.register_fake`."""

    @property
    def module(self) -> str:
        return self.id.split(":")[0]

    @property
    def name(self) -> str:
        return self.id.split(":")[1]


@dataclass
class Module:
    name: str
    package: str
    """That relative imports start from."""
    bound: dict[str, str]
    """Global name -> id of what it stands for; of a module of the package "module:"."""
    definitions: dict[str, Definition] = field(default_factory=dict)
    unnamed: list[ast.stmt] = field(default_factory=list)
    order: int = -1
    """Of its import: after the modules that it imports."""
    qualified: bool = False


class Package:
    """The modules of PACKAGES, read when they are needed; with `kernels` as they are where Triton is installed."""

    def __init__(self, kernels: bool = False) -> None:
        self.modules: dict[str, Module] = {}
        self.kernels = kernels

    @functools.cache  # noqa: B019
    def find(self, id: str) -> Definition | None:
        """The definition with this id; None for what is not of the package."""
        module, _, name = id.partition(":")
        if not name or module.split(".")[0] not in PACKAGES:
            return None
        if "." in name:  # a method, as a function of its own
            return self._method(module, *name.split("."))
        return self.qualified(module).definitions.get(name)

    @functools.cache  # noqa: B019
    def _method(self, module: str, cls: str, name: str) -> Definition | None:
        owner = self.qualified(module).definitions[cls].node
        if not isinstance(owner, ast.ClassDef):
            return None
        node = next((m for m in owner.body if isinstance(m, ast.FunctionDef) and m.name == name), None)
        if node is None:
            return None
        node = clone(node)
        node.args.args[0].annotation = ast.Name(f"{module}:{cls}", ast.Load())
        node.decorator_list = []
        return Definition(f"{module}:{cls}.{name}", node)

    def module(self, name: str) -> Module:
        if name in self.modules:
            return self.modules[name]
        path = Path(importlib.util.find_spec(name).origin)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        module = self.modules[name] = Module(name, package, {})
        for node in _statements(tree, self.kernels):
            module.bound |= dict(imported(node, package))
        for needed in sorted({id.partition(":")[0] for id in module.bound.values()}):
            if needed.split(".")[0] in PACKAGES:
                self.module(needed)
        for node in _statements(tree, self.kernels):
            names = binds(node)
            if names == ["_"] or (not names and isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
                module.unnamed.append(node)
                continue
            for each in names:
                module.bound[each] = f"{name}:{each}"
                module.definitions.setdefault(each, Definition(module.bound[each], node))
        module.order = len([m for m in self.modules.values() if m.order >= 0])
        return module

    def qualified(self, name: str) -> Module:
        """The module with its names resolved."""
        module = self.module(name)
        if not module.qualified:
            module.qualified, qualify = True, _Qualify(self, module)
            for node in {id(d.node): d.node for d in module.definitions.values()}.values():
                qualify.visit(node)
            for node in module.unnamed:
                qualify.visit(node)
                used = [n.id for part in getattr(node, "decorator_list", [node]) for n in walk(part) if _global(n)]
                for owner in {u for u in used if u.startswith(f"{name}:")}:
                    module.definitions[owner.split(":")[1]].more.append(_registered(node, owner))
        return module

    def resolve(self, id: str) -> str:
        """What `id` is in the end: modules import names from one another."""
        while True:
            module, _, name = id.partition(":")
            if not name or module.split(".")[0] not in PACKAGES or "." in name:
                return id
            found = self.module(module)
            if name in found.definitions or name not in found.bound:
                return id if name in found.definitions else f"{module}.{name}:"
            id = found.bound[name]


def _global(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and ":" in node.id


def is_jit(node: ast.AST) -> bool:
    """Whether it is a function that Triton compiles, from its text and annotations."""
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(n, ast.Name) and n.id == "import:triton:jit" for n in node.decorator_list
    )


def _registered(node: ast.stmt, owner: str) -> ast.stmt:
    """A function that several ops register, as one that `owner` alone does."""
    if isinstance(node, ast.FunctionDef):
        node = copy.copy(node)
        node.decorator_list = [d for d in node.decorator_list if any(_global(n) and n.id == owner for n in walk(d))]
    return node


def _statements(tree: ast.Module, kernels: bool) -> Iterator[ast.stmt]:
    """Top-level statements, with those that `try` and `if` hold first; of `if MISSING`, which is about Triton, those
    without it, or with `kernels` those with it."""
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            missing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "MISSING"
            yield from node.orelse if missing and kernels else node.body
        elif isinstance(node, ast.Assign) and all(isinstance(n, ast.Tuple) for n in (*node.targets, node.value)):
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                yield ast.Assign([target], value, lineno=node.lineno)
        else:
            yield node


def imported(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(name, id) of what an import statement binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            of_package = alias.name.split(".")[0] in PACKAGES
            module = alias.name if alias.asname else alias.name.split(".")[0]
            yield alias.asname or module, f"{module}:" if of_package else f"import:{module}:"
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parent, *([node.module] if node.module else [])])
        for alias in node.names:
            id = f"{module}:{alias.name}"
            yield alias.asname or alias.name, id if module.split(".")[0] in PACKAGES else f"import:{id}"


def binds(node: ast.stmt) -> list[str]:
    """What a statement defines at the top level of a module."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in targets for n in walk(target) if isinstance(n, ast.Name)]


def bound_in(scope: ast.AST) -> set[str]:
    """Names that are local to a function, lambda or comprehension, those of scopes inside it left out."""
    found: set[str] = set()
    outside: set[str] = set()

    def look(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store | ast.Del):
                found.add(child.id)
            elif isinstance(child, ast.ExceptHandler) and child.name:
                found.add(child.name)
            elif isinstance(child, ast.Global):
                outside.update(child.names)
            elif isinstance(child, ast.Import | ast.ImportFrom):
                found.update(alias.asname or alias.name.split(".")[0] for alias in child.names)
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(child.name)
            elif isinstance(child, COMPREHENSIONS):  # a walrus inside binds out here
                found.update(n.target.id for n in walk(child) if isinstance(n, ast.NamedExpr))
            elif not isinstance(child, ast.Lambda):
                look(child)

    if isinstance(scope, SCOPES):
        found.update(arg.arg for arg in walk(scope.args) if isinstance(arg, ast.arg))
        for part in scope.body if isinstance(scope.body, list) else [scope.body]:
            look(ast.Module([part], []))
    else:
        for generator in scope.generators:
            found.update(n.id for n in walk(generator.target) if isinstance(n, ast.Name))
    return found - outside


class _Qualify(ast.NodeTransformer):
    """Replaces the global names in one module's statements by ids."""

    def __init__(self, package: Package, module: Module):
        self.package, self.module, self.locals = package, module, []

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if ":" in node.id or any(node.id in scope for scope in self.locals):
            return node
        if isinstance(node.ctx, ast.Load) and node.id in self.module.bound:
            return ast.Name(self.package.resolve(self.module.bound[node.id]), ast.Load())
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.value = self.visit(node.value)
        base = node.value.id if isinstance(node.value, ast.Name) else ""
        if base.endswith(":") and not base.startswith("import:"):  # a module of the package
            return ast.Name(self.package.resolve(f"{base}{node.attr}"), ast.Load())
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return node

    def _scope(self, node: ast.AST) -> ast.AST:
        self.locals.append(bound_in(node))
        self.generic_visit(node)
        self.locals.pop()
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda = _scope

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        args = node.args
        node.decorator_list = [self.visit(part) for part in node.decorator_list]
        args.defaults = [self.visit(part) for part in args.defaults]
        args.kw_defaults = [part and self.visit(part) for part in args.kw_defaults]
        node.returns = node.returns and self.visit(node.returns)
        for arg in walk(args):
            if isinstance(arg, ast.arg) and arg.annotation:
                arg.annotation = self.visit(arg.annotation)
        names = bound_in(node)
        inside = {}  # modules of the package that the function imports are global from here on
        package = self.module.package
        for part in walk(node):
            for name, id in imported(part, package):
                if not id.startswith("import:"):
                    inside[name] = self.package.resolve(id)
        self.locals.append(names - inside.keys())
        before, self.module.bound = self.module.bound, self.module.bound | inside
        node.body = [self.visit(part) for part in node.body if not self._of_package(part, package)] or [ast.Pass()]
        self.module.bound = before
        self.locals.pop()
        return node

    @staticmethod
    def _of_package(node: ast.stmt, package: str) -> bool:
        found = list(imported(node, package))
        return bool(found) and all(not id.startswith("import:") for _, id in found)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        for name in ("bases", "keywords", "decorator_list"):
            setattr(node, name, [self.visit(part) for part in getattr(node, name)])
        here: set[str] = set()
        for i, part in enumerate(node.body):
            self.locals.append(here if not isinstance(part, ast.FunctionDef) else set())
            node.body[i] = self.visit(part)
            self.locals.pop()
            here |= set(binds(part))
        return node


def is_builtin(name: str) -> bool:
    return hasattr(builtins, name)
