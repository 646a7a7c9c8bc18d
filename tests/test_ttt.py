"""Test-time training: agreement with the published scripts, plans, the ledger, evaluation."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import SMALL, in_banks, lively
from test_conformance import Vectors, build, frontier_config

from golfgpt import distributed
from golfgpt.cli import main
from golfgpt.config import EvalConfig, LoRAConfig, RunConfig, SGDConfig, TTTConfig, from_dict, to_dict
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, InputError, Interrupted, NonFiniteError, PeerError
from golfgpt.model.gpt import GPT
from golfgpt.published.names import split_banks, to_published
from golfgpt.score import windows as scoring
from golfgpt.score.evaluate import evaluate, fitting_dataset
from golfgpt.score.ttt import evaluate as adapted_module
from golfgpt.score.ttt import plan
from golfgpt.score.ttt.adapter import Step, run
from golfgpt.score.ttt.evaluate import check_adapted, evaluate_adapted, learned_shapes
from golfgpt.score.ttt.ledger import Ledger
from golfgpt.score.ttt.lora import DocumentLoRA, PhasedLoRA
from golfgpt.score.ttt.sgd import SGD
from golfgpt.score.windows import Scorer, Windows
from golfgpt.train.signals import Signals
from golfgpt.train.train import train

CPU = Ranks(0, 1, torch.device("cpu"))
FOLDERS = [Path(folder) for folder in os.environ.get("GOLFGPT_CONFORMANCE", "").split(os.pathsep) if folder]
FILES = sorted(p for folder in FOLDERS for p in folder.glob("q_ttt_*.safetensors"))
MISC = sorted(p for folder in FOLDERS for p in folder.glob("q_misc*.json"))


# 1 Agreement with the published scripts


def published_windows(ended: bool):
    """The published lists, as `RULES` has them: a window every `stride` targets while one is left (F23), or while one
    is left that no window scored (F06)."""

    def rule(targets: int, window: int, stride: int):
        start = np.arange(0, targets if ended else targets - window + stride, stride, dtype=np.int64)
        length = np.minimum(targets - start, window)
        return start, length, np.where(start == 0, 0, np.maximum(length - stride, 0) if ended else window - stride)

    return rule


class Recount(Ledger):
    """F23 scores the tail's targets again, which the ledger refuses."""

    def score(self, targets: np.ndarray) -> None:
        self.scored[targets] = self._tick()


def table_bytes(v: Vectors) -> np.ndarray:
    prev, ids = v["tokens"].numpy()[:-1], v["tokens"].numpy()[1:]
    spaced = v["has_leading_space"].numpy()[ids].astype(bool) & ~v["is_boundary"].numpy()[prev].astype(bool)
    return v["base_bytes"].numpy()[ids] + spaced


def scores(v: Vectors, nbytes: np.ndarray, steps, model, adapter, ledger) -> tuple[torch.Tensor, float, float]:
    """Nats per target, the last ones where counted again; mean nats and bits per byte."""
    text = torch.stack((v["tokens"].long(), torch.from_numpy(np.append(0, nbytes)).long()))
    nll, total, count, counted = torch.full((len(nbytes),), torch.nan), 0.0, 0, 0
    scorer = Scorer(model, torch.float32)
    for batch, logprobs in run(steps, scorer, adapter, ledger, lambda a, b: text[:, a:b], CPU):
        nll[batch.positions[batch.scored] - 1] = -logprobs[batch.scored]
        total -= float(logprobs.double().sum())
        count, counted = count + int(batch.scored.sum()), counted + int(batch.nbytes[batch.scored].sum())
    ledger.check(all_scored=True)
    return nll, total / count, total / np.log(2) / counted


def check_final(model, params, expected: dict, tolerance: float) -> None:
    first, last = to_published(model.state_dict()), to_published({k: p.detach() for k, p in params.items()})
    for name, reference in expected.items():
        moved = (reference - first[name]).norm()
        assert (last[name] - reference).norm() <= tolerance * moved + 1e-7, name


