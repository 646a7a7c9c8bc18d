"""Test-time training: agreement with the published scripts, plans, the ledger, evaluation."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SMALL, in_banks
from test_conformance import Vectors, build, frontier_config

from golfgpt.config import LoRAConfig, SGDConfig
from golfgpt.distributed import Ranks
from golfgpt.published.names import split_banks, to_published
from golfgpt.score import windows as scoring
from golfgpt.score.ttt import plan
from golfgpt.score.ttt.adapter import run
from golfgpt.score.ttt.ledger import Ledger
from golfgpt.score.ttt.lora import DocumentLoRA, PhasedLoRA
from golfgpt.score.ttt.sgd import SGD
from golfgpt.score.windows import Scorer, Windows

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
