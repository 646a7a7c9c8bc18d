"""One Python file that trains and scores one configuration, cut out of this package.

The program begins with `golfgpt.submit.script.main` and consists of what can be reached from it: functions, classes
with the methods that anything may call, module constants. `golfgpt.submit.fold` evaluates what the configuration
decides; what then has one value everywhere (an argument, an attribute, a result) is a fact for the next round, until
nothing changes. Every function in the file comes from a file of the package; there is no template.
"""

from __future__ import annotations

import ast
import copy
import importlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from golfgpt.config import RunConfig
from golfgpt.score.ttt.evaluate import PUBLISHED
from golfgpt.submit.fold import NOTHING, SEED, UNKNOWN, Facts, Fold, Seen, is_literal, pure
from golfgpt.submit.source import COMPREHENSIONS, SCOPES, Package, bound_in, is_builtin

ENTRY = "golfgpt.submit.script:main"
ROUNDS = 30
PURE = (
    "golfgpt.config:to_dict",
    "golfgpt.model.parameters:of_kind",
    "golfgpt.model.parameters:parameter_shapes",
    "golfgpt.model.parameters:parameter_table",
    "golfgpt.model.plan:layer_plan",
    "golfgpt.optim.optimizers:by_muon",
    "golfgpt_kernels._coefficients:per_step",
)
"""Functions that are called here where their arguments are known; the program has the results."""
KEPT_METHODS = {"__init__", "__post_init__", "__call__", "__len__", "__enter__", "__exit__", "__iter__", "__new__"}


def source(config: RunConfig) -> str:
    """The readable program."""
    config = resolved(config)
    program = Program(facts_of(config))
    program.settle()
    program.facts.final = True
    for key in sorted(program.reached()):
        program.fold(key)
    program.drop_parameters()
    return program.text()


def resolved(config: RunConfig) -> RunConfig:
    """`config` with what a run decides at its start."""
    ttt = config.eval.ttt
    sgd = {name: value for name, value in PUBLISHED.get(ttt.kind, {}).items() if getattr(ttt.sgd, name) is None}
    runtime = config.runtime
    runtime = replace(
        runtime,
        kernels="eager",
        attention="flash" if runtime.attention == "auto" else runtime.attention,
        graph="off" if runtime.graph == "auto" else runtime.graph,
        dtype="bfloat16" if runtime.dtype == "auto" else runtime.dtype,
    )
    adapted = replace(ttt, sgd=replace(ttt.sgd, **sgd))
    return replace(config, eval=replace(config.eval, ttt=adapted), runtime=runtime)


def facts_of(config: RunConfig) -> Facts:
    """What the configuration decides."""
    from golfgpt.model import plan
    from golfgpt.quant.quantizer import Quantizer

    quantizer = Quantizer(config.model, config.quant)
    objects = {_id(type(part)): part for part in _sections(config)} | {_id(Quantizer): quantizer}
    plans = [layer for looping in (False, True) for layer in plan.layer_plan(config.model, looping)]
    coded = [name for name, format in quantizer.formats.items() if format.quantized]
    specs = [quantizer.spec(name) for name in coded]
    specs += [
        part for bank in quantizer.fake_quant().values() for _, part in bank if part.__class__ in map(type, specs)
    ]
    formats = list(quantizer.formats.values())
    refined = config.quant.wide_columns or config.quant.low_rank
    agreed = {
        "golfgpt.model.plan:LayerPlan": _agreed(plans),
        "golfgpt.quant.formats:TensorFormat": _agreed(
            formats, ("group",) if refined else ("group", "wide", "wide_columns", "rank", "rank_group")
        ),
    }
    if specs:
        agreed[_id(type(specs[0]))] = _agreed(specs)
    facts = Facts(Package(), objects, agreed, {id: _named(id) for id in PURE})
    environ = ast.Attribute(ast.Name("import:os:", ast.Load()), "environ", ast.Load())
    given = ast.Call(ast.Attribute(environ, "get", ast.Load()), [ast.Constant("SEED"), ast.Constant(config.seed)], [])
    facts.hoisted[SEED] = ast.Call(ast.Name("int", ast.Load()), [given], []), UNKNOWN
    facts.returns |= {
        "golfgpt_kernels._dispatch:resolve": "eager",
        "golfgpt_kernels._dispatch:runs_triton": False,
    }
    return facts


