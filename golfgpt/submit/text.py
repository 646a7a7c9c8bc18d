"""A program written down: definitions in the order of their modules, and every id with a short name of its own."""

from __future__ import annotations

import ast
from collections import defaultdict

from golfgpt.submit.program import ENTRY, Program, read_by
from golfgpt.submit.source import COMPREHENSIONS, SCOPES, bound_in, is_builtin
from golfgpt.submit.trees import clone, walk

ALIASES = {"numpy": "np", "torch.nn.functional": "F", "torch.distributed": "dist", "triton.language": "tl"}


def text(program: Program) -> str:
    """The program as Python source."""
    keys = program.reached()
    package = program.facts.package
    statements: list[tuple[tuple, ast.stmt]] = []
    for key in keys:
        if program.is_method(key):
            continue
        module, _, name = key.partition(":")
        owner = package.modules[module]
        place = owner.order, owner.definitions[name.split(".")[0]].node.lineno, name
        node = clone(program.nodes[key])
        if isinstance(node, ast.ClassDef):
            order = {m.name: i for i, m in enumerate(package.find(key).node.body) if isinstance(m, ast.FunctionDef)}
            own = [k for k in keys if program.is_method(k) and k.rpartition(".")[0] == key]
            methods = [clone(program.nodes[k]) for k in sorted(own, key=lambda k: order[k.rpartition(".")[2]])]
            node.body = [part for part in node.body if not isinstance(part, ast.Pass)] + methods or [ast.Pass()]
        elif isinstance(node, ast.FunctionDef):
            node.name = key
        if isinstance(node, ast.ClassDef):
            node.name = key
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for n in walk(target):
                    if isinstance(n, ast.Name):
                        n.id = f"{module}:{n.id}"
        statements.append((place, node))
        statements += [((owner.order, part.lineno, name), clone(part)) for part in program.more.get(key, [])]
    ordered = [node for _, node in sorted(statements, key=lambda pair: pair[0])]
    unique = list({ast.dump(node): node for node in ordered}.values())
    used = {n.id for node in unique for n in walk(node) if isinstance(n, ast.Name)}
    for name in program.hoisted_in(used):
        value = clone(program.facts.hoisted[name][0])
        unique.append(ast.Assign([ast.Name(name, ast.Store())], value, lineno=0))
    unique.append(ast.Expr(ast.Call(ast.Name(ENTRY, ast.Load()), [ast.Constant(None)], [])))
    return written(ast.Module(unique, []))


def written(tree: ast.Module) -> str:
    """The text of a program: every id gets a name of its own, and imports come first."""
    uses: dict[str, list[ast.stmt]] = defaultdict(list)
    for statement in tree.body:
        for n in read_by(statement):
            name = n.id if isinstance(n, ast.Name) else getattr(n, "name", None) if n is statement else None
            if name and ":" in name:
                uses[name].append(statement)
    local = {
        id(s): {n for f in walk(s) if isinstance(f, (*SCOPES, *COMPREHENSIONS)) for n in bound_in(f)} for s in tree.body
    }
    names: dict[str, str] = {}
    taken = {
        n.id for s in tree.body for n in walk(s) if isinstance(n, ast.Name) and ":" not in n.id and is_builtin(n.id)
    }
    for key in sorted(uses, key=lambda key: (not key.startswith("import:"), key.startswith("constant:"), key)):
        name, number = short(key), 1
        while name in taken or any(name in local[id(s)] for s in uses[key]):
            number += 1
            name = f"{short(key)}_{number}"
        taken.add(name)
        names[key] = name
    for n in walk(tree):
        if isinstance(n, ast.Name) and ":" in n.id:
            n.id = names.get(n.id) or short(n.id)
        elif isinstance(n, ast.FunctionDef | ast.ClassDef) and ":" in n.name:
            n.name = names[n.name]
    imports = sorted(import_line(key, name) for key, name in names.items() if key.startswith("import:"))
    body = "\n\n\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in tree.body)
    return "from __future__ import annotations\n\n" + "\n".join(imports) + "\n\n\n" + body + "\n"


def short(key: str) -> str:
    """The name that an id would like to have."""
    kind, _, rest = key.partition(":")
    if kind == "constant":
        return rest.upper()
    if kind == "import":
        module, _, name = rest.partition(":")
        return name or ALIASES.get(module) or module.rpartition(".")[2]
    return rest.replace(".", "_") or kind


def import_line(key: str, name: str) -> str:
    module, _, what = key.removeprefix("import:").partition(":")
    if what:
        return f"from {module} import {what}" + ("" if name == what else f" as {name}")
    return f"import {module}" + ("" if name == module else f" as {name}")
