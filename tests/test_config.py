"""Configs: validation, strict JSON round trip, recipes, schedules."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golfgpt import recipes
from golfgpt.config import (
    BigramConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    ValueEmbeddingConfig,
    differences,
    from_dict,
    to_dict,
)
from golfgpt.optim.schedule import crosses_cap, lr_multiplier, muon_momentum, weight_decay_factor
from golfgpt.train.clock import Pace


@pytest.mark.parametrize("recipe", recipes.RECIPES.values(), ids=lambda r: r.name)
def test_json_round_trip(recipe):
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(recipe.config)))) == recipe.config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["model"].update(num_layer=3), "unknown key model.num_layer; did you mean model.num_layers"),
        (lambda d: d["model"].pop("num_layers"), "missing key model.num_layers"),
        (lambda d: d["model"].update(num_layers="9"), "model.num_layers = '9'"),
        (lambda d: d["model"].update(num_layers=True), "model.num_layers = True"),
        (lambda d: d["quant"].update(clip="median"), "quant.clip = 'median'"),
        (lambda d: d.update(model=3), "expected an object"),
    ],
)
def test_strict_loading(edit, message):
    values = to_dict(RunConfig())
    edit(values)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(model_dim=510), "model.model_dim 510 is not a multiple of model.num_heads 8"),
        (lambda: ModelConfig(num_kv_heads=3), "not a multiple of model.num_kv_heads 3"),
        (lambda: ModelConfig(num_layers=0), "model.num_layers is 0; expected >= 1"),
        (lambda: ModelConfig(vocab_size=70_000), "model.vocab_size is 70000; expected >= 1 and <= 65536"),
        (lambda: ModelConfig(model_dim=24, num_heads=8), "head_dim 3 must be even"),
        (lambda: ModelConfig(rope_reference_len=0), "model.rope_reference_len is 0; expected >= 1"),
        (lambda: ModelConfig(model_dim=16, rope_reference_len=8), "needs more than 2 turning channels, got 2"),
        (lambda: BigramConfig(dim=128), "model.bigram.rows is 0 and model.bigram.dim is 128; expected at least 2 rows"),
        (lambda: BigramConfig(rows=9, hash="linear"), "model.bigram.dim is 0"),
        (lambda: BigramConfig(rows=-1), "model.bigram.rows is -1; expected >= 0"),
        (lambda: ModelConfig(document_start=1), "changes nothing without model.smear_gate or model.bigram.rows"),
        (lambda: ModelConfig(smear_gate="after_norm", document_start=1024), "is 1024; expected a token id below 1024"),
        (lambda: ModelConfig(rope_dims=5), "model.rope_dims is 5; expected an even number up to head_dim, 64"),
        (
            lambda: ModelConfig(xsa_layers=(2, 9)),
            r"model.xsa_layers is \(2, 9\); expected different layers from 0 to 8",
        ),
        (
            lambda: ModelConfig(xsa_layers=(2, 2)),
            r"model.xsa_layers is \(2, 2\); expected different layers from 0 to 8",
        ),
        (lambda: LoopConfig(first=4, last=3, passes=2), "model.loop.first is 4; expected at most model.loop.last, 3"),
        (lambda: LoopConfig(first=4, last=5), "names layers or a start, but model.loop.passes is 1"),
        (lambda: ModelConfig(loop=LoopConfig(first=4, last=9, passes=2)), r"model.loop.last is 9; expected .* 0 to 8"),
        (
            lambda: ModelConfig(parallel=ParallelConfig(kind="routed", first=9)),
            "model.parallel.first is 9; expected different layers from 0 to 8",
        ),
        (
            lambda: ModelConfig(
                loop=LoopConfig(first=2, last=4, passes=2), parallel=ParallelConfig(kind="merged", first=4)
            ),
            "model.parallel.first is 4; expected a layer after model.loop.last, 4",
        ),
        (lambda: ValueEmbeddingConfig(dim=8), "expected both or neither"),
        (
            lambda: ModelConfig(model_dim=64, attn_gate="sparse", gate_window=65),
            "model.gate_window is 65; expected at most model.model_dim, 64",
        ),
        (lambda: OptimConfig(matrix_lr=-1.0), "optim.matrix_lr is -1.0; expected >= 0"),
        (lambda: OptimConfig(muon_momentum=1.0), "optim.muon_momentum is 1.0; expected >= 0 and < 1"),
        (lambda: ScheduleConfig(max_seconds=0.0), "schedule.max_seconds is 0.0; expected > 0"),
        (lambda: ScheduleConfig(warmdown_frac=1.5), "schedule.warmdown_frac is 1.5; expected >= 0 and <= 1"),
        (
            lambda: ScheduleConfig(max_seconds=5.0, reserve_seconds=6.0),
            "schedule.reserve_seconds is 6; expected less than schedule.max_seconds, 5.0",
        ),
        (
            lambda: ScheduleConfig(max_seconds=None, reserve_seconds=6.0),
            "schedule.reserve_seconds is 6; expected less than schedule.max_seconds, None",
        ),
        (
            lambda: RunConfig(optim=OptimConfig(grad_clip="span"), data=DataConfig(microbatch_tokens=131_072)),
            "optim.grad_clip span expected data.microbatch_tokens to divide the span's 65536 tokens, got 131072",
        ),
        (lambda: DataConfig(batch_tokens=1000), "data.batch_tokens 1000 is not a multiple"),
        (lambda: DataConfig(microbatch_tokens=1000), "data.microbatch_tokens is 1000; expected a multiple"),
        (lambda: QuantConfig(bits=1), "quant.bits is 1; expected >= 2 and <= 8"),
        (lambda: EvalConfig(stride=0), "eval.stride is 0; expected >= 1"),
        (lambda: EvalConfig(window=64, stride=65), "tokens would be skipped"),
        (lambda: RunConfig(eval=EvalConfig(stride=2048)), "exceeds the window 1024"),
        (lambda: OptimConfig(muon_ns_steps=0), "optim.muon_ns_steps is 0; expected >= 1"),
        (lambda: ModelConfig(logit_softcap=float("inf")), "model.logit_softcap is inf; expected > 0"),
        (lambda: RunConfig(seed=2**64), "seed is .*; expected 0 to"),
        (lambda: BudgetConfig(artifact_bytes=50_000, code_bytes=60_000), "leaves nothing"),
    ],
)
def test_validation(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rope_base_grows_beyond_the_reference_length():
    """The published bases: 1408, 2048 and 4096 tokens against 1024 (R1 to R3), 4096 against 2048 (R5)."""
    model = ModelConfig(rope_reference_len=1024)
    assert [round(model.rope_base_at(length)) for length in (64, 1024, 1408, 2048, 4096)] == [
        10_000, 10_000, 13_892, 20_452, 41_829,
    ]  # fmt: skip
    assert round(replace(model, rope_reference_len=2048).rope_base_at(4096)) == 20_452
    assert ModelConfig().rope_base_at(10**6) == 10_000


def test_differences_name_the_fields():
    old = RunConfig()
    new = replace(old, model=replace(old.model, num_layers=3), seed=1)
    assert differences(old, new) == ["model.num_layers: 9 -> 3", "seed: 1337 -> 1"]


def test_unknown_recipe_is_answered_with_a_suggestion():
    with pytest.raises(ValueError, match="did you mean baseline"):
        recipes.get("basline")


def test_upstream_schedule_values():
    """The published run with warmdown_iters 20000: 12,756 steps of 47.04 ms, peak 0.638 nominal."""
    config = ScheduleConfig(kind="warmdown_steps", warmdown_steps=20_000, max_seconds=600.0)
    assert lr_multiplier(0, 0.0, config) == 1.0
    assert lr_multiplier(1000, 47.04, config) == pytest.approx((600 / 47.04e-3 - 1000) / 20_000)
    iterations = replace(config, max_seconds=None, max_steps=24, warmdown_steps=10)
    assert [lr_multiplier(s, 0, iterations) for s in (0, 13, 14, 15, 23, 24)] == [1, 1, 1, 0.9, 0.1, 0]
    assert lr_multiplier(5, 1.0, replace(config, warmdown_steps=0)) == 1.0


@given(st.integers(0, 2000), st.floats(0, 700), st.floats(0, 1))
def test_fraction_schedule(step, seconds, frac):
    config = ScheduleConfig(max_steps=1000, max_seconds=600.0, warmdown_frac=frac)
    value = lr_multiplier(step, seconds, config)
    assert 0 <= value <= 1
    assert lr_multiplier(step + 1, seconds + 1, config) <= value
    used = max(step / 1000, seconds / 600)
    if used >= 1:
        assert value == 0 or frac == 0
    elif used <= 1 - frac:
        assert value == pytest.approx(1)


def test_what_is_kept_in_reserve_is_no_training_time():
    config, short = ScheduleConfig(max_seconds=600.0, reserve_seconds=13.0), ScheduleConfig(max_seconds=587.0)
    for seconds in (0.0, 200.0, 580.0, 586.9):
        assert lr_multiplier(9, seconds, config) == lr_multiplier(9, seconds, short)
        assert crosses_cap(seconds, 0.1, config) == crosses_cap(seconds, 0.1, short)


def test_weight_decay_tapers():
    """As in PR #1729: whole up to 70 % of the budget, then linear to a half."""
    config = OptimConfig(weight_decay_end=0.5)
    assert [weight_decay_factor(used, config) for used in (0, 0.7, 0.85, 1)] == pytest.approx([1, 1, 0.75, 0.5])
    assert weight_decay_factor(1.0, OptimConfig()) == 1