def check_sgd(v: Vectors, monkeypatch) -> None:
    c = v.meta["config"]
    m = c["model"]
    config = replace(
        SMALL, vocab_size=m["vocab"], num_layers=m["layers"], model_dim=m["dim"], num_heads=m["heads"],
        num_kv_heads=m["kv"], mlp_hidden=m["dim"] * m["mlp_mult"],
    )  # fmt: skip
    settings = SGDConfig(lr=c["lr"], epochs=c["epochs"], chunk_tokens=c["chunk"], batch_sequences=c["batch_seqs"])
    assert c["freeze"] == 0
    for tag, result in v.meta["result_val_loss_bpb"].items():
        monkeypatch.setitem(scoring.RULES, tag, published_windows(ended=tag == "f23"))
        model = build(config, v.part("param."))
        targets = c["n_tokens"] - 1
        windows = Windows(targets, c["seq_len"], c["stride"], tag)
        adapter = SGD(model, settings, length=c["seq_len"], dtype=torch.float32, ranks=CPU)
        steps = plan.sliding(windows, c["chunk"], c["seq_len"], c["score_batch"], CPU)
        ledger = Recount(targets) if tag == "f23" else Ledger(targets)
        nll, *means = scores(v, table_bytes(v), steps, model, adapter, ledger)
        assert (nll - v[f"{tag}.nll"]).abs().max() <= 1e-4
        assert np.abs(np.subtract(means, result)).max() <= 1e-5
        check_final(model, adapter.params, v.part(f"{tag}.final."), 1e-3)


def check_documents(v: Vectors, monkeypatch) -> None:
    given = v.meta["config"]
    m, c = given["model"], given["ttt"]
    assert c["ttt_grad_steps"] == 1 and c["ttt_beta1"] == 0 and c["global_ttt_warmup_chunks"] == 0
    v.meta |= {"config": F27 | m, "record": "2026-04-27", "bos_id": 1, "rope_reference_len": None}
    config, dtype = frontier_config(v), torch.float32
    model = build(config, v.part("param."))
    named = {"q": "q", "k": "k", "v": "v", "o": "o", "mlp": "mlp", "head": "lm_head"}
    targets = tuple(t for t in named if t not in ("k", "o", "mlp") or c[f"ttt_{t}_lora"])
    lora = LoRAConfig(
        rank=c["ttt_lora_rank"], alpha=given["lora_alpha"], targets=targets, lr=c["ttt_lora_lr"],
        beta2=c["ttt_beta2"], weight_decay=c["ttt_weight_decay"], chunk_tokens=c["ttt_chunk_size"],
        documents=c["ttt_batch_size"], warm=given["warm_start_a"],
    )  # fmt: skip
    sgd = SGD(
        model,
        SGDConfig(
            lr=c["global_ttt_lr"], epochs=c["global_ttt_epochs"], chunk_tokens=c["global_ttt_chunk_tokens"],
            batch_sequences=c["global_ttt_batch_seqs"], momentum=c["global_ttt_momentum"],
            grad_clip_norm=c["global_ttt_grad_clip"],
        ),
        length=m["eval_seq_len"], dtype=dtype, ranks=CPU,
        document_start=1 if c["global_ttt_respect_doc_boundaries"] else None,
    )  # fmt: skip
    builds = iter(range(v.meta["num_lora_builds"]))

    def first(rows: int) -> dict[str, torch.Tensor]:
        vectors = v.part(f"lora.{next(builds)}.")
        layers = len(config.layer_order())
        stems = {
            t: [f"{n}_loras.{i}.A" for i in range(layers)] if t != "head" else [f"{n}_lora.A"] for t, n in named.items()
        }
        out = {target: torch.stack([vectors[name] for name in stems[target]]) for target in targets}
        assert all(len(a[0]) == rows for a in out.values())
        return out

    adapter = PhasedLoRA(DocumentLoRA(config, lora, sgd.weights, device=CPU.device, first=first), sgd)
    learned, learn_text, states = [], sgd.learn_text, []

    def recorded(text: torch.Tensor) -> None:
        learned.append(text)
        learn_text(text)
        states.append(to_published({k: p.detach().clone() for k, p in sgd.params.items()}))

    sgd.learn_text = recorded
    tokens = v["tokens"].numpy()
    batches = plan.document_batches(plan.find_documents(tokens, 1), lora)
    phases = plan.phase_texts(batches, c["phased_ttt_num_phases"], c["phased_ttt_prefix_docs"], lora.order)
    steps = plan.documents(batches, lora.chunk_tokens, c["ttt_eval_seq_len"], CPU, phases)
    ledger = Ledger(len(tokens) - 1)
    nll, *means = scores(v, v["token_bytes"][1:].numpy(), steps, model, adapter, ledger)
    assert (nll - v["nll"]).abs().max() <= 1e-3
    assert np.abs(np.subtract(means, (v.meta["val_loss"], v.meta["val_bpb"]))).max() <= 1e-5
    assert next(builds, None) is None and len(learned) == len(v.meta["global_phases"])
    groups = [torch.unique(torch.from_numpy(ledger.scored)[v["score_order"] == i]) for i in v["score_order"].unique()]
    assert all(len(group) == 1 for group in groups) and torch.equal(torch.cat(groups).sort().values, torch.cat(groups))
    for i, text in enumerate(learned):
        assert torch.equal(text, v[f"global.{i}.tokens"].long())
        after = in_banks(states[i])
        for name, reference in v.part(f"global.{i}.after.").items():
            moved = (reference - v[f"param.{name}"]).norm()
            assert (after[name] - reference).norm() <= 1e-2 * moved + 1e-7, name
    check_final(model, sgd.params, split_banks(v.part("final.")), 1e-2)


