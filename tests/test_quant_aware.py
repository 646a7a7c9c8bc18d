"""What was trained is what ships: weights of a quantization-aware forward against those decoded from the artifact."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from models import fake_quantized

from golfgpt.config import AverageConfig, BigramConfig, ModelConfig, OptimConfig, QuantConfig, RunConfig, ScheduleConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import of_kind, parameter_table
from golfgpt.optim.averaging import Average
from golfgpt.optim.flat import FlatGradients
from golfgpt.optim.schedule import lr_multiplier, quantization_aware
from golfgpt.quant import artifact, compute_copies
from golfgpt.quant.formats import decode
from golfgpt.quant.quantizer import Quantizer
from golfgpt.recipes import RECIPES
from golfgpt.train.step import TrainStep

MODEL = ModelConfig(
    vocab_size=61,
    num_layers=4,
    model_dim=36,
    num_heads=3,
    num_kv_heads=1,
    mlp_hidden=50,
    smear_gate="after_norm",
    bigram=BigramConfig(rows=33, dim=9),
)
MIXED = QuantConfig(
    bits=6,
    rules=("tok_emb.*=int8", "blocks.-1.attn.c_k.*=float16", "blocks.[01].mlp.fc.*=int5/12", "*.mlp.*=int5"),
    keep_numel=0,
    control_dtype="float16",
    qat="export",
    compressor="zlib",
)


def model_with_hard_rows(seed: int = 0) -> GPT:
    """Zero rows, rows with one outlier, rows of magnitude 1e-6 and 1e3; every parameter away from its start."""
    model, generator = GPT(MODEL), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            if p.ndim >= 2:
                rows = p.view(-1, p.size(-1))
                rows[0] = 0
                rows[1, 0] = 40.0
                rows[2:3] *= 1e-6
                if len(rows) > 3:
                    rows[3] *= 3e3
    return model


@pytest.mark.numeric
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("clip", ["max", "quantile"])
@pytest.mark.parametrize(
    "quant", [MIXED, QuantConfig(bits=8, keep_numel=0, qat="export"), QuantConfig(bits=5, qat="export")]
)
def test_the_forward_uses_the_weights_of_the_artifact_bit_for_bit(quant, clip, impl, device):
    if device == "cuda":
        pytest.skip("the CPU's artifact is compared with the CPU's forward here")
    quant = replace(quant, clip=clip, compressor="zlib")
    model = model_with_hard_rows()
    seen = dict(model.named_parameters()) | fake_quantized(model, Quantizer(MODEL, quant).fake_quant(), impl=impl)
    blob = artifact.pack(model.state_dict(), model=MODEL, quant=quant, tokenizer_sha256="0" * 64, seq_len=8)
    decoded = artifact.unpack(blob).state
    assert set(decoded) == set(seen)
    for name, weights in seen.items():
        assert torch.equal(weights, decoded[name]), name


@pytest.mark.numeric
def test_every_tensor_gets_a_straight_through_gradient():
    model, shipped = model_with_hard_rows(), model_with_hard_rows()
    quantizer = Quantizer(MODEL, MIXED)
    shipped.load_state_dict(decode(quantizer.encode(model.state_dict())))
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    loss = model.loss(ids, ids, stand_ins=fake_quantized(model, quantizer.fake_quant()))
    assert torch.equal(loss, shipped.loss(ids, ids)) and not torch.equal(loss, model.loss(ids, ids))
    loss.backward()
    shipped.loss(ids, ids).backward()
    for (name, p), q in zip(model.named_parameters(), shipped.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)


def run(quant: QuantConfig, compile: str = "off", **fields) -> RunConfig:
    base = RunConfig()
    return replace(
        base,
        model=MODEL,
        quant=quant,
        schedule=ScheduleConfig(max_steps=8, max_seconds=None, warmdown_frac=0.5),
        data=replace(base.data, batch_tokens=256, seq_len=16),
        runtime=replace(base.runtime, device="cpu", dtype="float32", compile=compile, warmup_steps=1),
        **fields,
    )


class Tokens:
    """What `TrainStep` needs of a data set."""

    train = (torch.arange(4096).numpy().astype("uint16") * 7 % 61,)


def trainer_of(config: RunConfig) -> TrainStep:
    return TrainStep(config, Tokens, Ranks(0, 1, torch.device("cpu")))


def test_a_warm_up_leaves_late_quantization_switched_on():
    """A resumed run warms up past its start. Without compute copies nothing else would switch it on again."""
    rules = ("tok_emb.weight=int2", "*=float32")
    trainer = trainer_of(run(QuantConfig(rules=rules, keep_numel=0, qat="export", qat_start=0.5)))
    trainer.prepare(7)
    before = trainer.wait(trainer.launch(7)).loss
    trainer.warm_up(1)
    assert trainer.wait(trainer.launch(7)).loss == before
    trainer.prepare(0)
    assert trainer.wait(trainer.launch(7)).loss != before


@pytest.mark.parametrize(("start", "below", "expected"), [(0.5, 1.0, 4), (0.0, 0.6, 6), (0.0, 1.0, 0)])
def test_late_quantization_begins_on_its_step_without_recompiling(start, below, expected, monkeypatch):
    """warmdown_frac 0.5 of 8 steps: multipliers 1 for steps 0 to 4, then .75, .5, .25."""
    quant = QuantConfig(bits=2, keep_numel=0, qat="export", qat_start=start, qat_below_lr=below)
    config = run(quant, compile="on")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    trainer, plain = trainer_of(config), trainer_of(run(QuantConfig()))
    for step in range(8):
        plain.model.load_state_dict(trainer.model.state_dict())
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            pending = trainer.launch(step)
            result = trainer.wait(pending)
        unquantized = plain.wait(plain.launch(step)).loss
        aware = step >= expected
        assert trainer.quantization_aware(step) == aware
        assert (abs(result.loss - unquantized) > 1e-4) == aware, (step, result.loss, unquantized)
        trainer.update(pending)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", [MIXED, QuantConfig(), QuantConfig(bits=5, keep_numel=0, qat="r5", clip="quantile")])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_compute_copies_are_what_the_forward_would_make_of_the_weights(quant, dtype, start):
    """After every update, Muon's launch or the refresh has left exactly what casting and quantizing would give."""
    quant = replace(quant, qat_start=start if quant.qat != "off" else 0.0)
    config = run(quant)
    trainer = trainer_of(replace(config, runtime=replace(config.runtime, dtype=dtype)))
    copies = trainer.compute_copies
    matrices = set(of_kind(parameter_table(MODEL), "matrix"))
    assert set(copies.banks) == (matrices if dtype == "bfloat16" or quant.qat != "off" else set())
    quantized = Quantizer(MODEL, quant).fake_quant()
    for step in range(6):
        pending = trainer.launch(step)
        result = trainer.wait(pending)
        options = quantized if trainer.quantization_aware(step) else None
        trainer.update(pending)
        aware = trainer.quantization_aware(step + 1)
        weights = dict(trainer.model.named_parameters()) | fake_quantized(trainer.model, quantized if aware else {})
        for name, copy in copies.banks.items():
            assert torch.equal(copy, weights[name].to(copy.dtype)), (step, name)
        assert result.finite and (options is None) == (quant.qat == "off" or step < 8 * start)
    trainer.model.load_state_dict(GPT(MODEL, seed=5).state_dict())
    trainer.launch(6)
    weights = dict(trainer.model.named_parameters()) | fake_quantized(trainer.model, quantized)
    assert all(torch.equal(copy, weights[name].to(copy.dtype)) for name, copy in copies.banks.items())


