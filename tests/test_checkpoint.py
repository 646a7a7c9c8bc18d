"""Checkpoints: round trip, damage, disk full, retention."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from golfgpt import files
from golfgpt.train import checkpoint
from golfgpt.train.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {"a": torch.randn(3, 4, generator=generator), "b.step": torch.tensor(float(step))}
    other = {k: v + 1 for k, v in tensors.items()}
    return Checkpoint(
        step, False, {"train": step / 3}, {"seed": 1}, "digest", tensors, other, {"count": torch.tensor(2)}
    )


def same(a: Checkpoint, b: Checkpoint) -> bool:
    tensors = all(torch.equal(x[k], y[k]) for x, y in ((a.model, b.model), (a.optimizers, b.optimizers)) for k in x)
    return tensors and (a.step, a.finished, a.seconds, a.config) == (b.step, b.finished, b.seconds, b.config)


def test_round_trip_and_retention(tmp_path):
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, make(step))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000010.safetensors", "step_00000015.safetensors"]
    found, refused = checkpoint.latest(tmp_path)
    assert same(found, make(15)) and refused == {}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    checkpoint.save(tmp_path, make(5))
    path = checkpoint.save(tmp_path, make(10))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 4
    path.write_bytes({"truncated": data[:-5], "flipped": data, "empty": b"", "foreign": b"\x08" + bytes(99)}[damage])
    found, refused = checkpoint.latest(tmp_path)
    assert same(found, make(5))
    assert list(refused) == [path] and str(path) in refused[path]


def test_a_damaged_newer_file_never_costs_the_one_just_written(tmp_path):
    for step in (100, 110):
        (tmp_path / f"step_{step:08d}.safetensors").write_bytes(b"damaged")
    checkpoint.save(tmp_path, make(60))
    assert same(checkpoint.latest(tmp_path)[0], make(60))


def test_an_old_file_that_cannot_be_removed_costs_nothing(tmp_path):
    (tmp_path / "step_00000001.safetensors").mkdir()  # which `unlink` refuses
    for step in (5, 10):
        checkpoint.save(tmp_path, make(step))
    assert same(checkpoint.latest(tmp_path)[0], make(10))


def test_altered_metadata_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, make(8))
    data = path.read_bytes()
    path.write_bytes(data.replace(rb"\"step\": 8", rb"\"step\": 9"))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) == (None, {})


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make(5))

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/step_00000010\.safetensors'"):
        checkpoint.save(tmp_path, make(10))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005.safetensors"]
    assert same(checkpoint.latest(tmp_path)[0], make(5))
