"""Which names a program binds, how often and where."""

from __future__ import annotations

import ast
import builtins
import sys
from collections import Counter

from golfgpt.submit.trees import walk


def bindings(tree: ast.AST, *, plain_imports: bool = True) -> Counter[str]:
    """How often a program binds each name, in any scope, or sets or deletes an attribute of that name. Without
    `plain_imports`, `import zlib` binds nothing: it gives the name the same value everywhere."""
    found: Counter[str] = Counter()
    for n in walk(tree):
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


def locals_of(tree: ast.AST) -> dict[int, set[str]]:
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
        for name, full in bound_names(n):
            bound.setdefault(name, set()).add(full)
        if not isinstance(n, (*_SCOPES, ast.ClassDef)):
            waiting += ast.iter_child_nodes(n)
    return {name: full for name, full in bound.items() if name not in outside}


def bound_names(n: ast.AST) -> list[tuple[str, str]]:
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
