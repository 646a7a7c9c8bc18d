"""experiments/penalty.py, vocabularies.py and adaptation.py: what their runs share, equal bytes, tables. Nothing is
trained."""

from __future__ import annotations

from dataclasses import replace
from math import log2

import pytest

from experiments import adaptation, penalty, vocabularies
from experiments.penalty import BITS, FORK, STEPS, as_large, run_config
from golfgpt.config import differences
from golfgpt.data.shards import Dataset
from golfgpt.errors import InputError
from golfgpt.optim.schedule import quantization_aware
from golfgpt.quant.budget import forecast_bytes
from golfgpt.quant.quantizer import Quantizer


def test_runs_of_a_seed_differ_only_in_fake_quantization_which_begins_where_they_part():
    plain = run_config(2, None)
    for bits in BITS:
        config = run_config(2, bits)
        changed = {line.split(":")[0] for line in differences(plain, config)}
        assert changed - {"quant.bits"} == {"quant.qat", "quant.qat_start"}
        on = [quantization_aware(step / STEPS, 1.0, config.quant) for step in (FORK - 1, FORK)]
        assert on == [False, True]


def test_as_large_ends_within_a_five_hundredth():
    """A file that loses a bit of each of its codes when deviations double, and has a part that does not."""
    found = as_large(500_000, lambda k: round(1_000_000 * (7 - log2(k)) / 8 + 20_000), 1_000_000)
    assert abs((1_000_000 * (7 - log2(found)) / 8 + 20_000) / 500_000 - 1) < 0.002


def test_penalties_are_compared_with_the_better_rounding():
    row = dict(bits=4, matrices="all", before=2.0, bytes=1000, seconds=1.0)
    lines = [
        row | dict(seed=seed, method=method, bpb=2.0 + penalty)
        for method, penalties in (("rtn", (0.08, 0.12)), ("rtn, deviation", (0.2, 0.2)), ("gptq", (0.04, 0.06)))
        for seed, penalty in enumerate(penalties)
    ]
    cells = {line.split(" | ")[2]: line.strip("| ").split(" | ") for line in penalty.table(lines).splitlines()[2:]}
    assert cells["gptq"][3:] == ["2", "0.0500", "0.50", "0.0400 to 0.0600", "2.0500", "1,000"]
    assert cells["rtn, deviation"][5] == "2.00"


def test_every_vocabulary_gets_the_bytes_that_its_embedding_leaves(corpus):
    dataset = Dataset.open(corpus)
    config = vocabularies.run_config(dataset, 1)
    assert config.model.vocab_size == dataset.vocab_size and config.model.mlp_hidden % 16 == 0
    size, wider = (
        forecast_bytes(Quantizer(replace(config.model, mlp_hidden=config.model.mlp_hidden + more), config.quant))
        for more in (0, 16)
    )
    assert size <= vocabularies.ARTIFACT_BYTES < wider
    text = config.eval.max_tokens * dataset.manifest.val.decoded_bytes / dataset.val_tokens
    assert text == pytest.approx(vocabularies.SCORED_BYTES, rel=1e-3)


def test_vocabularies_are_compared_by_seed():
    row = dict(mlp_hidden=64, before=1.9, bytes=1000)
    lines = [
        row | dict(data=d, seed=s, bpb=b) for d, s, b in (("a", 1, 2.0), ("b", 1, 1.9), ("a", 2, 2.2), ("b", 3, 1))
    ]
    last = vocabularies.table(lines).splitlines()[-1]
    assert "+0.1000" in last and last.startswith("| b | 2 |")


def adapted(**cells) -> dict:
    row = dict(seed=1, name="lora", tune=True, sgd_lr=None, lora_lr=None, tokens=adaptation.TUNE_TOKENS)
    return row | dict(diverged=False, bpb=2.0, cpu_seconds=8.0) | cells


def test_learning_rates_of_diverged_scores_are_not_chosen(tmp_path):
    """Nor is a line of other text taken for a score."""
    lines = [adapted(name="sgd", sgd_lr=lr, bpb=2.0 + lr) for lr in adaptation.SGD_LR]
    lines += [adapted(lora_lr=lr, bpb=2.0 - lr) for lr in adaptation.LORA_LR]
    lines[-1] |= dict(diverged=True, tokens=64)
    best = adaptation.LORA_LR[-2]
    lines += [adapted(name="phased", sgd_lr=lr, lora_lr=best, bpb=2.0 - lr) for lr in adaptation.SGD_LR[:2]]
    scores = adaptation.Scores(tmp_path, tmp_path)
    scores.lines = lines
    found = adaptation.chosen(scores, 1, tmp_path)
    assert found["sgd"].eval.ttt.sgd.lr == adaptation.SGD_LR[0]
    assert found["lora"].eval.ttt.lora.lr == best == found["phased"].eval.ttt.lora.lr
    assert found["phased"].eval.ttt.sgd.lr == adaptation.SGD_LR[1]
    lines[0] |= dict(tokens=adaptation.TOKENS)
    with pytest.raises(InputError, match="holds no"):  # it would be scored
        adaptation.chosen(scores, 1, tmp_path)


def test_gains_of_adaptation_are_paired_and_have_an_interval():
    scores = {"plain": (2.0, 2.1, 2.2), "sliding in documents": (1.9, 2.0, 2.1), "lora": (1.85, 1.96, 2.07)}
    lines = [
        adapted(name=name, seed=seed, bpb=bpb, tune=False, cpu_seconds=4.0 if name == "plain" else 8.0)
        for name, values in scores.items()
        for seed, bpb in enumerate(values)
    ]
    last = adaptation.table(lines).splitlines()[-1]
    assert last == "| lora | 3 | 1.9600 | +0.1400 ± 0.0248 | +0.0400 ± 0.0248 | 8 | 2.0 |"
