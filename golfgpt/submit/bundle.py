"""One Python file that trains and scores one configuration, cut out of this package.

The program begins with `golfgpt.submit.script.main` and consists of what can be reached from it: functions, classes
with the methods that anything may call, module constants. `golfgpt.submit.fold` evaluates what the configuration
decides; what then has one value everywhere (an argument, an attribute, a result) is a fact for the next round, until
nothing changes. Every function in the file comes from a file of the package; there is no template.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from golfgpt.config import RunConfig
from golfgpt.errors import InputError
from golfgpt.score.ttt.evaluate import with_published
from golfgpt.submit.facts import SEED, UNKNOWN, Facts, is_literal
from golfgpt.submit.program import Program
from golfgpt.submit.source import Package
from golfgpt.submit.text import text
from golfgpt.train.kernels import meanings

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
FORMS = ("golfgpt_kernels._dispatch:resolve", "golfgpt_kernels.relu2_mlp:_form")
"""Functions of (op, impl, …) that say what computes an op."""
RUN_TRITON = (
    "golfgpt_kernels._dispatch:runs_triton",
    "golfgpt_kernels.fake_quant:_runs_triton",
    "golfgpt_kernels.muon:_by_kernel",
)
"""Functions that say whether an op's kernel runs. They need no tensor for a named implementation: it runs or raises."""


def source(config: RunConfig) -> str:
    """The readable program, with the kernels that runtime.kernels names; "auto" names none. Raises InputError for
    calibration within a time whose reserve is not known yet, and for kernels in Gluon."""
    config, schedule = resolved(config), config.schedule
    if config.quant.method == "gptq" and schedule.max_seconds is not None and schedule.reserve_seconds is None:
        raise InputError("schedule.reserve_seconds is None; expected the seconds that the run reserved for calibration")
    if "gluon" in config.runtime.kernels:
        raise InputError(f"runtime.kernels is {config.runtime.kernels}; a program has no kernels in Gluon: use mlp")
    program = Program(facts_of(config))
    program.settle()
    program.facts.final = True
    for key in sorted(program.reached()):
        program.fold(key)
    program.drop_parameters()
    return text(program)


def resolved(config: RunConfig) -> RunConfig:
    """`config` with what a run decides at its start."""
    runtime = config.runtime
    runtime = replace(
        runtime,
        kernels="eager" if runtime.kernels == "auto" else runtime.kernels,
        attention="flash" if runtime.attention == "auto" else runtime.attention,
        graph="off" if runtime.graph == "auto" else runtime.graph,
        dtype="bfloat16" if runtime.dtype == "auto" else runtime.dtype,
    )
    return replace(config, eval=replace(config.eval, ttt=with_published(config.eval.ttt)), runtime=runtime)


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
    kernels = config.runtime.kernels
    facts = Facts(Package(kernels != "eager"), objects, agreed, {id: _named(id) for id in PURE}, decided_by(kernels))
    environ = ast.Attribute(ast.Name("import:os:", ast.Load()), "environ", ast.Load())
    given = ast.Call(ast.Attribute(environ, "get", ast.Load()), [ast.Constant("SEED"), ast.Constant(config.seed)], [])
    facts.hoisted[SEED] = ast.Call(ast.Name("int", ast.Load()), [given], []), UNKNOWN
    facts.arguments["golfgpt_kernels.relu2_mlp:gemms"] = {"gluon": False}
    return facts


def decided_by(kernels: str) -> dict[str, Callable]:
    """What runtime.kernels decides in golfgpt_kernels."""
    all_ops, some = meanings(kernels)

    def form(op: Any, impl: Any, *_unused: Any, **_lists: Any) -> Any:
        if op is UNKNOWN or impl is UNKNOWN:
            return UNKNOWN
        return some.get(op, all_ops) if impl == "auto" else impl

    def runs(*given: Any, **_lists: Any) -> Any:
        found = form(*given)
        return UNKNOWN if found is UNKNOWN else found == "triton"

    return dict.fromkeys(FORMS, form) | dict.fromkeys(RUN_TRITON, runs)


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
