"""The model: counts, initialization, embeddings, causality, cache, fake quantization, dtypes, attention backends."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golfgpt_kernels import RowQuant, fake_quantize_rows
from models import SMALL, fake_quantized, lively
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from golfgpt.config import (
    BigramConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ValueEmbeddingConfig,
)
from golfgpt.model import generate, segments
from golfgpt.model.gpt import GPT
from golfgpt.model.kv_cache import KVCache
from golfgpt.model.linear import LoRA, Observed, rms_norm, scaled
from golfgpt.model.plan import layer_plan
from golfgpt.model.rotary import norm_rotate, rope_table
from golfgpt.model.segments import Segments, attend_within
from golfgpt.optim.optimizers import Optimizers
from golfgpt.published.names import from_published, to_published
from golfgpt.quant import compute_copies

pytestmark = pytest.mark.numeric

R5 = ModelConfig(
    num_layers=10,
    mlp_hidden=1536,
    rope_reference_len=2048,
    matrix_init="orthogonal",
    resid_mix_init="phase",
    smear_gate="after_norm",
    bigram=BigramConfig(rows=10_240, dim=128),
)
PAIRS = replace(SMALL, bigram=BigramConfig(rows=60, dim=12))
LINEAR = replace(PAIRS.bigram, hash="linear")
VARIANTS = {
    "plain": SMALL,
    "r5": replace(PAIRS, smear_gate="after_norm"),
    "pr65": replace(PAIRS, smear_gate="before_norm", bigram=LINEAR),
    "r5-documents": replace(PAIRS, smear_gate="after_norm", document_start=1),
    "pr65-documents": replace(PAIRS, smear_gate="before_norm", bigram=LINEAR, document_start=1),
    "ntk": replace(SMALL, rope_reference_len=10),
}
LATER = replace(SMALL, mlp_slope=0.5, rope_dims=4, ln_scale=True, xsa_layers=(0, 1, 2, 3, 4))
LOOPED = replace(LATER, skip_gates=True, loop=LoopConfig(first=1, last=2, passes=3))
RECORDS = {
    "2026-03-22": replace(
        LATER,
        mlp_slope=0.0,
        xsa_layers=(3, 4),
        smear_gate="after_norm",
        bigram=PAIRS.bigram,
        value_embedding=ValueEmbeddingConfig(dim=10, layers=(2, 4)),
    ),
    "2026-03-25": replace(
        LATER,
        xsa_layers=(0, 1, 2, 3, 4),
        smear_gate="after_norm",
        bigram=PAIRS.bigram,
        value_embedding=ValueEmbeddingConfig(dim=10, layers=(2, 4)),
        projection_init="unscaled",
    ),
    "golf2": replace(
        LATER,
        xsa_layers=(0, 1, 2, 3, 4),
        smear_gate="input",
        document_start=1,
        attn_gate="sparse",
        bigram=PAIRS.bigram,
        loop=LOOPED.loop,
    ),
    "2026-04-05": LOOPED,
    "pr1477": replace(LOOPED, parallel=ParallelConfig(kind="merged", first=3)),
    "2026-04-09": replace(LOOPED, parallel=ParallelConfig(kind="one_lane", first=3)),
    "2026-04-16": replace(LOOPED, attn_gate="window", parallel=ParallelConfig(kind="routed", first=3, final="mlp")),
    "2026-04-19": replace(LOOPED, attn_gate="dense", parallel=ParallelConfig(kind="routed", first=4)),
    "2026-04-27": replace(
        LOOPED,
        attn_gate="sparse",
        attn_gate_scale=0.5,
        smear_gate="input",
        document_start=1,
        parallel=ParallelConfig(kind="routed", first=3),
    ),
}
VARIANTS |= RECORDS
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids with a document start (id 1) in every eighth place or so."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, shape, generator=generator)
    return ids.masked_fill(torch.rand(shape, generator=generator) < 1 / 8, 1)


EMA = ModelConfig(  # of 2026-03-22
    num_layers=11,
    mlp_hidden=1536,
    smear_gate="after_norm",
    bigram=BigramConfig(rows=2048, dim=128),
    value_embedding=ValueEmbeddingConfig(dim=128, layers=(9, 10)),
)
LOOP = ModelConfig(  # of 2026-04-05
    vocab_size=8192,
    num_layers=11,
    mlp_hidden=2048,
    skip_gates=True,
    loop=LoopConfig(first=4, last=5, passes=3),
)
ROUTED = replace(  # of 2026-04-10
    LOOP, loop=LoopConfig(first=3, last=5, passes=3), parallel=ParallelConfig(kind="routed", first=8)
)
SPARSE = replace(ROUTED, attn_gate="sparse")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ModelConfig(), 17_059_912),
        (ModelConfig(mlp_hidden=992), 16_765_000),
        (ModelConfig(mlp_hidden=1536), 21_778_504),
        (R5, 25_517_137),
        (replace(R5, num_layers=9, bigram=BigramConfig(rows=4096, dim=128)), 22_368_841),
        (replace(R5, num_layers=9, bigram=BigramConfig(rows=4096, dim=128, hash="linear")), 22_368_840),
        (EMA, 26_993_756),
        (replace(EMA, bigram=BigramConfig(rows=3072, dim=112)), 27_067_484),
        (LOOP, 35_943_512),
        (replace(ROUTED, parallel=ParallelConfig(kind="one_lane", first=7)), 35_944_536),
        (ROUTED, 35_944_602),
        (SPARSE, 35_945_658),
        (replace(SPARSE, smear_gate="input", document_start=1), 35_945_671),
    ],
    ids=["r0", "r1", "r3-r4", "r5-and-180", "162", "65", "f1", "f2", "f3", "f4", "f5", "1787", "f6"],
)
def test_models_have_the_published_number_of_parameters(config, count):
    assert GPT(config).num_parameters() == count


def test_initialization():
    config = replace(R5, vocab_size=64, num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=192)
    config = replace(config, bigram=replace(config.bigram, rows=300, dim=64))
    model = GPT(config, seed=5)
    for bank in (model.c_q, model.c_k, model.c_v, model.mlp_fc.mT, model.bigram_proj.mT * (2 * 4) ** 0.5):
        torch.testing.assert_close(bank @ bank.mT, torch.eye(bank.size(-2)).expand(bank.shape[:-1] + bank.shape[-2:-1]))
    assert not (model.c_q[0] - model.c_q[1]).abs().max() < 0.1
    p = torch.tensor([0.182426, 0.377541, 0.622459, 0.817574])  # sigmoid(3 (i / 3 - 1 / 2))
    torch.testing.assert_close(model.resid_mix, torch.stack((p, 1 - p), 1)[..., None].expand(4, 2, 128))
    assert not model.bigram_table.any() and not model.smear_gate.any() and model.bigram_scale == 0.05
    assert not model.attn_proj.any() and not model.mlp_proj.any()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), GPT(config, seed=5).parameters(), strict=True))

    other = GPT(replace(config, bigram=replace(config.bigram, hash="linear"), smear_gate="before_norm"), seed=5)
    assert not other.bigram_proj.any() and (other.smear_gate == 3).all()
    assert 0.008 < other.bigram_table.std() < 0.012


@variants
def test_models_of_one_seed_share_their_other_weights(config):
    model = GPT(config)
    for name, p in GPT(SMALL).named_parameters():
        assert torch.equal(model.get_parameter(name)[: len(p)], p), name  # a loop has more skips


def test_a_narrow_pair_projection_can_learn():
    """Orthogonal matrices need 64 columns; zeros beside a table of zeros would never have a gradient."""
    model = GPT(replace(PAIRS, matrix_init="orthogonal"))
    assert 0 < model.bigram_proj.abs().max() <= (2 * SMALL.num_layers * PAIRS.bigram.dim) ** -0.5
    ids = tokens(2, 30)
    with torch.no_grad():
        model.mlp_proj.normal_()
    model.loss(ids, ids).backward()
    assert model.bigram_table.grad.any()


def published_embedding(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """x0 of ids (T,), token by token."""
    c, out, last = model.config, [], None
    for t, token in enumerate(ids.tolist()):
        prev = ids[t - 1].item() if t and token != c.document_start else None
        if c.bigram.hash == "xor":
            row = c.bigram.rows - 1 if prev is None else (36313 * token ^ 27191 * prev) % (c.bigram.rows - 1)
            pair = model.bigram_scale * (model.bigram_proj @ model.bigram_table[row])
        else:
            pair = model.bigram_proj @ model.bigram_table[((prev or 0) * 92821 + token) % c.bigram.rows]
        x = model.tok_emb[token] + pair
        x = rms_norm(x) if c.smear_gate == "after_norm" else x
        before = torch.zeros_like(x) if prev is None else last
        g = torch.sigmoid(model.smear_gate)
        mixed = (1 - g) * x + g * before if c.smear_gate == "after_norm" else rms_norm(g * x + (1 - g) * before)
        out.append(mixed)
        last = x
    return torch.stack(out)


@pytest.mark.parametrize("name", ["r5", "pr65", "r5-documents", "pr65-documents"])
def test_embeddings_follow_the_published_formulas(name):
    """Without layers' contributions the hidden states are the normalized x0."""
    model = lively(replace(VARIANTS[name], num_layers=1))
    ids = tokens(24)
    assert (ids == 1).sum() >= 3
    with torch.no_grad():
        model.attn_scale.zero_()
        model.mlp_scale.zero_()
        model.resid_mix.copy_(torch.tensor([1.0, 0.0])[:, None].expand(1, 2, 48))
    torch.testing.assert_close(model(ids[None])[0], rms_norm(published_embedding(model, ids)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["r5", "pr65", "2026-04-27"])
def test_nothing_flows_across_a_document_start_that_is_named(name):
    """But for attention, which ignores documents as upstream's does, and is off here."""
    ids = torch.tensor([[5, 6, 7, 1, 8, 9, 10]])
    changed = torch.tensor([[5, 6, 11, 1, 8, 9, 10]])
    for config in (replace(VARIANTS[name], document_start=start) for start in (None, 1)):
        model = lively(config)
        with torch.no_grad():
            model.attn_scale.zero_()
        a, b, alone = model(ids)[0, 3:], model(changed)[0, 3:], model(ids[:, 3:])[0]
        if config.document_start is None:
            assert (a[0] - b[0]).abs().max() > 1e-3
            torch.testing.assert_close(a[2:], b[2:])
        else:
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a, alone)