def test_muon_momentum_warms_up():
    config = OptimConfig(muon_momentum_warmup_steps=100)
    assert [muon_momentum(s, config) for s in (0, 50, 100, 1000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert muon_momentum(0, replace(config, muon_momentum_warmup_steps=0)) == 0.95


@given(st.lists(st.floats(0.9, 1.0), min_size=50, max_size=80), st.floats(2.2, 40.0))
def test_the_cap_is_never_crossed(durations, cap):
    """Steps that vary by 10 %: the vote of a step stops the run before the step that would cross."""
    config = ScheduleConfig(max_seconds=cap)
    clock, recent, stop = 0.0, [], False
    for duration in durations:
        if stop:
            break
        stop = crosses_cap(clock, max(recent, default=0.0), config)
        clock += duration
        if not recent:  # the loop decides once more after the first step
            stop = clock + 1.05 * duration > cap
        recent = [*recent, duration][-32:]
    assert clock <= cap + 1e-9 or len(recent) == 1


@given(st.lists(st.floats(0.5, 1.0), min_size=130, max_size=130), st.floats(30.0, 50.0), st.integers(0, 1))
def test_a_stall_ends_no_training_early(durations, stalled, ahead):
    """A step takes up to twice the median, but for one of 4.1 s: neither is the cap crossed nor much of it left."""
    pace, clock, done, stop = Pace(ScheduleConfig(max_seconds=60.0), ahead), 0.0, 0, None
    pace.start(0.0)
    while stop is None or done <= stop + ahead:
        if stop is None and done > 2 and pace.crosses_cap(clock):
            stop = done
        stall, duration = clock < stalled, durations[done]
        clock += duration
        if stall and clock >= stalled:
            clock += 4.1 - duration
        pace.step_over(clock)
        done += 1
    assert 60 - 2.1 * 2 * (1 + ahead) < clock <= 60


@given(st.integers(3, 60), st.floats(0.95, 1.05), st.integers(0, 1))
def test_the_cap_is_never_crossed_when_a_loop_begins(begins, noise, ahead):
    """Steps take as long as their layers; the steps that vote know the layers of the step that comes after them."""
    config = ScheduleConfig(max_seconds=60.0)
    pace, clock, done, starts, stop = Pace(config, ahead), 0.0, 0, [], None
    pace.start(0.0)

    def layers(step: int) -> int:
        return 17 if step >= begins else 11

    while stop is None or done <= stop + ahead:
        starts.append(clock)
        if stop is None and done > 2 and pace.crosses_cap(clock, layers(done + 1 + ahead)):
            stop = done
        clock += layers(done) / 11 * (noise if done % 2 else 1.0)
        pace.step_over(clock, layers(done))
        done += 1
    assert 60 - 5 * 17 / 11 < clock <= 60
