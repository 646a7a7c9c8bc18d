"""The choice of a run's execution: from given times, with children that fail in every way, and once with real ones."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golfgpt_kernels import set_implementation
from models import latest_record

from golfgpt.config import BigramConfig, RuntimeConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError, Interrupted, VerificationError
from golfgpt.runs import read_config
from golfgpt.train import compile_cache, execution
from golfgpt.train.attention_backend import Selection
from golfgpt.train.children import verdicts
from golfgpt.train.clock import Ledger
from golfgpt.train.execution import Alternative, Trials, alternatives, available, select_execution
from golfgpt.train.step import TrainStep
from golfgpt.train.train import train, warm_up

CPU = Ranks(0, 1, torch.device("cpu"))
GPU = torch.device("cuda", 0)
ATTENTION = Selection("flash", {"flash": 0.5, "cudnn": 0.6, "math": 9.0}, False, {})
PLAIN = RuntimeConfig(kernels="eager", attention="flash", graph="off", threads=1, compile="off")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, and no kernels left from the test before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with set_implementation("eager"):
        yield


@pytest.fixture
def step(tiny, corpus):
    step = TrainStep(tiny, Dataset.open(corpus), CPU)
    yield step
    step.data.close()


# ---- children


def test_a_child_that_fails_says_why():
    programs = {
        "right": "print('a warning'); print('{\"loss\": null}')",
        "wrong": 'print(\'{"loss": null, "mlp": "differs"}\')',
        "raises": "raise ValueError('out of shared memory')",
        "aborts": "import os; os.abort()",
        "silent": "pass",
        "hangs": "import time; time.sleep(100)",
        "talks": "print('x' * 10**6); print('{}')",
    }
    found = verdicts({name: [sys.executable, "-c", code] for name, code in programs.items()}, 10.0)
    assert found == {
        "right": None,
        "wrong": "mlp: differs",
        "raises": "exit code 1: ValueError: out of shared memory",
        "aborts": "ended by SIGABRT",
        "silent": "exit code 0: no output",
        "hangs": "no result in time",
        "talks": None,
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_a_child_imports_nothing_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "tabnanny.py").write_text("print('{}')")
    monkeypatch.chdir(tmp_path)
    assert verdicts({"x": [sys.executable, "-m", "tabnanny"]}, 30.0)["x"] is not None


def test_kernels_are_checked_at_the_sizes_of_the_run(step):
    """A real child, of interpreted kernels. The process itself launches none."""
    trials = Trials(step, PLAIN, lambda text: None)
    command = trials._command("loss", PLAIN)
    assert command[1:4] == ["-m", "golfgpt_kernels", "check"] and "384" in command and "48" in command
    assert trials._refused({"loss": PLAIN}) == {"loss": None}


def test_a_graph_that_cannot_be_had_is_refused_by_its_child(step):
    (why,) = Trials(step, PLAIN, lambda text: None)._refused({"graph step": replace(PLAIN, graph="step")}).values()
    assert "InputError: runtime.graph step expected a GPU" in why


def test_a_step_is_compared_with_a_plain_one(tiny, monkeypatch):
    """With interpreted kernels. One gradient that is wrong is named."""
    data = replace(tiny.data, batch_tokens=64, seq_len=32, spans=1)
    config = replace(tiny, data=data, runtime=replace(PLAIN, device="cpu", dtype="float32", kernels="mlp,loss"))
    assert execution.check_step(config) is None
    backward = TrainStep._accumulate

    def wrong(self, *args):
        yield from backward(self, *args)
        if self.config.runtime.kernels != "eager":
            self.model.q_gain.grad *= 3

    monkeypatch.setattr(TrainStep, "_accumulate", wrong)
    assert execution.check_step(config).startswith("the gradient of q_gain errs by")


@pytest.mark.long
def test_the_compiled_step_of_a_cpu_is_the_plain_one(tiny):
    config = replace(tiny, runtime=replace(PLAIN, device="cpu", dtype="float32", compile="on"))
    assert execution.check_step(config) is None


@pytest.mark.slow
def test_compiled_steps_of_a_cpu_are_equal_and_read_the_weights_only(tiny, corpus, monkeypatch):
    """With two threads. torch 2.13 compiles `factor * ones` of a skip into a backward that writes over the parameter
    that `factor` is a row of, and the gradients of embeddings into atomic sums."""
    model = replace(tiny.model, num_layers=2, bigram=BigramConfig(rows=64, dim=32))
    config = replace(tiny, model=model, runtime=replace(PLAIN, device="cpu", dtype="float32", threads=2, compile="on"))
    monkeypatch.setattr(execution, "enable_backend", lambda backend: None)
    threads, step = torch.get_num_threads(), TrainStep(config, Dataset.open(corpus), CPU)
    with torch.no_grad():  # what starts at zero would hide gradients
        for p in step.model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    try:
        execution.use(step, config.runtime)
        with step.undone():
            assert step.overwritten(looping=True) is None
            grads = []
            for _ in range(5):
                step.launch(0)
                grads.append({name: p.grad.clone() for name, p in step.model.named_parameters()})
        assert not torch.are_deterministic_algorithms_enabled()
        step.execute(replace(config.runtime, compile="off"))
        step.launch(0)
    finally:
        torch.set_num_threads(threads)
        step.data.close()
    for again in grads[1:]:
        assert all(torch.equal(again[name], grad) for name, grad in grads[0].items())
    for name, p in step.model.named_parameters():
        torch.testing.assert_close(grads[0][name], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    "fault, verdict", [(0.0, "it overwrites resid_mix"), (2.0, "the gradient of attn_scale differs by")]
)
def test_a_cpu_keeps_no_wrongly_compiled_step(step, monkeypatch, fault, verdict):
    """The run goes on without it; where compilation was asked for, it does not start."""
    plain = step.loss

    def wrong(loss, device):
        def program(*args):
            if not fault:
                step.model.resid_mix.data.zero_()
                return plain(*args)
            gain = step.model.attn_scale
            return plain(*args) + fault * (gain - gain.detach()).sum()

        return program

    monkeypatch.setattr("golfgpt.train.step.compile_loss", wrong)
    monkeypatch.setattr(execution, "CPU_COMPILATION", 0.0)
    found = Trials(step, PLAIN, lambda text: None).run([Alternative("compile", {"compile": "on"})])
    assert found.runtime.compile == "off" and found.trials[0].verdict.startswith(f"failed: RuntimeError: {verdict}")
    if not fault:
        asked = replace(PLAIN, compile="on", warmup_steps=1)
        step.execute(asked)
        with pytest.raises(VerificationError, match=r"overwrites resid_mix.*--runtime\.compile off"):
            reporter = SimpleNamespace(status=lambda text: None, log=lambda text: None)
            warm_up(replace(step.config, runtime=asked), step, Ledger(), reporter)


def test_a_wrongly_compiled_step_is_not_compiled(step, monkeypatch):
    """And nothing else is tried; a child that only ran out of time says nothing about the step."""
    answers = {}
    monkeypatch.setattr(Trials, "_refused", lambda self, runtimes: dict.fromkeys(runtimes) | answers)
    monkeypatch.setattr(Trials, "_turn", lambda self, runtime: 5.0)
    monkeypatch.setattr(Trials, "_ready", lambda self, runtime: None)
    monkeypatch.setattr(execution, "use", lambda step, runtime: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    step.cuda, compiled = True, replace(PLAIN, compile="on")
    for verdict in (
        "step: the gradient of q_gain errs by nan",
        "step: losses [9.1, nan]",
        "step: it overwrites mix",
        "ended by SIGSEGV",
    ):
        step.cuda = step.compiled = True
        answers["compiled step"] = f"refused: {verdict}"
        found = Trials(step, compiled, lambda text: None).run(kernels("mlp"))
        assert (found.runtime.compile, found.runtime.graph) == ("off", "off")
        assert [trial.name for trial in found.trials] == ["compiled step"]
    answers["compiled step"] = "refused: no result in time"
    monkeypatch.setattr(TrainStep, "rehearse", lambda self, looping=None: None)
    found = Trials(step, compiled, lambda text: None).run(kernels("mlp"))
    assert found.runtime.compile == "on" and found.trials[0].verdict == "refused: no result in time"


# ---- trials


@pytest.fixture
def trial(step, monkeypatch):
    """run(tries, ms, refused): the chosen runtime and {name: verdict}, where `ms` gives a step's time by runtime."""

    def run(tries, ms, refused=None, spread=0.0, broken=()):
        calls = []

        def turn(self, runtime):
            calls.append(runtime)
            return ms(runtime) * (1 + spread * (len(calls) % 3))

        def ready(self, runtime):
            assert not (refused or {}).get(runtime.kernels.rpartition(",")[2]), "launched what its child refused"
            return "failed: RuntimeError: CUDA error" if runtime.kernels.rpartition(",")[2] in broken else None

        monkeypatch.setattr(Trials, "_turn", turn)
        monkeypatch.setattr(Trials, "_ready", ready)
        monkeypatch.setattr(Trials, "_refused", lambda self, runtimes: dict.fromkeys(runtimes) | (refused or {}))
        monkeypatch.setattr(execution, "use", lambda step, runtime: None)
        found = Trials(step, PLAIN, lambda text: None).run(tries)
        return found.runtime, {each.name: each.verdict for each in found.trials}

    return run


