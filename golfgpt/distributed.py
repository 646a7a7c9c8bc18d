"""Ranks: torchrun's environment contract on NCCL or gloo, and a world of one without it."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from golfgpt.errors import GolfError, InputError, LostPeerError, PeerError

# torch 2.13 renamed them and warns about the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's share (n, ...) of `tensor` (world * n, ...), a view."""
        return tensor.chunk(self.world)[self.rank]

    def reduce_scatter_(self, tensors: Sequence[Tensor]) -> None:
        """Sum this rank's share of each tensor over ranks, in place; the rest is unspecified afterwards. All are under
        way before the first is waited for."""
        if self.world > 1:
            _wait([_reduce_scatter(self.own(t), t, async_op=True) for t in tensors])

    def all_gather_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the shares of other ranks in each tensor by theirs, in place, all at once as `reduce_scatter_`."""
        if self.world > 1:
            _wait([_all_gather(t, self.own(t), async_op=True) for t in tensors])

    def all_gather(self, share: Tensor) -> Tensor:
        """Every rank's `share` (n, ...) one after another, as (world * n, ...)."""
        if self.world == 1:
            return share
        whole = share.new_empty(self.world * len(share), *share.shape[1:])
        _all_gather(whole, share.contiguous())
        return whole

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` by rank 0's, in place."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast_object(self, value: Any = None) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world > 1:
            box = [value]
            dist.broadcast_object_list(box, 0, device=self.device)
            return box[0]
        return value

    def raise_on_any_rank(self, error: Exception | None) -> None:
        """Raise `error`; where another rank has one instead, raise PeerError, so that no rank waits in vain."""
        failed = self.sum_(torch.tensor(float(error is not None), device=self.device)).item()
        if error is not None:
            raise error
        if failed:
            raise PeerError("another rank stopped with an error")

    @contextlib.contextmanager
    def raise_on_any(self) -> Iterator[None]:
        """Where the block fails with a GolfError or OSError on some rank, all ranks raise. A collective in the block
        must be reached by every rank, whatever fails before it."""
        failed = None
        try:
            yield
        except (GolfError, OSError) as error:
            failed = error
        self.raise_on_any_rank(failed)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def lost_peers(hint: Callable[[], str]) -> Iterator[None]:
    """Raise LostPeerError if a collective in the block fails because a rank died or timed out, with the first line of
    what the backend says. `hint` is the sentence that follows."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        said = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].partition("\n")[0][:200]  # without gloo's file
        raise LostPeerError(f"another process of this run died or does not answer ({said}).{hint()}") from error


def start(device: str, peer_seconds: float = 600.0) -> Ranks:
    """Join the process group that torchrun announces, if any. Ranks wait for each other for `peer_seconds`.

    `device` is "auto", "cpu" or "cuda". Raises InputError when cuda is asked for and not there, or when
    there are more local ranks than GPUs.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device is cuda, but torch sees no CUDA device; use --runtime.device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"local rank {local} has no GPU: torch sees {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    place = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if world > 1 and not dist.is_initialized():
        # First: its functions have defaults group=group.WORLD. Imported later (AdamW imports torch._dynamo, that this),
        # they hold the process group past its end, and a gloo thread that wants the GIL while the interpreter ends
        # aborts a process whose work is done. Figures in tests/exit_race.py; the import takes 6 ms.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "nccl" if device == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=peer_seconds)
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        # Where torchrun keeps its store for workers that it restarts, they would meet at the dead ones' addresses.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        gpu = place if device == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=gpu)
    return Ranks(rank, world, place)