def test_from_the_first_bad_step_on_nothing_changes(monkeypatch):
    trainer = trainer_of(run(replace(MIXED, qat="export"), optim=OptimConfig(embed_dtype="bfloat16")))
    trainer.update(trainer.launch(0))
    before = {k: v.clone() for k, v in (trainer.model.state_dict() | trainer.optimizers.state()).items()}
    copies = {k: v.clone() for k, v in trainer.compute_copies.banks.items()}
    sum_ = FlatGradients.sum_
    monkeypatch.setattr(FlatGradients, "sum_", lambda flat: (sum_(flat), flat.gradients[7:8].fill_(float("nan"))))
    bad = trainer.launch(1)
    trainer.update(bad)
    monkeypatch.setattr(FlatGradients, "sum_", sum_)
    trainer.update(trainer.launch(2))  # on its way before the host has read step 1
    after = trainer.model.state_dict() | trainer.optimizers.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(trainer.compute_copies.banks[name], value) for name, value in copies.items())
    with pytest.raises(NonFiniteError, match=r"step 1: .* is not finite; nothing was updated"):
        trainer.wait(bad)


def test_quantization_aware_by_budget_and_rate():
    c = QuantConfig(qat="export", qat_start=0.5, qat_below_lr=0.3)
    assert [quantization_aware(*case, c) for case in [(0.4, 0.1), (0.5, 0.3), (0.6, 0.31), (0.9, 0.0)]] == [0, 1, 0, 1]
    assert not quantization_aware(1.0, 0.0, QuantConfig())


