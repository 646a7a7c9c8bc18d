"""Python files that stand alone: a module with all that it uses of golfgpt and golfgpt_kernels.

The names in a definition are followed through this distribution's modules, by their syntax trees. What they lead to is
written module by module, in the order of the imports, as it stands there, with its comments. Of an op of
golfgpt_kernels only the eager reference is taken. Nothing is renamed or rewritten. Two definitions of one name in a
file are therefore an error, which tests/test_hf.py looks for.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from golfgpt.submit.source import PACKAGES, binds


class Definition(NamedTuple):
    module: str
    name: str
    """Empty for the module itself."""


class Module(NamedTuple):
    """The top level of a module."""

    docstring: str
    defined: dict[str, str]
    """Name -> source text of its statement."""
    used: dict[str, set[str]]
    """Name -> names in its statement, and "a.b" for an attribute of a name."""
    imported: dict[str, Definition]
    """What it imports from this distribution, by the name that it has here."""
    external: dict[str, str]
    """All other imports, each as a statement."""


def standalone(module: str, beside: Mapping[Definition, str] | None = None) -> tuple[str, list[Definition]]:
    """Source of `module` with all that it uses, and which definitions that is. Those in `beside` are imported from the
    file that it names, in the same folder."""
    beside, found = beside or {}, {}
    todo = [Definition(module, name) for name in read_module(module).defined]
    while todo:
        if (definition := todo.pop()) not in found:
            found[definition] = {} if definition in beside else _targets(definition)
            todo += found[definition].values()
    own = [d for d in found if d not in beside]
    if twice := sorted({d.name for d in own if sum(d.name == other.name for other in own) > 1}):
        raise AssertionError(f"{module} needs two definitions named {', '.join(twice)}; rename one of them")
    needs: dict[str, set[str]] = {d.module: set() for d in own}
    for d in own:
        needs[d.module] |= {t.module for t in found[d].values() if t not in beside} - {d.module}
    order = graphlib.TopologicalSorter({name: sorted(modules) for name, modules in sorted(needs.items())})
    sections = [part for name in order.static_order() for part in _section(name, own, found)]
    imports = {read_module(d.module).external.get(name) for d in own for name in read_module(d.module).used[d.name]}
    imports |= {f"from .{beside[d]} import {d.name}" for d in found if d in beside}
    return "\n\n".join(["from __future__ import annotations", _merged(imports - {None}), *sections]) + "\n", own


def _merged(imports: set[str]) -> str:
    """Import statements, those from one module in one."""
    names: dict[str, list[str]] = {}
    for statement in sorted(imports):
        source, _, name = statement.partition(" import ")
        names.setdefault(source, []).append(name)
    return "\n".join(f"{source} import {', '.join(found)}" if all(found) else source for source, found in names.items())


def _section(name: str, own: list[Definition], found: Mapping[Definition, Mapping[str, Definition]]) -> Iterator[str]:
    """What a file has of a module."""
    module, here = read_module(name), [d for d in own if d.module == name]
    yield f"# ---- {name}"
    if module.docstring and not name.startswith("golfgpt_kernels"):  # whose docstrings are about kernels
        yield f'"""{module.docstring}"""'
    taken = {used: target.name for d in here for used, target in found[d].items()}
    for used, target in sorted(taken.items()):  # what has another name here
        if "." not in used and used != target:
            yield f"{used} = {target}"
    for whole in sorted({used.partition(".")[0] for used in taken if "." in used}):
        members = sorted(
            f"{used.partition('.')[2]}={target}" for used, target in taken.items() if used.startswith(f"{whole}.")
        )
        yield f"from types import SimpleNamespace\n\n{whole} = SimpleNamespace({', '.join(members)})"
    yield from dict.fromkeys(text for n, text in module.defined.items() if Definition(name, n) in here)


def _targets(definition: Definition) -> dict[str, Definition]:
    """What the names in a definition stand for, of this distribution."""
    module, targets = read_module(definition.module), {}
    for used in module.used[definition.name]:
        base, _, attribute = used.partition(".")
        if used in module.defined:
            targets[used] = Definition(definition.module, used)
        elif base in module.imported and bool(attribute) == (not module.imported[base].name):
            targets[used] = _origin(Definition(module.imported[base].module, attribute or module.imported[base].name))
    return targets


def _origin(definition: Definition) -> Definition:
    """Where something that a module may only pass on is defined; of an op, its eager reference."""
    module = read_module(definition.module)
    if definition.name not in module.defined:
        return _origin(module.imported[definition.name])
    reference = Definition(definition.module, f"{definition.name}_ref")
    return reference if reference.name in module.defined else definition


@functools.cache
def read_module(name: str) -> Module:
    spec = importlib.util.find_spec(name)
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines, tree, end, names = text.splitlines(), ast.parse(text), 0, []
    module = Module(ast.get_docstring(tree, clean=False) or "", {}, {}, {}, {})
    for node in tree.body:
        text, end = "\n".join(lines[end : node.end_lineno]).strip("\n"), node.end_lineno
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_imports(node, spec.parent, module)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # the docstring of a constant
            module.defined.update({name: f"{module.defined[name]}\n{text}" for name in names})
        else:
            names = binds(node)
            module.defined.update(dict.fromkeys(names, text))
            module.used.update({name: set(_used(node)) for name in names})
    return module


def _used(node: ast.stmt) -> Iterator[str]:
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            yield n.id
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
            yield f"{n.value.id}.{n.attr}"


def _note_imports(node: ast.Import | ast.ImportFrom, package: str, module: Module) -> None:
    for alias in node.names:
        name = alias.asname or alias.name.partition(".")[0]
        if isinstance(node, ast.Import):
            module.external[name] = f"import {ast.unparse(alias)}"
            continue
        source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        if source.partition(".")[0] in PACKAGES:
            module.imported[name] = _imported(source, alias.name)
        elif source != "__future__":
            module.external[name] = f"from {source} import {ast.unparse(alias)}"


def _imported(source: str, name: str) -> Definition:
    """What `from source import name` means: a name that the package has, or else a module in it."""
    if not importlib.util.find_spec(source).submodule_search_locations:
        return Definition(source, name)
    package = read_module(source)
    if name in package.imported or name in package.defined:
        return Definition(source, name)
    return Definition(f"{source}.{name}", "")
