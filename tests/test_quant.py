"""The quantizer against its formulas and against training's fake quantization."""

import math
from dataclasses import replace

import pytest
import torch
from golfgpt_kernels import fake_quantize_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from golfgpt.config import ModelConfig, QuantConfig
from golfgpt.errors import InputError
from golfgpt.model.parameters import parameter_shapes, parameter_table
from golfgpt.quant.quantizer import Quantizer, TensorFormat, payload_bytes, plan_formats

pytestmark = pytest.mark.numeric

SMALL = ModelConfig(vocab_size=24, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, mlp_hidden=20)
ROWS = QuantConfig(keep_numel=0)


def random_state(config: ModelConfig, seed: int = 0, std: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    return {name: std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def models() -> st.SearchStrategy[ModelConfig]:
    return st.builds(
        lambda vocab, layers, heads, groups, head_dim, hidden, tied, pairs: ModelConfig(
            vocab_size=vocab,
            num_layers=layers,
            model_dim=heads * groups * head_dim,
            num_heads=heads * groups,
            num_kv_heads=heads,
            mlp_hidden=hidden,
            tie_embeddings=tied,
            smear_gate="none" if pairs == "none" else "before_norm",
            bigram_hash=pairs,
            bigram_vocab_size=0 if pairs == "none" else 9,
            bigram_dim=0 if pairs == "none" else 5,
        ),
        st.integers(1, 40),
        st.integers(1, 4),
        st.integers(1, 2),
        st.integers(1, 2),
        st.sampled_from([2, 4, 6]),
        st.integers(1, 30),
        st.booleans(),
        st.sampled_from(["none", "xor", "linear"]),
    )


def quants() -> st.SearchStrategy[QuantConfig]:
    return st.builds(
        QuantConfig,
        bits=st.integers(2, 8),
        clip=st.sampled_from(["max", "quantile"]),
        scale_floor=st.sampled_from([0.0, 1 / 127]),
        scale_dtype=st.sampled_from(["float16", "float32"]),
        codes_from=st.sampled_from(["stored_scale", "float32_scale"]),
        keep_numel=st.sampled_from([0, 100, 10**9]),
    )


def test_baseline_sizes_are_the_published_ones():
    quantizer = Quantizer(ModelConfig(), QuantConfig(keep_numel=65_536))
    formats = quantizer.formats.values()
    assert sum(format.elements for format in formats) == 17_059_912
    assert sum(format.elements for format in formats if format.quantized) == 17_039_360
    assert sum(format.scale_bytes for format in formats) == 57_344
    assert sum(format.value_bytes for format in formats if not format.quantized) == 82_208
    assert quantizer.payload_bytes == 17_178_912


def test_plan_decides_by_the_size_of_one_layer():
    shapes = {"tok_emb": (10, 10), "c_q": (9, 10, 10), "c_k": (9, 10, 11), "resid_mix": (9, 2, 100)}
    shapes |= {"bigram_table": (11, 10), "bigram_proj": (10, 10), "smear_gate": (200,), "bigram_scale": ()}
    model = ModelConfig(smear_gate="after_norm", bigram_hash="xor", bigram_vocab_size=11, bigram_dim=10)
    table = {name: replace(parameter_table(model)[name], shape=shape) for name, shape in shapes.items()}
    formats = plan_formats(table, QuantConfig(bits=6, keep_numel=100))
    assert formats == {
        "tok_emb": TensorFormat((10, 10), "float16"),
        "c_q": TensorFormat((9, 10, 10), "float16"),
        "c_k": TensorFormat((9, 10, 11), "int6", "float16"),
        "resid_mix": TensorFormat((9, 2, 100), "float32"),
        "bigram_table": TensorFormat((11, 10), "int6", "float16"),
        "bigram_proj": TensorFormat((10, 10), "float16"),
        "smear_gate": TensorFormat((200,), "float32"),
        "bigram_scale": TensorFormat((), "float32"),
    }
    assert payload_bytes(formats) == 2 * 100 + 2 * 900 + 990 + 2 * 90 + 4 * 1800 + 110 + 2 * 11 + 2 * 100 + 4 * 201
    assert formats["c_k"].max_code == 31


@pytest.mark.parametrize("arguments", [("int9", "float16"), ("int8", None), ("int8", "int8"), ("float16", "float16")])
def test_impossible_formats_are_refused(arguments):
    with pytest.raises(InputError):
        TensorFormat((2, 2), *arguments)


@settings(max_examples=40, deadline=None)
@given(models(), quants(), st.integers(0, 1000))
def test_decoded_weights_equal_what_training_used(model, quant, seed):
    quantizer, state = Quantizer(model, quant), random_state(model, seed)
    encoded = quantizer.encode(state)
    stored = sum(
        tensor.values.nbytes + (0 if tensor.scale is None else tensor.scale.nbytes) for tensor in encoded.values()
    )
    assert stored == quantizer.payload_bytes
    decoded = quantizer.decode(encoded)
    for name, format in quantizer.formats.items():
        assert decoded[name].dtype == torch.float32
        if format.quantized:
            expected = fake_quantize_rows(state[name], quantizer.spec(name))
        else:
            expected = state[name] if parameter_table(model)[name].kind == "control" else state[name].half().float()
        assert torch.equal(decoded[name], expected), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_decoding_errs_by_half_a_step(bits):
    quantizer, state = Quantizer(SMALL, QuantConfig(bits=bits, keep_numel=0)), random_state(SMALL)
    for name, tensor in quantizer.encode(state).items():
        if tensor.scale is not None:
            # fp16 rounds the scale by up to 2^-11 of itself, which the row's largest code multiplies.
            bound = tensor.scale.float() * (0.5 + tensor.format.max_code * 2**-11)
            assert ((tensor.decode() - state[name]).abs() <= bound.unsqueeze(-1)).all(), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_encoding_decoded_weights_changes_nothing(bits):
    """The row's maximum decodes to exactly max_code * scale, so clip="max" finds the same scale again.

    It does not hold under a scale floor or a quantile clip, nor for scales below 6.1e-5, whose few fp16
    bits are rounded up: there the largest code is below max_code.
    """
    quantizer = Quantizer(SMALL, QuantConfig(bits=bits, keep_numel=0))
    once = quantizer.encode(random_state(SMALL))
    twice = quantizer.encode(quantizer.decode(once))
    for name in once:
        assert torch.equal(once[name].values, twice[name].values), name
        assert once[name].scale is None or torch.equal(once[name].scale, twice[name].scale), name


def test_zero_rows_stay_zero():
    state = random_state(SMALL)
    state["c_q"][1] = 0
    decoded = Quantizer(SMALL, ROWS).decode(Quantizer(SMALL, ROWS).encode(state))
    assert torch.count_nonzero(decoded["c_q"][1]) == 0


def test_table_reports_bytes_and_errors():
    quantizer, state = Quantizer(SMALL, ROWS), random_state(SMALL)
    state["q_gain"].zero_()
    without, table = quantizer.table(), quantizer.table(state)
    assert sum(line.value_bytes + line.scale_bytes for line in without) == quantizer.payload_bytes
    assert all(line.relative_rms_error is None and line.snr_db is None for line in without)
    lines = {line.name: line for line in table}
    decoded = quantizer.decode(quantizer.encode(state))["mlp_fc"]
    expected = ((decoded - state["mlp_fc"]).norm() / state["mlp_fc"].norm()).item()
    assert lines["mlp_fc"].relative_rms_error == pytest.approx(expected, rel=1e-5)
    assert lines["mlp_fc"].snr_db == pytest.approx(-20 * math.log10(expected), rel=1e-5)
    assert lines["resid_mix"].snr_db == lines["q_gain"].snr_db == math.inf


def test_scale_floor_of_the_baseline_ruins_small_weights():
    """Trap T2: at std 0.02 the floor of 1/127 costs 11 % of relative error, without it 0.7 %."""
    model, errors = ModelConfig(vocab_size=256, num_layers=1, model_dim=512, mlp_hidden=1), []
    state = random_state(model, std=0.02)
    for floor in (0.0, 1.0):
        lines = Quantizer(model, QuantConfig(clip_floor=floor)).table(state)
        errors.append(next(line.relative_rms_error for line in lines if line.name == "tok_emb"))
    assert errors[0] < 0.01 < 0.1 < errors[1] < 0.13


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["c_q", "q_gain"])
def test_non_finite_weights_are_refused_by_name(name, value):
    state = random_state(SMALL)
    state[name].view(-1)[5] = value
    with pytest.raises(InputError, match=f"tensor {name} has 1 non-finite"):
        Quantizer(SMALL, ROWS).encode(state)


def test_weights_beyond_float16_are_refused_where_they_would_be_kept_in_it():
    state = random_state(SMALL)
    state["c_v"][0, 0, 0] = 1e5
    with pytest.raises(InputError, match=r"tensor c_v .*65504"):
        Quantizer(SMALL, QuantConfig(keep_numel=10**9)).encode(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("c_q"), "missing tensors: c_q"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected tensors: extra"),
        (lambda state: state.update(c_k=torch.zeros(3, 8, 15)), "tensor c_k has shape .3, 8, 15., expected"),
    ],
)
def test_a_state_of_another_model_is_refused(change, message):
    state = random_state(SMALL)
    change(state)
    with pytest.raises(InputError, match=message):
        Quantizer(SMALL, ROWS).encode(state)