def kernels(*names):
    return [Alternative(name, {"kernels": name}) for name in names]


def test_what_is_faster_stays_and_what_is_not_goes(trial):
    gain = {"mlp": 0.9, "loss": 1.05, "optimizer": 0.8, "eager": 1.0}
    chosen, verdicts = trial(
        [*kernels("mlp", "loss", "optimizer"), Alternative("attention cudnn", {"attention": "cudnn"})],
        lambda r: (
            100.0 * torch.tensor([gain[k] for k in r.kernels.split(",")]).prod().item() * (r.attention == "flash")
            + 70.0 * (r.attention == "cudnn")
        ),
    )
    assert (chosen.kernels, chosen.attention) == ("mlp,optimizer", "cudnn")
    assert list(verdicts.values()) == ["taken", "slower", "taken", "taken"]


@pytest.mark.parametrize("gain, spread, taken", [(0.03, 0.0, True), (0.005, 0.0, False), (0.03, 0.04, False)])
def test_the_gain_must_exceed_the_spread_and_one_percent(trial, gain, spread, taken):
    chosen, verdicts = trial(kernels("mlp"), lambda r: 100 * (1 - gain * (r.kernels == "mlp")), spread=spread)
    assert chosen.kernels == ("mlp" if taken else "eager")
    assert verdicts["mlp"] == "taken" or "not clearly faster" in verdicts["mlp"]