def test_initial_loss_is_uniform():
    model = GPT(ModelConfig(num_layers=2))
    ids = torch.randint(0, 1024, (2, 65), generator=torch.Generator().manual_seed(0))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(6.9315, abs=0.05)


DEPTHS = [(name, layers) for name in VARIANTS for layers in ((5,) if name in RECORDS else (1, 2, 5))]


@pytest.mark.parametrize("name, layers", DEPTHS)
def test_a_later_token_changes_no_earlier_hidden_state(name, layers):
    model = lively(replace(VARIANTS[name], num_layers=layers))
    ids = tokens(1, 40, seed=1)
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 97
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :25], b[:, :25])  # to the bit, on which the scorer's checks rely
    assert not torch.allclose(a[:, 25:], b[:, 25:])


@variants
def test_the_last_tokens_alone_are_those_of_the_whole_forward(config):
    model, ids = lively(config), tokens(2, 30, seed=3)
    for count in (1, 7, 29):
        torch.testing.assert_close(model(ids, suffix=count), model(ids)[:, -count:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        model(ids, suffix=7, document_start=1), model(ids, document_start=1)[:, -7:], atol=2e-5, rtol=1e-4
    )


@variants
@pytest.mark.parametrize("longest", [9, 16, 40, 64])
def test_segments_are_attention_within_documents(config, longest):
    """Documents longer than a segment are cut. The padding of the boundaries is that of the published loaders."""
    model, ids = lively(config), tokens(1, 40, seed=4)
    starts = sorted({0, *(ids[0] == 1).nonzero().flatten().tolist()})
    cuts = [i for a, b in pairwise([*starts, 40]) for i in range(a, b, longest)]
    boundaries = torch.tensor(cuts + [40] * (64 - len(cuts)), dtype=torch.int32)
    whole = Segments.of(boundaries, 40, longest)
    hidden = model(ids, segments=whole)
    if longest >= 40:
        torch.testing.assert_close(hidden, model(ids, document_start=1), atol=2e-5, rtol=1e-4)
    if not config.mixes_tokens:  # else a cut lets one token through, as published
        changed = ids.clone()
        changed[0, 12] = 50 if ids[0, 12] != 50 else 51
        number = torch.searchsorted(boundaries, torch.arange(40), right=True)
        elsewhere = number != number[12]
        assert torch.equal(model(changed, segments=whole)[0, elsewhere], hidden[0, elsewhere])


def test_flash_attention_is_called_as_torch_has_it(monkeypatch):
    """On a GPU in bfloat16. Here plain attention takes its place, with the arguments as torch's function binds them."""
    signature, q = inspect.signature(segments.flash_attention()), torch.randn(1, 40, 4, 8).transpose(1, 2)
    k, v = (torch.randn(1, 40, 2, 8).transpose(1, 2) for _ in range(2))
    boundaries = torch.tensor([0, 7, 23, 32, 40, 40], dtype=torch.int32)

    def flash(*args, **options):
        a = signature.bind(*args, **options).arguments
        assert a["window_size"] == (-1, 0) and a["enable_gqa"] and a["max_q"] == a["max_k"] == 16
        assert a["query"].is_contiguous() and a["cu_seq_q"] is a["cu_seq_k"]
        parts = [(int(x), int(y)) for x, y in pairwise(a["cu_seq_q"]) if x < y]
        q, k, v = (a[name].transpose(0, 1) for name in ("query", "key", "value"))
        attend = torch.nn.functional.scaled_dot_product_attention
        out = [attend(*(t[:, x:y] for t in (q, k, v)), is_causal=True, enable_gqa=True) for x, y in parts]
        return torch.cat(out, 1).transpose(0, 1)

    monkeypatch.setattr(segments, "flash_attention", lambda: flash)
    masked = Segments.of(boundaries, 40, 16)
    assert masked.mask is not None
    torch.testing.assert_close(attend_within(q, k, v, masked._replace(mask=None)), attend_within(q, k, v, masked))


def test_segments_cost_no_mask_of_all_pairs():
    """Twice the row, twice the memory: the largest tensor of attention grows with T, not with T²."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
            return out

    def largest(length: int) -> int:
        q, kv = torch.zeros(1, 2, length, 4), torch.zeros(1, 1, length, 4)
        with Largest() as seen:
            starts = torch.arange(0, length + 16, 16, dtype=torch.int32)
            attend_within(q, kv, kv, Segments.of(starts, length, 16))
        return seen.numel

    assert largest(2048) == 2 * largest(1024) < 2048 * 2048 / 16


def test_upstream_names_round_trip():
    model = lively(replace(VARIANTS["r5"], tie_embeddings=False))
    state = {k: v.detach() for k, v in model.state_dict().items()}
    upstream = to_published(state)
    assert upstream["blocks.3.attn.c_q.weight"].shape == (48, 48)
    assert upstream["lm_head.weight"].shape == (97, 48)
    assert upstream["bigram.embed.weight"].shape == (60, 12)
    assert upstream["bigram.scale"].shape == ()
    back = from_published(upstream, model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@variants
def test_cache_gives_the_same_hidden_states(config):
    model = lively(config)
    ids = tokens(2, 30, seed=2)
    cache = KVCache(window=30)
    parts = [model(ids[:, :12], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(12, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"ntk"}))  # whose base depends on the window, not on the text
def test_generation_equals_the_forward_of_the_whole_text(name):
    """Rounded otherwise, but the two largest logits are 0.1 apart at least."""
    model, ids = lively(VARIANTS[name]), tokens(6).tolist()
    for _ in range(20):
        ids.append(model.logits(model(torch.tensor([ids])))[0, -1].argmax().item())
    assert model.generate(torch.tensor(ids[:6]), 20, window=64, temperature=0) == ids[6:]


def test_the_rotary_base_depends_on_the_length_of_the_window():
    model, ids = lively(VARIANTS["ntk"]), tokens(1, 12)
    scaled = lively(replace(SMALL, rope_base=10_000.0 * 1.2 ** (12 / 10)))  # head_dim 12, 12 tokens against 10
    torch.testing.assert_close(model(ids), scaled(ids), atol=1e-5, rtol=1e-4)
    assert torch.equal(model(ids[:, :10]), lively()(ids[:, :10]))
    assert not torch.allclose(model(ids), lively()(ids), atol=1e-3)


INT5 = RowQuant(bits=5, code_range="full")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantized_banks_are_the_decoded_weights_with_straight_through_gradients(dtype):
    model, ids, targets = lively(VARIANTS["r5"]), tokens(2, 32), tokens(2, 32, seed=1)
    specs = {"mlp_fc": INT5, "c_k": RowQuant(bits=6, clip="quantile"), "bigram_proj": RowQuant(bits=6)}
    fake_quant = {name: [(1, spec)] for name, spec in specs.items()}
    loss = model.loss(ids, targets, dtype=dtype, stand_ins=fake_quantized(model, fake_quant))
    hidden = model(ids, dtype=dtype, weights=model.weights(dtype, fake_quantized(model, fake_quant)))
    loss.backward()
    decoded = lively(VARIANTS["r5"])
    with torch.no_grad():
        for name, spec in specs.items():
            decoded.get_parameter(name).copy_(fake_quantize_rows(model.get_parameter(name), spec))
    expected = decoded.loss(ids, targets, dtype=dtype)
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(hidden, decoded(ids, dtype=dtype))
    assert not torch.equal(loss, model.loss(ids, targets, dtype=dtype))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, decoded.get_parameter(name).grad, rtol=0, atol=0, msg=name)


def test_a_fake_quantized_embedding_is_that_of_the_head_too():
    model, ids = lively(), tokens(2, 32)
    loss = model.loss(ids, ids, stand_ins=fake_quantized(model, {"tok_emb": [(1, INT5)]}))
    with torch.no_grad():
        model.tok_emb.copy_(fake_quantize_rows(model.tok_emb, INT5))
    assert torch.equal(loss, model.loss(ids, ids))


def test_a_stand_in_for_a_parameter_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no parameter bigram_proj in this model; expected some of tok_emb, c_q"):
        lively().weights(stand_ins={"bigram_proj": torch.zeros(2, 2)})


def test_fake_quantization_is_live_under_compile_and_switches_without_recompiling():
    model, ids = lively(replace(VARIANTS["r5-documents"], num_layers=2)), tokens(2, 32)
    enabled = torch.tensor(False)
    fake_quant = {name: [(1, INT5)] for name in ("mlp_fc", "mlp_proj", "c_q")}

    def loss():
        stand_ins = {
            name: compute_copies.fake_quantized(model.get_parameter(name), groups, enabled)
            for name, groups in fake_quant.items()
        }
        return model.loss(ids, ids, stand_ins=stand_ins)

    compiled = torch.compile(loss, dynamic=False, fullgraph=True, backend="aot_eager")
    plain = compiled().item()
    assert plain == pytest.approx(model.loss(ids, ids).item(), abs=1e-5)
    enabled.fill_(True)
    with torch.compiler.set_stance("fail_on_recompile"):
        quantized = compiled().item()
        assert quantized == pytest.approx(loss().item(), abs=1e-5)
        assert abs(quantized - plain) > 1e-4
        with torch.no_grad():
            model.mlp_fc.mul_(1.5)
        assert abs(compiled().item() - quantized) > 1e-4


# The plan, and the seam through which matrices multiply


@pytest.mark.parametrize(
    ("layers", "sources"), [(1, [None]), (2, [None, 0]), (5, [None, None, 1, 0, None]), (4, [None, None, 1, 0])]
)
def test_the_plan_is_a_u_net(layers, sources):
    plan = layer_plan(replace(SMALL, num_layers=layers))
    assert [layer.row for layer in plan] == list(range(layers))
    assert [layer.skip_source for layer in plan] == sources
    assert [layer.skip_row for layer in plan if layer.skip_row is not None] == list(range(layers // 2))


def test_a_loop_runs_its_layers_again_with_their_weights():
    """The orders of the records of 2026-04-05 and 2026-04-09 (11 layers), before the loop begins and with it."""
    deep = replace(SMALL, num_layers=11, ln_scale=True)
    for first, last, order in (
        (4, 5, [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10]),
        (3, 5, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]),
    ):
        config = replace(deep, loop=LoopConfig(first=first, last=last, passes=3))
        plan = layer_plan(config)
        assert [each.row for each in plan] == order and config.num_skips == len(order) // 2
        assert [each.input_scale for each in plan] == [(row + 1) ** -0.5 for row in order]
        assert layer_plan(config, looping=False) == layer_plan(deep)
        assert plan[len(order) // 2].skip_source == len(order) // 2 - 1 and plan[-1].skip_source is None


def test_what_the_plan_says_is_what_runs():
    """Of two passes more, each layer is called by the plan's order; looping=False runs each once."""
    model, seen = lively(LOOPED), []
    weights = model.weights()
    for i, layer in enumerate(weights.layers):
        layer["c_q"] = Observed(layer["c_q"], lambda x, i=i: seen.append(i))
    model(tokens(1, 8), weights=weights)
    model(tokens(1, 8), weights=weights, looping=False)
    assert seen == [0, 1, 2, 1, 2, 1, 2, 3, 4, *range(5)]


MATRICES = ("c_q", "c_k", "c_v", "attn_proj", "mlp_fc", "mlp_proj")


def test_every_matrix_of_a_layer_can_be_observed():
    model, ids, seen = lively(), tokens(2, 16), {}
    weights = model.weights()
    for i, layer in enumerate(weights.layers):
        for name in MATRICES:
            see = functools.partial(lambda key, x: seen.setdefault(key, x), (i, name))
            layer[name] = Observed(layer[name], see)
    torch.testing.assert_close(model(ids, weights=weights), model(ids))
    assert seen.keys() == {(i, name) for i in range(SMALL.num_layers) for name in MATRICES}
    for (i, name), x in seen.items():
        assert x.shape == (2, 16, model.get_parameter(name)[i].size(-1)), name
    assert all(torch.equal(seen[i, "c_q"], seen[i, "c_v"]) for i in range(SMALL.num_layers))


@pytest.mark.parametrize("sequences", [None, 2], ids=["shared", "one for each sequence"])
def test_every_matrix_of_a_layer_takes_a_low_rank_correction(sequences):
    """As if it were added to the weights, in training, scoring and generation; its gradient is its own."""
    model, ids = lively(), tokens(2, 16)
    lead, merged = () if sequences is None else (sequences,), lively()
    weights, corrections = model.weights(), []
    generator = torch.Generator().manual_seed(0)
    for i, layer in enumerate(weights.layers):
        for name in MATRICES:
            out, width = layer[name].shape
            a, b = (torch.randn(*lead, *s, generator=generator) * 0.05 for s in ((3, width), (out, 3)))
            corrections += [a.requires_grad_(), b.requires_grad_()]
            scale = {"attn_proj": layer["attn_scale"], "mlp_proj": layer["mlp_scale"]}.get(name, torch.ones(out))
            layer[name] = LoRA(layer[name].detach(), a, scale.detach()[:, None] * b)
            with torch.no_grad():
                merged.get_parameter(name)[i] += (b @ a) if sequences is None else (b[0] @ a[0])
    hidden, expected = model(ids, weights=weights), merged(ids)
    same = slice(None) if sequences is None else slice(1)
    torch.testing.assert_close(hidden[same], expected[same], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids, weights=weights, suffix=5), hidden[:, -5:], atol=1e-5, rtol=1e-4)
    cache = KVCache(window=16)
    parts = [model(ids[:, i : i + 1], weights=weights, cache=cache) for i in range(16)]
    torch.testing.assert_close(torch.cat(parts, 1), hidden, atol=1e-4, rtol=1e-4)
    hidden.square().sum().backward()
    assert all(c.grad.any() for c in corrections) and model.c_q.grad is None