def _named(id: str) -> Any:
    module, _, name = id.partition(":")
    return getattr(importlib.import_module(module), name)


def _id(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__name__}"


def _sections(config: Any) -> Iterator[Any]:
    yield config
    for item in fields(config):
        if is_dataclass(part := getattr(config, item.name)):
            yield from _sections(part)


def _agreed(objects: list, names: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {}
    for name in names or [item.name for item in fields(objects[0])]:
        values = [getattr(each, name) for each in objects]
        if all(value == values[0] and type(value) is type(values[0]) for value in values) and is_literal(values[0]):
            found[name] = values[0]
    return found


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
                return
        raise RuntimeError(f"bundle: not settled after {ROUNDS} rounds")

    def uses(self, key: str) -> set[str]:
        """Names that facts which the definition depends on can have."""
        return {key} | {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(self.nodes[key])
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
            waiting = sorted(key for key in new - found if self.take(key))
        return found

    def references(self, part: ast.stmt) -> tuple:
        if self.known.get(id(part), (None,))[0] is not part:
            ids, attributes = references(part)
            hoisted = self.hoisted_in(set(ids))
            ids += [n.id for name in hoisted for n in ast.walk(self.facts.hoisted[name][0]) if isinstance(n, ast.Name)]
            self.known[id(part)] = part, (ids, attributes)
        return self.known[id(part)][1]

    def take(self, key: str) -> bool:
        """Copy what `key` names from the package, the first time; False for what is not in it."""
        if key in self.nodes:
            return True
        definition = self.facts.package.find(key)
        if definition is None:
            return False
        node = copy.deepcopy(definition.node)
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if not isinstance(part, ast.FunctionDef)] or [ast.Pass()]
        self.nodes[key] = node
        if definition.more:
            self.more[key] = copy.deepcopy(definition.more)
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
                    self.nodes[key] = copy.deepcopy(node)
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
            yield from (n.id for base in self.nodes[cls].bases for n in ast.walk(base) if isinstance(n, ast.Name))

    def _is_made_by_itself(self, cls: str) -> bool:
        methods = [m for m in self.nodes if m.startswith(f"{cls}.")]
        return any(isinstance(n, ast.Name) and n.id in ("cls", "self") for m in methods for n in ast.walk(self.nodes[m])
                   if isinstance(n, ast.Name) and n.id == "cls")  # fmt: skip

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
        decorated = [d for d in node.decorator_list if "_jit" in ast.dump(d)]
        if not sites or key in escaped or (method and name in escaped) or decorated:
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
        """Calls of attributes and local names that hold one knows not what, where they fit the parameters of `node`."""
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
            for n in ast.walk(part)
        )

    def drop_parameters(self) -> None:
        """Take away parameters of functions that nothing reads, with what calls give for them."""
        keys = self.reached()
        written = [n for quoted, _ in self.facts.hoisted.values() for n in ast.walk(quoted)]
        used = Counter(n.id for n in written if isinstance(n, ast.Name))
        calls: dict[str, list[ast.Call]] = defaultdict(list)
        for part in [*(self.nodes[key] for key in keys), *(p for key in keys for p in self.more.get(key, []))]:
            for n in _walk(part):
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and ":" in n.func.id:
                    calls[n.func.id].append(n)
                if isinstance(n, ast.Name) and ":" in n.id:
                    used[n.id] += 1
        for key in keys:
            node, sites = self.nodes[key], calls[key]
            if not isinstance(node, ast.FunctionDef) or self.is_method(key) or node.decorator_list or key == ENTRY:
                continue
            plain = all(k.arg for s in sites for k in s.keywords) and not any(
                isinstance(a, ast.Starred) for s in sites for a in s.args
            )
            if not plain or len(sites) != used[key] or node.args.vararg or node.args.kwarg:
                continue
            read = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name)}
            for arg in [*node.args.args, *node.args.kwonlyargs]:
                if arg.arg not in read:
                    _without(node, arg, sites)

    # Writing

    def text(self) -> str:
        keys = self.reached()
        package = self.facts.package
        statements: list[tuple[tuple, ast.stmt]] = []
        for key in keys:
            if self.is_method(key):
                continue
            module, _, name = key.partition(":")
            owner = package.modules[module]
            place = owner.order, list(owner.definitions).index(name.split(".")[0]), name
            node = copy.deepcopy(self.nodes[key])
            if isinstance(node, ast.ClassDef):
                order = {m.name: i for i, m in enumerate(package.find(key).node.body) if isinstance(m, ast.FunctionDef)}
                own = [k for k in keys if self.is_method(k) and k.rpartition(".")[0] == key]
                methods = [copy.deepcopy(self.nodes[k]) for k in sorted(own, key=lambda k: order[k.rpartition(".")[2]])]
                node.body = [part for part in node.body if not isinstance(part, ast.Pass)] + methods or [ast.Pass()]
            elif isinstance(node, ast.FunctionDef):
                node.name = key
            if isinstance(node, ast.ClassDef):
                node.name = key
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for n in ast.walk(target):
                        if isinstance(n, ast.Name):
                            n.id = f"{module}:{n.id}"
            statements.append(((*place, 0), node))
            statements += [((*place, 1 + i), part) for i, part in enumerate(copy.deepcopy(self.more.get(key, [])))]
        ordered = [node for _, node in sorted(statements, key=lambda pair: pair[0])]
        unique = list({ast.dump(node): node for node in ordered}.values())
        used = {n.id for node in unique for n in ast.walk(node) if isinstance(n, ast.Name)}
        for name in self.hoisted_in(used):
            value = copy.deepcopy(self.facts.hoisted[name][0])
            unique.append(ast.Assign([ast.Name(name, ast.Store())], value, lineno=0))
        unique.append(ast.Expr(ast.Call(ast.Name(ENTRY, ast.Load()), [ast.Constant(None)], [])))
        return written(ast.Module(unique, []))

    def hoisted_in(self, used: set[str]) -> list[str]:
        found: set[str] = set()
        waiting = [name for name in self.facts.hoisted if name in used]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                inside = {n.id for n in ast.walk(self.facts.hoisted[name][0]) if isinstance(n, ast.Name)}
                waiting += [other for other in self.facts.hoisted if other in inside]
        return [name for name in self.facts.hoisted if name in found]