def test_a_failure_costs_that_alternative_only(trial):
    refused = {"mlp": "refused: ended by SIGSEGV", "loss": "refused: no result in time"}
    tries = kernels("mlp", "loss", "fake_quant", "optimizer")
    chosen, verdicts = trial(tries, lambda r: 100 - 10 * r.kernels.count(","), refused, broken=("fake_quant",))
    assert verdicts == refused | {"fake_quant": "failed: RuntimeError: CUDA error", "optimizer": "slower"} or (
        verdicts["optimizer"].startswith("not clearly")
    )
    assert chosen.kernels == "eager"


def test_another_form_of_a_kernel_replaces_it(trial):
    ms = {"mlp": 90.0, "mlp_gluon": 80.0, "mlp,loss": 70.0, "mlp_gluon,loss": 60.0}
    chosen, _ = trial(kernels("mlp", "mlp_gluon", "loss"), lambda r: ms.get(r.kernels, 100.0))
    assert chosen.kernels == "mlp_gluon,loss"


def test_a_time_limit_ends_the_trials(trial, monkeypatch):
    monkeypatch.setattr(execution, "SECONDS", -1.0)
    chosen, verdicts = trial(kernels("mlp"), lambda r: 1.0)
    assert chosen == PLAIN and verdicts == {"mlp": "not tried: -1 s are over"}
    monkeypatch.setattr(execution, "SLOW_STEP", 0.5)
    assert trial(kernels("mlp"), lambda r: 1000.0)[1] == {"mlp": "not tried: a step takes 1 s"}


def test_a_kept_compilation_costs_half(step):
    """Of 200 s, a compiled step saves 33."""
    kept = compile_cache.cache_file(step.config, step.dtype, step.ranks.device)
    assert [execution.repays_compilation(step, seconds) for seconds in (200, 400)] == [False, True]
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert [execution.repays_compilation(step, seconds) for seconds in (100, 200)] == [False, True]


def test_fewer_threads_are_tried_until_they_are_no_faster(trial):
    tries = [Alternative(f"threads {n}", {"threads": n}) for n in (8, 4, 2)]
    chosen, verdicts = trial(tries, lambda r: {1: 100, 8: 50, 4: 60, 2: 10}[r.threads])
    assert chosen.threads == 8 and verdicts == {"threads 8": "taken", "threads 4": "slower"}


