"""The definitions that a program needs, folded until nothing changes."""

from __future__ import annotations

import ast
import importlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from golfgpt.submit.facts import NOTHING, UNKNOWN, Facts, is_literal
from golfgpt.submit.fold import Fold, Seen
from golfgpt.submit.source import is_jit
from golfgpt.submit.trees import clone, walk
from golfgpt.submit.values import pure

ENTRY = "golfgpt.submit.script:main"
ROUNDS = 30
KEPT_METHODS = {
    "__init__",
    "__post_init__",
    "__call__",
    "__len__",
    "__getitem__",
    "__enter__",
    "__exit__",
    "__iter__",
    "__new__",
}


class Program:
    """The definitions that can be reached from ENTRY, folded."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.nodes: dict[str, ast.stmt] = {}
        """Id, or "module:Class.method" of a method of a class that is kept, -> its tree so far."""
        self.more: dict[str, list[ast.stmt]] = {}
        self.seen: dict[str, Seen] = {}
        self.used: dict[str, set[str]] = {}
        self.known: dict[int, tuple[ast.stmt, tuple]] = {}
        self.touched: set[str] = set()
        self.attributes: set[tuple[str | None, str]] = set()
        """(class, or None for any class, and name) of the methods that something uses."""

    # What is reached

    def settle(self) -> None:
        """Fold until nothing changes. Facts are only drawn from rounds that reach nothing new."""
        stale = set()
        for _ in range(ROUNDS):
            before = self.reached()
            new = before - self.seen.keys()
            for key in sorted(new | (stale & before)):
                text = ast.dump(self.nodes[key])
                self.seen[key] = self.fold(key)
                self.used[key] = self.uses(key)
                stale -= set() if ast.dump(self.nodes[key]) != text else {key}
            if self.reached() - before:
                continue
            touched = self.learn([self.seen[key] for key in before], before)
            stale = {key for key in before if key in stale or self.used[key] & touched}
            if not stale:
                break
        else:
            raise RuntimeError(f"bundle: not settled after {ROUNDS} rounds")
        undecided = {key: self.uses(key) & self.facts.decided.keys() for key in before}
        if found := {key: names for key, names in undecided.items() if names}:
            raise RuntimeError(f"bundle: not decided before the program runs: {found}")

    def uses(self, key: str) -> set[str]:
        """Names that facts which the definition depends on can have."""
        return {key} | {n.id if isinstance(n, ast.Name) else n.attr for n in walk(self.nodes[key])
                        if isinstance(n, ast.Name | ast.Attribute)}  # fmt: skip

    def reached(self) -> set[str]:
        """Keys of `nodes` that can be reached; new ones are copied from the package."""
        found: set[str] = set()
        self.attributes = set()
        waiting, classes, new = [ENTRY], set(), set()
        self.take(ENTRY)
        while waiting:
            for key in waiting:
                found.add(key)
                for part in [self.nodes[key], *self.more.get(key, [])]:
                    ids, attributes = self.references(part)
                    new.update(ids)
                    if key not in self.seen or not attributes[1]:
                        self.attributes |= {(None, name) for name in attributes[0]}
                if key in self.seen:
                    self.attributes |= {(cls, name) for cls, name, *_ in self.seen[key].calls if cls != ""}
                    self.attributes |= self.seen[key].escapes
                if isinstance(self.nodes[key], ast.ClassDef):
                    classes.add(key)
            new.update(method for cls in classes for method in self.methods(cls))
            waiting = [key for key in sorted(new - found) if self.take(key)]  # sorted: modules are read in this order
        return found

    def references(self, part: ast.stmt) -> tuple:
        if self.known.get(id(part), (None,))[0] is not part:
            ids, attributes = references(part)
            hoisted = self.hoisted_in(set(ids))
            ids += [n.id for name in hoisted for n in walk(self.facts.hoisted[name][0]) if isinstance(n, ast.Name)]
            self.known[id(part)] = part, (ids, attributes)
        return self.known[id(part)][1]

    def take(self, key: str) -> bool:
        """Copy what `key` names from the package, the first time; False for what is not in it."""
        if key in self.nodes:
            return True
        definition = None if key in self.facts.decided else self.facts.package.find(key)
        if definition is None:
            return False
        node = clone(definition.node)
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if not isinstance(part, ast.FunctionDef)] or [ast.Pass()]
        self.nodes[key] = node
        if definition.more:
            self.more[key] = clone(definition.more)
        return True

    def methods(self, cls: str) -> list[str]:
        """Keys of the methods of a class that something may call."""
        found: list[str] = []
        if cls in self.facts.objects:  # theirs are functions
            return found
        for node in self.facts.package.find(cls).node.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            used = (None, node.name) in self.attributes or (cls, node.name) in self.attributes
            if used or self.called_outside(cls, node):
                key = f"{cls}.{node.name}"
                if key not in self.nodes:
                    self.nodes[key] = clone(node)
                found.append(key)
        return found

    def called_outside(self, cls: str, node: ast.FunctionDef) -> bool:
        """Whether Python or a library may call the method."""
        if node.name == "__post_init__" and self.facts.only_raises(node):
            return False
        if node.name in KEPT_METHODS:
            return True
        if node.name.startswith("__"):
            return False
        module, _, name = cls.partition(":")
        bases = getattr(importlib.import_module(module), name).__mro__[1:]
        outside = [base for base in bases if not base.__module__.startswith(("golfgpt", "builtins", "typing"))]
        if node.name == "step":  # of an optimizer: only the training step calls it
            return False
        return any(node.name in vars(base) for base in outside)

    # Facts

    def fold(self, key: str) -> Seen:
        if is_jit(self.nodes[key]):  # Triton reads it as it is
            return Seen()
        cls = key.rpartition(".")[0] if self.is_method(key) else None
        fold = Fold(self.facts, cls or key)
        if cls:
            fold.classes.append(cls)
        self.nodes[key] = fold.run(self.nodes[key])
        self.known.pop(id(self.nodes[key]), None)
        for part in self.more.get(key, []):
            fold.run(part)
        return fold.seen

    def is_method(self, key: str) -> bool:
        """Whether the key is of a method inside its class, and not of one that became a function."""
        cls = key.partition(":")[2].rpartition(".")[0]
        return bool(cls) and key.rpartition(".")[0] in self.nodes and key.rpartition(".")[0] not in self.facts.objects

    def learn(self, seen: list[Seen], reached: set[str]) -> set[str]:
        """Draw facts from what all definitions do; the names that there are new ones of."""
        facts, self.touched = self.facts, set()
        classes = [key for key in reached if isinstance(self.nodes[key], ast.ClassDef)]
        bases = set(self._bases(classes))
        calls: dict[str, list] = defaultdict(list)
        by_name: dict[str, list] = defaultdict(list)
        for cls, name, positional, named in (call for each in seen for call in each.calls):
            if cls == "":
                calls[name].append((positional, named))
            elif cls is not None:
                calls[f"{cls}.{name}"].append((positional, named))
            else:
                by_name[name].append((positional, named))
        for quoted, _ in facts.hoisted.values():  # objects that are made there, with any values
            for n in walk(quoted):
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
                    calls[n.func.id].append((None, {None: UNKNOWN}))
        escapes = {key for each in seen for key in each.escapes}
        escaped = {name if cls is None else f"{cls}.{name}" for cls, name in escapes}
        for key in reached:
            node = self.nodes[key]
            if isinstance(node, ast.FunctionDef) and key != ENTRY:
                self._arguments(key, node, calls, by_name, escaped, bases)
                kept = self.is_method(key) and (
                    node.name.startswith("__") or self.called_outside(key.rpartition(".")[0], node)
                )
                if not kept and not node.decorator_list and (found := returned(node)) is not UNKNOWN:
                    self.note(facts.returns, key, found)
        self._attributes(seen, classes, calls, escaped)
        for cls in classes:
            made = calls[cls] or cls in escaped or cls in bases
            made = made or any(f"{cls}.{m}" in calls for m in ("of", "start", "open", "from_file", "from_bytes"))
            if not made and not self._is_made_by_itself(cls) and cls not in facts.never:
                facts.never.add(cls)
                self.touched.add(cls)
        return self.touched

    def note(self, table: dict, key: Any, value: Any) -> None:
        """Enter a fact."""
        if key in table and table[key] == value:
            return
        table[key] = value
        name = key if isinstance(key, str) else key[1]
        self.touched |= {name, name.rpartition(".")[2]}

    def _bases(self, classes: list[str]) -> Iterator[str]:
        for cls in classes:
            yield from (n.id for base in self.nodes[cls].bases for n in walk(base) if isinstance(n, ast.Name))

    def _is_made_by_itself(self, cls: str) -> bool:
        """Whether a method of the class makes objects of it through the name cls."""
        methods = [self.nodes[key] for key in self.nodes if key.startswith(f"{cls}.")]
        return any(isinstance(n, ast.Name) and n.id == "cls" for method in methods for n in walk(method))

    def _arguments(self, key: str, node: ast.FunctionDef, calls: dict, by_name: dict, escaped: set, bases: set) -> None:
        """Parameters that have one constant value in all calls."""
        method, name = self.is_method(key), node.name
        sites = list(calls.get(key, []))
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        if method:
            cls = key.rpartition(".")[0]
            if name == "__init__":
                sites += calls.get(cls, [])
                if cls in escaped or cls in bases:
                    return
            elif name.startswith("__") or self.called_outside(cls, node):
                if name != "forward" or not self._is_module(cls):
                    return
                sites += calls.get(f"{cls}.__call__", []) + self._unknown(node, calls)
            sites += [] if name == "__init__" else by_name.get(name, [])
        if not sites or key in escaped or (method and name in escaped) or is_jit(node):
            return
        positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        bound = method and not static
        positional = positional[1:] if bound else positional
        defaults = dict(zip(positional[::-1], node.args.defaults[::-1], strict=False))
        defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d}
        names = [*positional, *(arg.arg for arg in node.args.kwonlyargs)]
        fold = Fold(self.facts, key)
        table = self.facts.arguments.setdefault(key, {})
        for each in names:
            values = []
            for given, named in sites:
                if each in named:
                    values.append(named[each])
                elif given is None or None in named:
                    values.append(UNKNOWN)
                elif each in positional and positional.index(each) < len(given):
                    values.append(given[positional.index(each)])
                else:
                    values.append(fold.value(defaults.get(each)))
            if one_literal(values) and each not in table:
                table[each] = values[0]
                self.touched.add(key)

    def _unknown(self, node: ast.FunctionDef, calls: dict[str, list]) -> list:
        """Calls of attributes and local names that hold something unknown, where they fit the parameters of `node`."""
        most, names = len(node.args.args) - 1, {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
        found = []
        for key, sites in calls.items():
            cls, _, name = key.rpartition(".")
            if ":" in key and (not cls or self.facts.package.find(key) or self.facts.types.get((cls, name))):
                continue
            found += [site for site in sites if site[0] and site[1].keys() <= names and len(site[0]) <= most]
        return found

    def _is_module(self, cls: str) -> bool:
        return any("nn.Module" in ast.unparse(base) for base in self.nodes[cls].bases)

    def _attributes(self, seen: list[Seen], classes: list[str], calls: dict, escaped: set) -> None:
        """Attributes that have one constant value, and the classes of others."""
        values: dict[tuple[str | None, str], list] = defaultdict(list)
        types: dict[tuple[str, str], set] = defaultdict(set)
        for cls, name, value, kind in (store for each in seen for store in each.stores):
            values[cls, name].append(value)
            if cls:
                types[cls, name].add(kind)
        for cls in classes:
            node = self.nodes[cls]
            record = self._is_record(node)
            ordered = []
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    name = part.target.id
                    ordered.append((name, part.value))
                    if kind := self.facts.type_of_annotation(part.annotation):
                        self.note(self.facts.types, (cls, name), kind)
            if record and cls not in escaped:
                for i, (name, default) in enumerate(ordered):
                    found = values.get((None, name), []) + values.get((cls, name), [])
                    for given, named in calls.get(cls, []):
                        if name in named:
                            found.append(named[name])
                        elif given is None or None in named:
                            found.append(UNKNOWN)
                        elif i < len(given):
                            found.append(given[i])
                        else:
                            found.append(Fold(self.facts, cls).value(default))
                    if (
                        one_literal(found)
                        and calls.get(cls)
                        and not any(f"{cls}.{m}" in self.nodes for m in ("of", "start", "__new__"))
                    ):
                        self.note(self.facts.attributes, (cls, name), found[0])
            elif not record:
                names = {name for owner, name in values if owner == cls}
                level = {part.targets[0].id: part.value for part in node.body
                         if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)}  # fmt: skip
                for name in names:
                    found = values[cls, name] + values.get((None, name), [])
                    if name in level or any(name == n for n, v in ordered if v is not None):
                        found.append(Fold(self.facts, cls).value(level.get(name) or dict(ordered).get(name)))
                    if one_literal(found) or (len(set(map(repr, found))) == 1 and found[0] is not UNKNOWN):
                        self.note(self.facts.attributes, (cls, name), found[0])
                    kinds = types[cls, name]
                    if len(kinds) == 1 and None not in kinds:
                        self.note(self.facts.types, (cls, name), next(iter(kinds)))
            for key in self.methods(cls):
                if kind := self.facts.type_of_annotation(self.facts.package.find(cls) and self.nodes[key].returns):
                    self.note(self.facts.types, (cls, self.nodes[key].name), kind)

    @staticmethod
    def _is_record(node: ast.ClassDef) -> bool:
        """Whether it is a dataclass or a NamedTuple."""
        return any(
            isinstance(n, ast.Name) and n.id in ("import:dataclasses:dataclass", "import:typing:NamedTuple")
            for part in (*node.decorator_list, *node.bases)
            for n in walk(part)
        )

    def drop_parameters(self) -> None:
        """Take away parameters of functions that nothing reads, with what calls give for them."""
        keys = sorted(self.reached())
        hoisted = [n for quoted, _ in self.facts.hoisted.values() for n in walk(quoted)]
        used = Counter(n.id for n in hoisted if isinstance(n, ast.Name))
        calls: dict[str, list[ast.Call]] = defaultdict(list)
        for part in [*(self.nodes[key] for key in keys), *(p for key in keys for p in self.more.get(key, []))]:
            for n in walk(part):
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and ":" in n.func.id:
                    calls[n.func.id].append(n)
                if isinstance(n, ast.Name) and ":" in n.id:
                    used[n.id] += 1
        dropped = True
        while dropped:  # an argument that goes may have been the last reader of a parameter
            dropped = False
            for key in keys:
                if self.may_drop(key, calls[key], used[key]):
                    node = self.nodes[key]
                    read = {n.id for part in node.body for n in walk(part) if isinstance(n, ast.Name)}
                    for arg in [*node.args.args, *node.args.kwonlyargs]:
                        dropped |= arg.arg not in read and _without(node, arg, calls[key])

    def may_drop(self, key: str, sites: list[ast.Call], used: int) -> bool:
        """Whether all uses of a function are calls whose arguments can be told apart."""
        node = self.nodes[key]
        if not isinstance(node, ast.FunctionDef) or self.is_method(key) or node.decorator_list or key == ENTRY:
            return False
        starred = [a for s in sites for a in s.args if isinstance(a, ast.Starred)]
        starred += [k for s in sites for k in s.keywords if k.arg is None]
        return len(sites) == used and not (starred or node.args.vararg or node.args.kwarg)

    def hoisted_in(self, used: set[str]) -> list[str]:
        found: set[str] = set()
        waiting = [name for name in self.facts.hoisted if name in used]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                inside = {n.id for n in walk(self.facts.hoisted[name][0]) if isinstance(n, ast.Name)}
                waiting += [other for other in self.facts.hoisted if other in inside]
        return [name for name in self.facts.hoisted if name in found]


def _without(node: ast.FunctionDef, arg: ast.arg, sites: list[ast.Call]) -> bool:
    """Take a parameter from a function and its calls, unless an argument has an effect; whether it was taken."""
    at = node.args.args.index(arg) if arg in node.args.args else None
    given = [
        (site, next((k for k in site.keywords if k.arg == arg.arg), None), at is not None and at < len(site.args))
        for site in sites
    ]
    if not all(pure(named.value if named else site.args[at]) for site, named, placed in given if named or placed):
        return False
    for site, named, placed in given:
        if named:
            site.keywords.remove(named)
        elif placed:
            del site.args[at]
    if at is None:
        del node.args.kw_defaults[node.args.kwonlyargs.index(arg)]
        node.args.kwonlyargs.remove(arg)
    else:
        if (first := at - len(node.args.args) + len(node.args.defaults)) >= 0:
            del node.args.defaults[first]
        node.args.args.remove(arg)
    return True


def one_literal(values: list) -> bool:
    if values and all(v is NOTHING for v in values):
        return True
    return bool(values) and all(
        v is not UNKNOWN and v is not NOTHING and is_literal(v) and v == values[0] and type(v) is type(values[0])
        for v in values
    )


def returned(node: ast.FunctionDef) -> Any:
    """The constant that a function returns whatever its arguments; UNKNOWN if it may do anything else."""
    body = [part for part in node.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    if all(isinstance(part, ast.Pass) for part in body):
        return None
    if len(body) == 1 and isinstance(body[0], ast.Return) and isinstance(body[0].value, ast.Constant):
        return body[0].value.value
    return UNKNOWN


def references(node: ast.stmt) -> tuple[list[str], tuple[set[str], bool]]:
    """Ids that a statement uses, and its attribute names with whether only these tell what it reads; annotations are
    left out unless a decorator reads them."""
    nodes = list(read_by(node))
    by_name = {"getattr", "hasattr", "import:operator:attrgetter"}
    computed = any(isinstance(n, ast.Name) and n.id in by_name for n in nodes)
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    if computed:
        attributes = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return [n.id for n in nodes if isinstance(n, ast.Name) and ":" in n.id], (attributes, not computed)


def read_by(node: ast.AST, annotations: bool = False) -> Iterator[ast.AST]:
    """The nodes of a tree, without annotations; those of a custom op are read when it is registered, those of a kernel
    when it is compiled."""
    yield node
    if isinstance(node, ast.FunctionDef):
        annotations = is_jit(node) or any("custom_op" in ast.dump(part) for part in node.decorator_list)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") and not annotations:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from read_by(child, annotations)