F27 = {
    "tie_embeddings": True, "rope_base": 10000.0, "ln_scale": True, "smear_gate_enabled": True,
    "sparse_attn_gate_enabled": True, "sparse_attn_gate_scale": 0.5, "skip_gates_enabled": True,
}  # fmt: skip
"""What the script of 2026-04-27 sets and the vectors' metadata do not repeat."""


@pytest.mark.numeric
@pytest.mark.skipif(not FILES, reason="GOLFGPT_CONFORMANCE names no folder of vectors")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_published_scores_and_weights(path, monkeypatch):
    kind = path.stem.split("_")[2]
    CHECKS[kind](Vectors(path), monkeypatch)


CHECKS = {"sgd": check_sgd, "lora": check_documents, "phased": check_documents}


@pytest.mark.parametrize("path", MISC, ids=lambda p: p.name)
def test_published_documents_and_windows(path):
    cases = json.loads(path.read_text())
    for case in cases["find_docs"]:
        found = [list(document) for document in plan.find_documents(np.array(case["tokens"]), 1)]
        assert found == [document for document in case["docs"] if document[1] > 1]
    for case in cases["chunk_windows"]:
        size, window = case["chunk_size"], case["eval_seq_len"]
        for i, (start, length, offset, count) in enumerate(case["windows"]):
            begin, end = plan.chunk_windows(i, np.array([case["pred_len"]]), size, window)
            assert (begin[0], end[0] - begin[0], i * size - begin[0], end[0] - i * size) == (
                start,
                length,
                offset,
                count,
            )


# 2 Evaluation

SGD_SETTINGS = SGDConfig(lr=0.05, chunk_tokens=128, epochs=1)
LORA = LoRAConfig(rank=4, chunk_tokens=16, documents=3, lr=0.01)
KINDS = {
    "sgd": TTTConfig(kind="sgd", sgd=SGD_SETTINGS),
    "lora": TTTConfig(kind="lora", lora=LORA),
    "phased": TTTConfig(kind="phased", sgd=SGD_SETTINGS, lora=LORA, phases=2, phase_documents=6),
    "warm": TTTConfig(kind="lora", lora=replace(LORA, warm=True, alpha=6.0, order="stream")),
}