def test_every_parameter_has_its_optimizer_and_rate():
    """Adam's first step moves every element by its learning rate; Muon's has the norm of an orthogonal matrix."""
    model = GPT(VARIANTS["r5"])
    optimizers = Optimizers(model, OptimConfig(tied_embed_lr=0.03, matrix_lr=0.02, scalar_lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(1.0, 0.9)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for name, delta in moved.items():
        if name in ("c_q", "c_k", "c_v", "attn_proj", "mlp_fc", "mlp_proj", "bigram_proj"):
            rows, cols = delta.shape[-2:]
            norms = torch.linalg.matrix_norm(delta) / (0.02 * max(1, rows / cols) ** 0.5)  # of rank one here
            assert ((norms > 0.6) & (norms < 1.3)).all(), name
        else:
            lr = 0.03 if name in ("tok_emb", "bigram_table") else 0.01
            torch.testing.assert_close(delta, torch.full_like(delta, lr), atol=1e-6, rtol=0, msg=name)


def test_generation_goes_on_past_the_window_and_is_repeatable():
    model = lively()
    ids = torch.arange(10)

    def continued(**options):
        return model.generate(ids, 40, window=16, generator=torch.Generator().manual_seed(3), **options)

    assert continued() == continued()
    assert len(continued()) == 40
    greedy = model.generate(ids, 5, window=16, temperature=0)
    assert greedy[0] == model.logits(model(ids[None]))[0, -1].argmax()
    assert model.generate(ids, 5, window=16, temperature=0, stop_id=greedy[2]) == greedy[: greedy.index(greedy[2])]


def test_only_the_most_likely_tokens_are_drawn():
    chances = torch.tensor([0.1, 0.4, 0.2, 0.3])
    drawn = {
        (top_k, top_p): {generate._draw(chances.log(), 1.0, top_k, top_p, None) for _ in range(200)}
        for top_k, top_p in ((0, 1.0), (2, 1.0), (9, 1.0), (0, 0.71), (0, 0.69), (0, 1e-9), (2, 0.6))
    }
    everything, two = {0, 1, 2, 3}, {1, 3}
    assert drawn[0, 1.0] == drawn[9, 1.0] == everything and drawn[2, 1.0] == drawn[0, 0.69] == two
    assert drawn[0, 0.71] == {1, 2, 3} and drawn[0, 1e-9] == {1}
    assert drawn[2, 0.6] == two  # of these two the first has 4/7
    assert {generate._draw(30 * chances, 1e-40, 0, 1.0, None) for _ in range(20)} == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_keeps_its_dtype_under_autocast(dtype):
    """torch 2.12 put rms_norm on autocast's float32 list."""
    x = torch.randn(3, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x).dtype == dtype


def test_bfloat16_activations():
    model = lively()
    ids = torch.randint(0, 97, (1, 32))
    hidden = model(ids, dtype=torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    assert model.loss(ids, ids, dtype=torch.bfloat16).dtype == torch.float32
    torch.testing.assert_close(hidden.float(), model(ids), atol=0.2, rtol=0.1)


def test_the_gradient_of_a_vector_is_not_rounded_to_bfloat16():
    """A sum of 4096 products that are exact in bfloat16; the gradient of x is that of autograd."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (4, 1024, 3), generator=generator).bfloat16().requires_grad_()
    s = torch.tensor([1.0, 0.5, -2.0], requires_grad=True)
    dx, ds = torch.autograd.grad(scaled(x, s).sum(), (x, s))
    assert torch.equal(ds, x.detach().double().sum((0, 1)).float())
    assert not torch.equal(ds, ds.bfloat16().float())
    assert torch.equal(dx, s.detach().bfloat16().expand_as(x))
    double = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in ((2, 5, 3), (3,))]
    assert torch.autograd.gradcheck(scaled, double)
    frozen = scaled(x, s.detach()).sum()
    assert torch.equal(torch.autograd.grad(frozen, x)[0], dx)


@pytest.mark.parametrize("heads, gains", [(3, 3), (3, 2), (2, 0)])
def test_gradients_of_norm_rotate_are_autograd_s(heads, gains):
    """Its own backward, in float64, against numbers; the first heads have a gain."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, heads, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(gains, generator=generator, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in rope_table(3, 5, 6, 100.0, torch.device("cpu")))
    assert torch.autograd.gradcheck(lambda x, gain: norm_rotate(x, cos, sin, gain), (x, gain))
    half, n = 3, F.rms_norm(x, (6,), eps=torch.finfo(torch.float32).eps)
    c, s = cos[:, None], sin[:, None]
    turned = torch.cat((n[..., :half] * c + n[..., half:] * s, n[..., half:] * c - n[..., :half] * s), dim=-1)
    scale = torch.cat((gain, gain.new_ones(heads - gains)))[:, None]
    torch.testing.assert_close(norm_rotate(x, cos, sin, gain), turned * scale)
