"""An interrupted evaluation continues from its sums; sums and progress as time goes by."""

from __future__ import annotations

import json
import os
import signal

import pytest
from test_evaluate import score

from golfgpt.errors import Interrupted
from golfgpt.score import evaluate as evaluation
from golfgpt.score.sums import PartialSums
from golfgpt.score.windows import score_windows
from golfgpt.train.signals import Signals

PLAN = {"stride": 16, "max_tokens": 2000, "batch_tokens": 640}


def kill(kind: int):
    return lambda: os.kill(os.getpid(), kind)


def fail(error: type[BaseException]):
    def stop():
        raise error

    return stop


@pytest.fixture
def interrupted(monkeypatch):
    """arm(batches, how): once, after some batches, do `how`. Looks at the clock after every batch."""
    monkeypatch.setattr(evaluation, "PROGRESS_SECONDS", 0.0)
    armed = []

    def some(*args):
        for i, item in enumerate(score_windows(*args)):
            yield item
            if armed and armed[0][0] == i + 1:
                armed.pop()[1]()

    monkeypatch.setattr(evaluation, "score_windows", some)
    return lambda batches, how: armed.append((batches, how))


@pytest.mark.parametrize(
    ("how", "batch_tokens"),
    [
        (kill(signal.SIGTERM), 640),
        (kill(signal.SIGINT), 640),
        (fail(KeyboardInterrupt), 640),
        (fail(MemoryError), 64),  # which a smaller batch gets around
    ],
)
def test_an_interrupted_evaluation_continues(tiny, tmp_path, interrupted, monkeypatch, how, batch_tokens):
    """Also after a second interruption, during the checks."""
    file, said = tmp_path / "eval_partial_0.json", []

    def run(**plan):
        with Signals(tmp_path):
            return score(tiny, keep=PartialSums(tmp_path, 0, "model", said.append), **(PLAN | plan))

    whole = run()
    interrupted(7, how)
    with pytest.raises((Interrupted, KeyboardInterrupt, MemoryError)):
        run()
    stored = json.loads(file.read_text())
    assert (stored["next"], stored["values"][1]) == (61, 64 + 60 * 16) and 0 < stored["seconds"] < 600
    file.write_text(json.dumps(stored | {"seconds": 1000.0}))
    with monkeypatch.context() as patch, pytest.raises((Interrupted, KeyboardInterrupt, MemoryError)):
        patch.setattr(evaluation, "check", lambda *args: how())
        run()
    again = json.loads(file.read_text())
    assert (again["next"], again["values"]) == (stored["next"], stored["values"]) and 1000 < again["seconds"] < 1600
    end = run(batch_tokens=batch_tokens)
    assert (end.tokens, end.bytes) == (whole.tokens, whole.bytes) and 1000 < end.seconds < 1600
    assert end.nats == whole.nats if batch_tokens == 640 else end.nats == pytest.approx(whole.nats, rel=1e-7)
    assert said == ["continuing an interrupted evaluation: 1,024 tokens are scored already"] * 2
    assert not list(tmp_path.iterdir()), "the file goes with the finished score"


@pytest.mark.parametrize(
    ("model", "plan", "why"),
    [
        ("other", {}, "is of another evaluation (model changed)"),
        ("model", {"stride": 32}, "is of another evaluation (stride changed)"),
        ("model", {"document_aware": True}, "is of another evaluation (document_start changed)"),
        (None, {}, "is damaged"),
    ],
)
def test_another_evaluation_starts_over(tiny, tmp_path, interrupted, model, plan, why):
    interrupted(2, fail(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        score(tiny, keep=PartialSums(tmp_path, 0, "model"), **PLAN)
    if model is None:
        (tmp_path / "eval_partial_0.json").write_text('{"key": 3')
    said = []
    got = score(tiny, keep=PartialSums(tmp_path, 0, model or "model", said.append), **(PLAN | plan))
    lasting = model == "model"
    then = "kept until this one is stopped or takes 10 s" if lasting else "starting over"
    assert len(said) == 1 and said[0].endswith(f"{why}: {then}")
    assert (tmp_path / "eval_partial_0.json").exists() == lasting
    assert got.nats == score(tiny, **(PLAN | plan)).nats


def test_sums_and_progress_as_time_goes_by(tiny, tmp_path, interrupted, monkeypatch):
    """A SIGKILL leaves the file of the last save. A folder that cannot be written is one warning."""
    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0.0)
    files, lines, said = [], [], []
    interrupted(5, lambda: files.append(json.loads((tmp_path / "eval_partial_0.json").read_text())))
    got = score(tiny, keep=PartialSums(tmp_path, 0, "model"), progress=lines.append, **PLAN)
    assert files[0]["next"] == 1 + 4 * 10
    assert lines[0].startswith("64 of 2,000 tokens, ") and lines[0].endswith(" s left")
    assert lines[-1].startswith(f"2,000 of 2,000 tokens, {got.val_bpb:.4f} bits per byte so far, ")
    assert lines[-1].endswith(" tokens/s, 0 s left")
    score(tiny, keep=PartialSums(tmp_path / "gone", 0, "model", said.append), **PLAN)
    assert len(said) == 1 and said[0].startswith("warning:")