def short_documents(tiny: RunConfig, monkeypatch) -> RunConfig:
    """A text of 13 documents."""
    ids = Dataset.val_ids

    def val_ids(self, start: int, stop: int) -> np.ndarray:
        out = ids(self, start, stop)
        return np.where(np.arange(start, start + len(out)) % 53 == 0, 1, out).astype(out.dtype)

    monkeypatch.setattr(Dataset, "val_ids", val_ids)
    monkeypatch.setattr(Dataset, "byte_counts", lambda self, a, b: np.full(b - a, 2, dtype=np.uint16))
    monkeypatch.setattr(Dataset, "prove_val_bytes", lambda self, stop=None: 2 * stop)
    return tiny


def adapted(
    tiny: RunConfig, ttt: TTTConfig, model: GPT | None = None, *, ranks=CPU, aware=False, compile="auto", **options
):
    plan = EvalConfig(window=64, stride=16, max_tokens=650, document_aware=aware, compile=compile, ttt=ttt)
    config = replace(tiny, eval=plan)
    model, data = model or lively(config.model), Dataset.open(config.data.path)
    return evaluate_adapted(model, data, config, ranks, dtype=torch.float32, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_score_says_what_it_is(tiny, monkeypatch, kind):
    config, ttt, model = short_documents(tiny, monkeypatch), KINDS[kind], lively(tiny.model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    got, again = (adapted(config, ttt, model) for _ in range(2))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert (got.tokens, got.bytes, got.partial, got.stopped, got.diverged) == (650, 1300, True, None, False)
    assert (got.nats, got.ledger_sha256) == (again.nats, again.ledger_sha256)
    found = got.compliance
    assert found.later_token_change == 0 and found.comparisons > 60 and found.probability_sum_error < 1e-5
    assert found.scored_once == 650 and 300 < found.learned_after_scored < 650
    independent = {"sgd": "no", "lora": "yes", "phased": "by phase", "warm": "no"}[kind]
    assert (found.documents_independent, found.other_document_change) == (independent, 0.0 if kind == "lora" else None)
    assert found.order == ("stream" if kind in ("sgd", "warm") else "length")
    assert f"(adapted: {ttt.kind})" in got.label and ("not a code length" in got.label) == (kind == "phased")
    assert found.code_length.startswith("not") == (kind == "phased") and "(first 650 tokens)" in got.label
    plain = evaluate(model, Dataset.open(config.data.path), replace(config, eval=EvalConfig(window=64, max_tokens=650)),
                     CPU, dtype=torch.float32)  # fmt: skip
    assert got.nats < plain.nats, "a model with random weights learns something"
    assert asdict(got)["compliance"]["code_length"] == found.code_length


def test_cold_documents_have_the_same_score_in_any_order_and_batch(tiny, monkeypatch):
    config = short_documents(tiny, monkeypatch)
    settings = [replace(LORA, order=order, documents=rows) for order in ("length", "stream") for rows in (2, 5)]
    scores = [adapted(config, TTTConfig(kind="lora", lora=lora)).nats for lora in settings]
    assert np.ptp(scores) < 1e-5 * scores[0]


def test_sliding_chunks_within_documents(tiny, monkeypatch):
    """Scored with a mask, learned in packed rows."""
    config = short_documents(tiny, monkeypatch)
    flat, within = (adapted(config, KINDS["sgd"], aware=aware) for aware in (False, True))
    assert "(document-aware)" in within.label and "(document-aware)" not in flat.label
    assert within.nats != flat.nats and within.compliance.documents_independent == "no"


def test_the_clock_stops_an_adapted_score(tiny, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(adapted_module.time, "perf_counter", lambda: float(next(seconds)))
    for kind in ("sgd", "lora"):
        got = adapted(tiny, replace(KINDS[kind], max_seconds=9.0))
        assert got.stopped == "eval.ttt.max_seconds 9 are over" and 0 < got.tokens < 650 and got.partial
        assert f"(stopped: {got.tokens:,} of 650 tokens)" in got.label
    with pytest.raises(BudgetError, match=r"nothing was scored .*max_seconds 0.5 are over; raise --eval.ttt.max-sec"):
        adapted(tiny, replace(KINDS["sgd"], max_seconds=0.5))


def wild(kind: str) -> TTTConfig:
    ttt = KINDS[kind]
    return replace(ttt, sgd=replace(ttt.sgd, lr=1e38), lora=replace(ttt.lora, lr=1e38))


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_a_rate_that_diverges_keeps_the_scores_up_to_there(tiny, kind):
    got = adapted(tiny, wild(kind))
    assert got.diverged and 0 < got.tokens < 650 and np.isfinite(got.val_bpb)
    assert "no probability" in got.stopped or "not finite" in got.stopped
    with pytest.raises(NonFiniteError, match=f"diverged after {got.tokens:,} tokens, whose score is kept"):
        check_adapted(got)


def stops(*args, **options):
    for i, item in enumerate(run(*args, **options)):
        yield item
        if i == 4:
            raise Interrupted("stopped by SIGTERM", 15)


def test_an_interruption_says_what_was_scored(tiny, monkeypatch):
    monkeypatch.setattr(adapted_module, "run", stops)
    lines = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        adapted(tiny, KINDS["lora"], say=lines.append)
    assert len(lines) == 1 and re.match(r"interrupted: \d+ of 650 tokens scored with lora \(\d\.\d+ bits", lines[0])


@pytest.mark.parametrize(
    ("ttt", "message"),
    [
        ({"kind": "lora", "lora": {"rank": 49}}, r"eval\.ttt\.lora\.rank is 49; expected at most model\.model_dim, 48"),
        ({"kind": "phased", "lora": {"rank": 4, "chunk_tokens": 65}}, r"chunk_tokens 65 exceeds the window 64"),
        ({"kind": "sgd", "sgd": {"chunk_tokens": 63}}, r"chunk_tokens 63 holds no sequence of the window 64"),
        ({"lora": {"targets": ("q", "q")}}, r"eval\.ttt\.lora\.targets is \('q', 'q'\); expected some of q, k, v"),
        ({"lora": {"lr": 0.0}}, r"eval\.ttt\.lora\.lr is 0"),
    ],
)
def test_settings_that_do_not_fit(tiny, ttt, message):
    parts = {"sgd": SGDConfig, "lora": LoRAConfig}
    with pytest.raises(ValueError, match=message):
        settings = {name: parts[name](**value) if name in parts else value for name, value in ttt.items()}
        replace(tiny, eval=replace(tiny.eval, ttt=TTTConfig(**settings)))
    with pytest.raises(ValueError, match=r'eval\.rule is r4b, .* expected "every_token" with eval\.ttt\.kind sgd'):
        EvalConfig(rule="r4b", ttt=TTTConfig(kind="sgd"))


def test_a_run_and_its_scoring_report_both_scores(tiny, tmp_path, capsys):
    ttt = replace(KINDS["sgd"], sgd=replace(SGD_SETTINGS, chunk_tokens=1024))
    config = replace(tiny, eval=replace(tiny.eval, max_tokens=3000, ttt=ttt))
    result = train(config, tmp_path / "run", quiet=True)
    assert result["adapted"]["label"] == "val_bpb (adapted: sgd) (first 3,000 tokens)"
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        stored["adapted"] == json.loads(json.dumps(result["adapted"]))
        and "without it" in (tmp_path / "run" / "train.log").read_text()
    )
    options = ["--eval.ttt.kind", "lora", "--eval.ttt.lora.rank", "4", "--eval.ttt.lora.chunk-tokens", "32"]
    assert main(["eval", str(tmp_path / "run"), *options, "--eval.max-tokens", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "val_bpb (adapted: lora) (document-aware) (first 1,000 tokens)" in shown and "a gain of" in shown
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["adapted"]["kind"] == "lora" and stored["score"] == json.loads(json.dumps(result["score"]))
    wild = ["--eval.ttt.kind", "sgd", "--eval.ttt.sgd.lr", "1e38", "--json"]
    assert main(["eval", str(tmp_path / "run"), *wild]) == 5
    captured = capsys.readouterr()
    assert json.loads(captured.out)["adapted"]["diverged"] and "whose score is kept" in captured.err


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sgd", "lora", "phased"])
def test_compiled_adapted_scores_are_those_of_eager(tiny, monkeypatch, kind):
    """One form for all lengths of a chunk, so few are compiled."""
    config = short_documents(replace(tiny, model=replace(tiny.model, num_layers=1)), monkeypatch)
    eager = adapted(config, KINDS[kind])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = adapted(config, KINDS[kind], compile="on")
    assert compiled.nats == pytest.approx(eager.nats, rel=1e-4)
    assert compiled.ledger_sha256 == eager.ledger_sha256
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 16


# 3 Ranks


score_of_ledger = Ledger.score


def kills_once(signals: Signals) -> Callable:
    """`Ledger.score` that gets SIGTERM in the evaluation's second batch, the check's being before it defers signals."""

    def score(self, targets):
        score.calls += signals.deferred
        if score.calls == 2:
            score.calls += 1
            os.kill(os.getpid(), signal.SIGTERM)
        score_of_ledger(self, targets)

    score.calls = 0
    return score


def diverges(self, scored):
    raise NonFiniteError("not finite")


def worker(config: RunConfig, folder: str) -> None:
    ranks = distributed.start("cpu")
    with pytest.MonkeyPatch.context() as patch:
        short_documents(config, patch)
        out = [asdict(adapted(config, KINDS[kind], ranks=ranks)) for kind in ("sgd", "lora", "phased", "warm")]
        out += [asdict(adapted(config, wild(kind), ranks=ranks)) for kind in ("sgd", "lora")]
        if ranks.rank == 1:
            patch.setattr(adapted_module, "run", stops)
        for kind in ("sgd", "phased"):
            with pytest.raises((Interrupted, PeerError)) as caught:
                adapted(config, KINDS[kind], ranks=ranks)
            out.append(caught.typename)
        patch.setattr(adapted_module, "run", run)
        with pytest.MonkeyPatch.context() as alone:
            if ranks.rank == 1:
                alone.setattr(DocumentLoRA, "adapt", diverges)
            got = adapted(config, KINDS["lora"], ranks=ranks)
            out.append([got.stopped, got.diverged])
        for kind in ("sgd", "lora"):
            with Signals(Path(folder)) as signals, pytest.raises((Interrupted, PeerError)) as caught:
                patch.setattr(Ledger, "score", kills_once(signals) if ranks.rank == 1 else Ledger.score)
                adapted(config, KINDS[kind], ranks=ranks, deferred=signals.deferring("it ends"))
            patch.setattr(Ledger, "score", score_of_ledger)
            out.append(caught.typename)
    Path(folder, f"out{ranks.rank}").write_text(json.dumps(out))
    ranks.close()


@pytest.mark.parametrize("document_start", [None, 1])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_divide_a_step_of_sgd_and_not_a_document(world, document_start):
    """The parts of the gradient, which a learning rate of 1 shows, sum to that of one rank. A document of 40 tokens
    crosses edges and is cut in the middle of it, as documents longer than a sequence are; SmearGate looks back."""
    config = replace(SMALL, smear_gate="before_norm", document_start=1, rope_reference_len=16)
    model, text = lively(config), torch.randint(2, 97, (6 * 16 + 1,), generator=torch.Generator().manual_seed(0))
    text[[0, 9, 20, 60, 75, 76, 90]] = 1
    settings = SGDConfig(lr=1.0, epochs=1, momentum=0.0, grad_clip_norm=1e9, chunk_tokens=1000)

    def moved(rank: int, world: int, most: int | None = None) -> dict[str, torch.Tensor]:
        ranks = SimpleNamespace(rank=rank, world=world, device=CPU.device, sum_=lambda x: x)
        options = {"document_start": document_start, "most": most}
        sgd = SGD(model, settings, length=16, dtype=torch.float32, ranks=ranks, **options)
        sgd.learn(text, 0, 2)
        return {name: p.detach() - dict(model.named_parameters())[name].detach() for name, p in sgd.params.items()}

    alone = moved(0, 1)
    for most in (None, 1, 2):
        parts = [moved(rank, world, most) for rank in range(world)]
        for name, whole in alone.items():
            torch.testing.assert_close(sum(part[name] for part in parts), whole, rtol=1e-4, atol=1e-5)


def test_forwards_of_sgd_have_most_sequences(monkeypatch):
    model, text, seen = lively(SMALL), torch.randint(2, 97, (6 * 16 + 1,)), []
    loss = GPT.loss
    monkeypatch.setattr(
        GPT, "loss", lambda self, ids, *args, **kw: seen.append(len(ids)) or loss(self, ids, *args, **kw)
    )
    settings = SGDConfig(lr=1.0, epochs=1, batch_sequences=5)
    SGD(model, settings, length=16, dtype=torch.float32, ranks=CPU, most=2).learn(text, 0, 2)
    assert seen == [1, 2, 2, 1]


def test_attention_is_probed_where_adapters_learn(tiny):
    def shapes(kind: str, **plan) -> list[tuple[int, ...]]:
        ttt = TTTConfig(kind=kind, lora=LoRAConfig(rank=4, documents=4, chunk_tokens=16))
        return learned_shapes(replace(tiny, eval=EvalConfig(window=64, batch_tokens=256, ttt=ttt, **plan)), CPU)

    assert shapes("off") == []
    assert shapes("sgd") == [(4, 64)] and shapes("sgd", document_aware=True) == [(1, 256, 64)]
    assert shapes("lora") == [(4, 16), (4, 63), (4, 64)]
    assert shapes("phased") == [*shapes("lora"), (1, 256, 64)]


def test_a_text_with_too_few_documents_for_a_phase_is_refused(tiny, monkeypatch):
    few = replace(KINDS["phased"], phase_documents=60)
    with pytest.raises(InputError, match=r"the text has 13 documents and the first phase comes after 30 or more"):
        adapted(short_documents(tiny, monkeypatch), few)
    with pytest.raises(InputError, match="the text has 13 documents"):  # before anything is trained or scored
        fitting_dataset(replace(tiny, eval=EvalConfig(window=64, max_tokens=650, ttt=few)))


def test_a_rank_whose_time_is_over_leaves_its_steps_out_until_all_meet(tiny):
    scored, ledger = [], Ledger(3)

    class Still:
        def reset(self, rows):
            raise AssertionError("nothing begins")

    steps = [Step(meets=True), Step(lambda read: scored.append(1) or iter(()), rows=2), Step(meets=True)]
    votes = iter((False, True))
    ranks = SimpleNamespace(world=2)
    list(run(steps, None, Still(), ledger, None, ranks, late=lambda: next(votes), expired=lambda: True))
    assert not scored and next(votes, None) is None, "both votes were taken"


NEAR = (1e-5, 1e-12, 1e-5, 5e-2)
"""Gradients are summed in another order; AdamW makes steps of full size from those near 0; with warm A each rank has a
chain of its own."""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_processes_agree_with_one(tiny, monkeypatch, tmp_path, world):
    config = short_documents(tiny, monkeypatch)
    alone = [asdict(adapted(config, KINDS[kind])) for kind in ("sgd", "lora", "phased", "warm")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__]
    done = subprocess.run(
        [*command, json.dumps(to_dict(tiny)), str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in range(world)]
    for rank, (*_, sgd, lora, a, b, halted, c, d) in enumerate(results):
        assert halted == ["the weights of another rank diverged" if rank != 1 else "not finite", True]
        assert a == b == c == d == ("Interrupted" if rank == 1 else "PeerError")
        for got in (sgd, lora):
            assert got["diverged"] and 0 < got["tokens"] < 650
    for i in (4, 5):
        assert len({result[i]["ledger_sha256"] for result in results}) == 1
    for i, expected in enumerate(alone):
        found = [result[i] for result in results]
        assert len({(one["nats"], one["ledger_sha256"]) for one in found}) == 1
        for key in ("tokens", "bytes", "label", "compliance"):
            assert found[0][key] == json.loads(json.dumps(expected[key])), key
        assert found[0]["nats"] == pytest.approx(expected["nats"], rel=NEAR[i]), expected["kind"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(from_dict(RunConfig, json.loads(sys.argv[1])), sys.argv[2])