def test_rank_0_decides(step, monkeypatch):
    """This rank measures the opposite."""
    answers = iter([5.0, False] + [10.0, 9.0] * execution.TURNS)
    monkeypatch.setattr(
        Ranks, "broadcast_object", lambda self, value: None if isinstance(value, dict) else next(answers)
    )
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensor: tensor)
    monkeypatch.setattr(execution.Trials, "_refused", lambda self, runtimes: {})
    step.ranks = Ranks(1, 2, CPU.device)
    monkeypatch.setattr(TrainStep, "rehearse", lambda self, looping=None: None)
    found = Trials(step, PLAIN, lambda text: None).run(kernels("mlp"))
    assert found.runtime.kernels == "mlp" and found.trials[0].ms == 9.0


def test_both_ways_of_a_loop_are_compiled_before_a_graph_is_captured(tiny, corpus, monkeypatch):
    config = replace(tiny, model=latest_record(tiny.model, start=0.5))
    step, log = TrainStep(config, Dataset.open(corpus), CPU), []
    accumulate = TrainStep._accumulate
    monkeypatch.setattr(TrainStep, "_accumulate", lambda self, t, way: log.append(way) or accumulate(self, t, way))
    monkeypatch.setattr(TrainStep, "capture", lambda self: log.append("capture"))
    Trials(step, replace(PLAIN, dtype="float32"), lambda text: None).run([Alternative("again", {"graph": "off"})])
    step.data.close()
    captures = [i for i, each in enumerate(log) if each == "capture"]
    assert {False, True} <= set(log[: captures[0]]) and {False, True} <= set(log[captures[0] : captures[1]])


def test_a_signal_during_a_compilation_ends_the_run(step, monkeypatch):
    """Compilers wrap what interrupts them."""

    def compiling():
        try:
            raise Interrupted("stopped by SIGTERM", 15)
        except Interrupted as error:
            raise RuntimeError("InternalTorchDynamoError") from error

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        Trials(step, PLAIN, lambda text: None)._fails(compiling)