@pytest.mark.slow
def test_what_inductor_compiles_trains_on_the_weights_that_ship():
    """It removes a round trip through float16, which is how passthrough tensors are stored, wherever it sees one."""
    torch.compiler.reset()
    model = model_with_hard_rows()
    quantizer = Quantizer(MODEL, replace(MIXED, rules=(*MIXED.rules[1:], "tok_emb.*=float16")))
    shipped = GPT(MODEL)
    shipped.load_state_dict(decode(quantizer.encode(model.state_dict())))
    enabled = torch.tensor(True)
    groups = quantizer.fake_quant()
    assert groups["tok_emb"][0][1] == groups["resid_mix"][0][1] == torch.float16

    def used(weights, on):
        return {name: compute_copies.fake_quantized(w, groups.get(name, []), on) + 0 for name, w in weights.items()}

    compiled = torch.compile(used, dynamic=False, fullgraph=True)
    weights = dict(model.named_parameters())
    for name, w in compiled(weights, enabled).items():
        assert torch.equal(w, shipped.get_parameter(name)), name
    for name, w in compiled(weights, torch.tensor(False)).items():
        assert torch.equal(w, weights[name]), name


# Averages


def weights_over_time(steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(1 + torch.randn(50, generator=generator)).to(dtype).float() for _ in range(steps)]


def averaged(config: AverageConfig, series, multipliers, narrow=(), state=None, done: int = 0) -> Average:
    """The average of a weight that takes the values `series` after `done` steps, which left `state`."""
    p = torch.nn.Parameter(torch.zeros(50))
    average = Average({"w": p}, config, frozenset(narrow))
    if state is not None:
        average.load_state(state)
    for step, (w, multiplier) in enumerate(zip(series, multipliers, strict=True), done + 1):
        p.data.copy_(w)
        average.update(step, multiplier)
    return average


@pytest.mark.numeric
def test_swa_is_the_mean_of_every_nth_step_below_the_rate():
    series = weights_over_time(12)
    multipliers = [1.0] * 5 + [0.4, 0.39, 0.3, 0.2, 0.1, 0.05, 0.0]
    average = averaged(AverageConfig(kind="swa", swa_start_lr=0.4, swa_every=2), series, multipliers)
    taken = [series[i - 1] for i in (8, 10, 12)]
    assert average.count == 3
    torch.testing.assert_close(average.weights()["w"], torch.stack(taken).mean(0))
    assert averaged(AverageConfig(kind="swa"), series[:3], multipliers[:3]).weights() == {}
    once = AverageConfig(kind="swa", swa_start_lr=1.0, swa_every=3)
    assert averaged(once, series[:3], [0.5] * 3).weights() == {}, "the last weights are better than one sample"


@pytest.mark.numeric
def test_ema_divides_out_its_start():
    series, d = weights_over_time(6), 0.9
    average = averaged(AverageConfig(kind="ema", ema_decay=d), series, [1.0] * 6)
    shares = torch.tensor([d ** (5 - i) for i in range(6)])
    expected = (shares[:, None] * torch.stack(series)).sum(0) / shares.sum()
    torch.testing.assert_close(average.weights()["w"], expected)


@pytest.mark.numeric
def test_sums_in_bfloat16_are_the_published_flaw():
    series = weights_over_time(48, torch.bfloat16)
    exact = torch.stack(series).mean(0)
    errors = {}
    for sums in ("float32", "parameter"):
        config = AverageConfig(kind="swa", swa_start_lr=1.0, swa_every=1, sums=sums)
        mean = averaged(config, series, [0.0] * 48, narrow=["w"]).weights()["w"]
        errors[sums] = ((mean - exact).norm() / exact.norm()).item()
    assert errors["float32"] < 1e-6 < 5e-3 < errors["parameter"] < 0.1


@pytest.mark.numeric
def test_an_average_resumes():
    series, config = weights_over_time(8), AverageConfig(kind="ema")
    whole, first = averaged(config, series, [1.0] * 8), averaged(config, series[:5], [1.0] * 5)
    second = averaged(config, series[5:], [1.0] * 3, state=first.state(), done=5)
    assert torch.equal(whole.weights()["w"], second.weights()["w"])
    assert averaged(AverageConfig(), series, [1.0] * 8).state() == {}


# Schedules


def test_cosine_and_its_cap():
    cosine = ScheduleConfig(
        max_steps=100, max_seconds=None, kind="warmdown_steps", warmdown_steps=40, warmdown_shape="cosine"
    )
    assert [round(lr_multiplier(step, 0.0, cosine), 6) for step in (0, 60, 70, 80, 90, 100)] == [
        1, 1, 0.853553, 0.5, 0.146447, 0,
    ]  # fmt: skip
    r5 = RECIPES["int5-int6-swa"].config.schedule
    assert lr_multiplier(3000, 3000 * 0.0908, r5) == 1.0  # 8 GPUs: the warmdown starts at 328 s
    assert lr_multiplier(3700, 3700 * 0.0908, r5) < 1.0
    assert lr_multiplier(430, 430 * 0.688, r5) == 1.0  # one GPU: 3000 steps would be 2064 s, the cap makes it 300
    assert lr_multiplier(480, 480 * 0.688, r5) < 1.0
    assert OptimConfig().embed_dtype == "float32"