def _without(node: ast.FunctionDef, arg: ast.arg, sites: list[ast.Call]) -> None:
    """Take a parameter from a function and its calls, unless an argument has an effect."""
    at = node.args.args.index(arg) if arg in node.args.args else None
    given = [
        (site, next((k for k in site.keywords if k.arg == arg.arg), None), at is not None and at < len(site.args))
        for site in sites
    ]
    if not all(pure(named.value if named else site.args[at]) for site, named, placed in given if named or placed):
        return
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
    nodes = list(_walk(node))
    by_name = {"getattr", "hasattr", "import:operator:attrgetter"}
    computed = any(isinstance(n, ast.Name) and n.id in by_name for n in nodes)
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    if computed:
        attributes = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return [n.id for n in nodes if isinstance(n, ast.Name) and ":" in n.id], (attributes, not computed)


def _walk(node: ast.AST, annotations: bool = False) -> Iterator[ast.AST]:
    """The nodes of a tree, without annotations; those of a custom op are read when it is registered."""
    yield node
    if isinstance(node, ast.FunctionDef):
        annotations = any("custom_op" in ast.dump(part) for part in node.decorator_list)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") and not annotations:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, annotations)


ALIASES = {"numpy": "np", "torch.nn.functional": "F", "torch.distributed": "dist"}


def written(tree: ast.Module) -> str:
    """The text of a program: every id gets a name of its own, and imports come first."""
    uses: dict[str, list[ast.stmt]] = defaultdict(list)
    for statement in tree.body:
        for n in _walk(statement):
            name = n.id if isinstance(n, ast.Name) else getattr(n, "name", None) if n is statement else None
            if name and ":" in name:
                uses[name].append(statement)
    local = {
        id(s): {n for f in ast.walk(s) if isinstance(f, (*SCOPES, *COMPREHENSIONS)) for n in bound_in(f)}
        for s in tree.body
    }
    names: dict[str, str] = {}
    taken = {
        n.id for s in tree.body for n in ast.walk(s) if isinstance(n, ast.Name) and ":" not in n.id and is_builtin(n.id)
    }
    for key in sorted(uses, key=lambda key: (not key.startswith("import:"), key.startswith("constant:"), key)):
        name, number = short(key), 1
        while name in taken or any(name in local[id(s)] for s in uses[key]):
            number += 1
            name = f"{short(key)}_{number}"
        taken.add(name)
        names[key] = name
    for n in ast.walk(tree):
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