@pytest.mark.parametrize("verdict, again", [("failed: OutOfMemoryError: 80 GB", True), ("slower", False)])
def test_what_may_pass_is_not_kept(step, monkeypatch, verdict, again):
    step.config = replace(step.config, runtime=replace(step.config.runtime, threads=0, compile="off"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls = []

    def run(self, tries):
        calls.append(tries)
        return execution.Execution(self.best, (execution.Trial("threads 1", verdict),))

    monkeypatch.setattr(Trials, "run", run)
    config = step.config
    for _ in range(2):
        step.config = config
        select_execution(step, ATTENTION)
    assert len(calls) == 1 + again


# ---- what is tried


def on(cuda, config, compiled=True):
    device = GPU if cuda else CPU.device
    return SimpleNamespace(
        cuda=cuda, compiled=compiled, config=config, ranks=Ranks(0, 1, device), dtype=torch.float32,
        dtype_choice=SimpleNamespace(name="float32"),
    )  # fmt: skip


def names(runtime, step):
    return [each.name for each in alternatives(runtime, step, ATTENTION)]


def test_a_gpu_tries_kernels_attention_and_graphs(tiny):
    auto = RuntimeConfig()
    expected = ["mlp", "mlp_gluon", "loss", "optimizer", "attention cudnn", "graph optimizer", "graph step"]
    assert names(auto, on(True, tiny)) == expected
    qat = replace(tiny, quant=replace(tiny.quant, qat="r4"))
    assert "fake_quant" in names(auto, on(True, qat))
    named = RuntimeConfig(kernels="triton", attention="flash", graph="off")
    assert not names(named, on(True, tiny)) and not names(auto, on(True, tiny, compiled=False))
    assert not names(RuntimeConfig(kernels="eager"), on(True, tiny)), "no question is asked"
    start = execution.starting_point(auto, on(True, tiny), ATTENTION)
    assert (start.kernels, start.graph, start.compile) == ("eager", "off", "auto")
    assert execution.starting_point(auto, on(True, tiny, compiled=False), ATTENTION).kernels == "auto"


def test_a_cpu_tries_threads_and_a_compilation_that_pays(tiny, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def lasting(seconds):
        config = replace(tiny, schedule=replace(tiny.schedule, max_seconds=seconds))
        return names(RuntimeConfig(), on(False, config, compiled=False))

    assert lasting(120.0) == ["threads 4", "threads 2", "threads 1"]
    assert lasting(600.0)[-1] == "compile" and lasting(None)[-1] == "compile"
    fixed = RuntimeConfig(threads=8, compile="off")
    assert not names(fixed, on(False, tiny, compiled=False))


# ---- a whole run


def test_a_run_stores_what_was_chosen_and_does_not_try_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(  # all equal
        "golfgpt.train.forecast._least", lambda work, rounds=None: work() or 0.01
    )  # no thread is faster
    auto = replace(tiny, runtime=replace(tiny.runtime, threads=0, compile="off"))
    train(auto, tmp_path / "run")
    stored = read_config(tmp_path / "run").runtime
    assert stored.threads in (0, 1) and (stored.compile, stored.attention, stored.graph) == ("off", "flash", "off")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "execution:kernels:auto attention:flash graph:off threads:2 compile:off" in log, "the number that torch has"
    assert "  threads 1: " in log and "ms a step against" in log
    monkeypatch.setattr(Trials, "run", None)
    rates = replace(auto.optim, matrix_lr=0.02), replace(auto.schedule, max_steps=2)
    for name, config in (("again", auto), ("rates", replace(auto, optim=rates[0], schedule=rates[1], seed=1))):
        train(config, tmp_path / name)
        assert "compile:off (trials of an earlier run)" in (tmp_path / name / "train.log").read_text()
    with pytest.raises(TypeError, match="not callable"):  # other steps
        train(replace(auto, optim=replace(auto.optim, muon_ns_steps=4)), tmp_path / "steps")
    train(read_config(tmp_path / "run"), tmp_path / "run", resume=True)


def test_trials_leave_no_trace(step):
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.config = replace(step.config, runtime=replace(step.config.runtime, threads=0))
    Trials(step, replace(PLAIN, dtype="float32"), lambda text: None).run([Alternative("again", {"threads": 1})])
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert not any(value.any() for value in step.optimizers.state().values()) and step.pace.known == (0, 0.0)


def test_a_failing_step_is_no_trial(step, monkeypatch):
    """Without any alternative it is the run's own failure."""
    monkeypatch.setattr(TrainStep, "rehearse", lambda self, looping=None: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Trials(step, PLAIN, lambda text: None).run(kernels("mlp"))


def test_what_a_run_chose_elsewhere_is_replaced_and_said():
    stored = RuntimeConfig(kernels="mlp,loss", attention="cudnn", threads=4)
    runtime, said = available(stored, stored, GPU if torch.cuda.is_available() else torch.device("meta"))
    assert runtime.kernels == "eager" and "kernels mlp,loss (eager here)" in said
    runtime, said = available(stored, stored, CPU.device)
    assert runtime.attention == "auto" and "attention cudnn (auto here)" in said
    asked = replace(stored, attention="flash")
    assert available(asked, stored, CPU.device)[0].attention == "flash"
    assert available(RuntimeConfig(), RuntimeConfig(), CPU.device) == (RuntimeConfig(), "")


@pytest.mark.parametrize("kernels", ["mlp,head", "", "auto,mlp"])
def test_unknown_kernels_are_refused(kernels):
    with pytest.raises(ValueError, match="expected auto, eager, triton, or some of mlp,mlp_gluon,loss,"):
        RuntimeConfig(kernels=kernels)


def test_graphs_need_a_gpu(tiny, corpus):
    with pytest.raises(InputError, match=r"runtime\.graph step expected a GPU, compilation and warmup_steps >= 1"):
        TrainStep(replace(tiny, runtime=replace(tiny.runtime, graph="step")), Dataset.open(corpus), CPU)


def test_named_parts_run_as_kernels_and_nothing_else(tiny):
    from golfgpt_kernels import implementation

    from golfgpt.train.kernels import choose_kernels

    with choose_kernels(replace(tiny, runtime=replace(tiny.runtime, kernels="mlp,optimizer")), CPU):
        chosen = {op: implementation(op, CPU.device, torch.float32)[0] for op in ("relu2_mlp", "muon_update_")}
        assert set(chosen.values()) == {"triton"}
        assert implementation("softcap_cross_entropy", CPU.device, torch.float32)[0] == "eager"


def test_selection_is_kept_by_what_shapes_the_step(step, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    step.config = replace(step.config, runtime=replace(step.config.runtime, threads=0, compile="off"))
    selection = Selection("flash", {}, False, {})
    assert not select_execution(step, selection).kept
    (file,) = (tmp_path / "cache" / "golfgpt" / "execution").iterdir()
    assert json.loads(file.read_text())["value"]["trials"][0]["name"] == "threads 1"
