"""Muon for matrix banks and AdamW for all other parameters. `Optimizers` combines them for the training loop.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon), over banks of matrices:
    buf <- mu buf + g;   u = g + mu buf (Nesterov);   O = newton_schulz(u) * sqrt(max(1, rows / cols))
    w <- w (1 - lr wd) - lr O
Matrices of equal shape are orthogonalized as one batch, even if they are from different banks. Learning rates and
momentum are on the device, so a schedule can change them without a new capture of the CUDA graph of the step. With
kernels, a step takes one launch for all momenta (it also sums the squares of u for the norms), 1 + 3 ns_steps launches
for each shape, and one launch for all updates and compute copies (one more for each further set of quantizer options).

Two options add torch operations around the orthogonalization. `row_norm` first divides each row of u by its norm
(MuonEq-R). `variance_beta` divides each row of O by the root of a running mean of its squares and then restores the
norm of the matrix (NorMuon, arXiv:2510.05491; the norm is restored as in modded-nanogpt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from golfgpt_kernels import RowQuant, muon_momentum_, muon_update_, newton_schulz_, square_parts
from torch import Tensor, nn

from golfgpt.config import OptimConfig
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import Param, of_kind
from golfgpt.optim.flat import FlatGradients
from golfgpt.quant.compute_copies import ComputeCopies


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, over parameters (..., rows, cols) with rows = out features.

    `lr`, `momentum` and `weight_decay` of a group are numbers or 0-d float32 tensors on the device of the parameters (a
    decay on the device costs a pass over the weights). `compute_copies` maps parameters to tensors of the same shape.
    Every update also writes the new weights to the copy, rounded to its dtype. If the parameter has an entry in
    `quantizers`, the copy is also fake-quantized while `enabled`, a 0-d bool tensor, is true (None: always). `dtype` is
    the dtype of the Newton-Schulz iteration. Raises ValueError for a parameter with fewer than two dimensions, or with
    a quantizer but no compute copy.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float | Tensor,
        momentum: float | Tensor = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: str | Sequence[tuple[float, float, float]] = "quintic",
        weight_decay: float | Tensor = 0.0,
        row_norm: bool = False,
        variance_beta: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        compute_copies: Mapping[Tensor, Tensor] | None = None,
        quantizers: Mapping[Tensor, RowQuant] | None = None,
        enabled: Tensor | None = None,
        impl: str = "auto",
    ):
        self.dtype, self.impl = dtype, impl
        self.compute_copies, self.quantizers, self.enabled = compute_copies or {}, quantizers or {}, enabled
        defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, coefficients=coefficients,
            weight_decay=weight_decay, row_norm=row_norm, variance_beta=variance_beta,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, group: dict) -> None:
        params = group["params"]
        group = {**group, "params": [params] if isinstance(params, Tensor) else list(params)}
        for p in group["params"]:
            if p.ndim < 2:
                raise ValueError(f"Muon expected parameters with two or more dimensions, got shape {tuple(p.shape)}")
            if p in self.quantizers and p not in self.compute_copies:
                raise ValueError(
                    f"Muon: got a quantizer but no compute copy for a parameter of shape {tuple(p.shape)}; expected "
                    "one in compute_copies"
                )
        super().add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles. torch's Optimizer alone would omit the attributes that are added here."""
        own = {name: getattr(self, name) for name in ("dtype", "compute_copies", "quantizers", "enabled", "impl")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(self, closure: Callable | None = None, *, ok: Tensor | None = None):
        """Update every parameter that has a gradient.

        If a gradient is not finite, no parameter and no state changes. A CPU raises ValueError; a GPU decides on the
        device, without waiting. A caller that has already checked the gradients passes the result as `ok`, a 0-d bool
        tensor on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        if grads and ok is None:
            ok = torch.stack(torch._foreach_norm(grads, float("inf"))).isfinite().all()  # a 2-norm may overflow
            if ok.device.type == "cpu":
                if not ok:
                    bad = next(tuple(g.shape) for g in grads if not g.isfinite().all())
                    raise ValueError(
                        f"Muon: the gradient of a parameter of shape {bad} is not finite; nothing was updated"
                    )
                ok = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for kind in {(p.dtype, p.grad.dtype): None for p in params}:
                self._step(group, [p for p in params if (p.dtype, p.grad.dtype) == kind], ok)
        return loss

    def _step(self, group: dict, params: list[nn.Parameter], ok: Tensor | None) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in params:
            stacks.setdefault((p.size(-2), p.size(-1)), []).append(p)
        params = [p for members in stacks.values() for p in members]
        # bf16 holds any gradient's magnitude; fp16 would lose small ones before they are normalized.
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        batches, sums, updates, square_sums = [], [], [], []
        for (rows, cols), members in stacks.items():
            counts = [p.numel() // (rows * cols) for p in members]
            batches.append(torch.empty(sum(counts), rows, cols, dtype=dtype, device=members[0].device))
            parts = square_parts(rows, cols)
            sums.append(torch.empty(sum(counts), parts, dtype=torch.float32, device=members[0].device))
            updates += [u.view(p.shape) for u, p in zip(batches[-1].split(counts), members, strict=True)]
            square_sums += [s.view(*p.shape[:-2], -1) for s, p in zip(sums[-1].split(counts), members, strict=True)]
        muon_momentum_(
            [p.grad for p in params],
            [self.state[p]["momentum_buffer"] for p in params],
            updates,
            _scalar(group["momentum"], params[0].device),
            nesterov=group["nesterov"],
            square_sums=None if group["row_norm"] else square_sums,  # row_norm changes the rows below
            ok=ok,
            impl=self.impl,
        )
        if group["row_norm"]:
            for batch in batches:
                batch /= torch.linalg.vector_norm(batch, dim=-1, keepdim=True, dtype=torch.float32) + 1e-7
        newton_schulz_(
            batches,
            steps=group["ns_steps"],
            coefficients=group["coefficients"],
            dtype=self.dtype,
            square_sums=None if group["row_norm"] else sums,
            impl=self.impl,
        )
        if group["variance_beta"]:
            updates = [self._equalize(p, o, group["variance_beta"], ok) for p, o in zip(params, updates, strict=True)]
        decay, lr = group["weight_decay"], _scalar(group["lr"], params[0].device)
        tapers = isinstance(decay, Tensor)
        if tapers:
            torch._foreach_mul_(params, 1 - lr * decay * (1.0 if ok is None else ok))
        of = dict(zip(params, updates, strict=True))
        for copied in (True, False):
            members = [p for p in params if (p in self.compute_copies) == copied]
            if not members:
                continue
            muon_update_(
                members,
                [of[p] for p in members],
                lr,
                scales=[max(1.0, p.size(-2) / p.size(-1)) ** 0.5 for p in members],
                weight_decay=0.0 if tapers else decay,
                compute_copies=[self.compute_copies[p] for p in members] if copied else None,
                specs=[self.quantizers.get(p) for p in members],
                enabled=self.enabled,
                ok=ok,
                impl=self.impl,
            )

    def _equalize(self, p: nn.Parameter, o: Tensor, beta: float, ok: Tensor | None) -> Tensor:
        """Divide the rows of o by the root of their running mean square, then restore the norm of the matrix."""
        state = self.state[p]
        if "row_variance" not in state:
            state["row_variance"] = torch.zeros(*p.shape[:-1], 1, dtype=torch.float32, device=p.device)
        variance = state["row_variance"].float().lerp(o.float().square().mean(-1, keepdim=True), 1 - beta)
        state["row_variance"].copy_(variance if ok is None else torch.where(ok, variance, state["row_variance"]))
        scaled = o * variance.clamp_min(1e-10).rsqrt()
        norms = [torch.linalg.matrix_norm(x.float()) for x in (o, scaled)]
        return scaled * (norms[0] / norms[1].clamp_min(1e-10))[..., None, None]


def by_muon(table: Mapping[str, Param], config: OptimConfig) -> list[str]:
    """Names of the parameters that Muon updates."""
    return [name for name in of_kind(table, "matrix") if table[name].by_layer or config.projections == "muon"]


def record_graph(work: Callable[[], None], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph; nothing is executed. `pool`: the memory of another graph that never runs meanwhile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # "thread_local": with "global", the data thread could not allocate page-locked memory during the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except Exception:
        torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own
        raise
    return graph


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """0-d float32 tensor on the device. It is filled, because a copy would make the host wait for the GPU."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)


class Optimizers:
    """All optimizer groups of a model. Each kind of parameter has its base learning rate.

    `flat` determines whether matrices are replicated or sharded; sharded weights are gathered after the step.
    `compute_copies` are updated with the weights, if possible in the same launch. `dtype` is that of Newton-Schulz.
    While the attribute `ok`, a 0-d bool tensor on the device, is false, a step changes nothing.
    """

    def __init__(
        self,
        model: GPT,
        config: OptimConfig,
        flat: FlatGradients | None = None,
        compute_copies: ComputeCopies | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        named = dict(model.named_parameters())
        embed_lr = config.tied_embed_lr if model.config.tie_embeddings else config.embed_lr
        rates = {"embedding": embed_lr, "head": config.head_lr, "control": config.scalar_lr}
        matrices = by_muon(model.table, config)
        members = {kind: [named[name] for name in of_kind(model.table, kind)] for kind in rates}
        members["control"] += [named[name] for name in of_kind(model.table, "matrix") if name not in matrices]
        embed, scalar = (
            config.weight_decay if decay is None else decay
            for decay in (config.embed_weight_decay, config.scalar_weight_decay)
        )
        decays = {"embedding": embed, "head": embed, "control": scalar}
        groups = [
            {"params": members[kind], "lr": lr, "weight_decay": decays[kind]}
            for kind, lr in rates.items()
            if members[kind]
        ]
        self._flat = flat if flat is not None and flat.sharded else None
        device = named["tok_emb"].device
        self._base = [group["lr"] for group in groups] + [config.matrix_lr]
        self._decay = config.weight_decay
        self._scalars = torch.zeros(len(self._base) + 2, device=device)
        *rates_on_device, momentum, decay = self._scalars.unbind()
        for group, lr in zip(groups, rates_on_device, strict=False):
            group["lr"] = lr
        self.adam = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self._copies = copies = compute_copies
        written = copies.written_by_muon() if copies is not None and self._flat is None else {}
        written = {name: spec for name, spec in written.items() if name in matrices}
        self._refreshed = [] if copies is None else [name for name in copies.banks if name not in written]
        self.muon = Muon(
            [named[name] for name in matrices] if self._flat is None else [stack.shard for stack in self._flat.stacks],
            lr=rates_on_device[-1],
            momentum=momentum,
            ns_steps=config.muon_ns_steps,
            coefficients=config.muon_coefficients,
            weight_decay=config.weight_decay if config.weight_decay_end == 1 else decay,
            row_norm=config.muon_row_norm,
            variance_beta=config.muon_variance_beta,
            dtype=dtype,
            compute_copies={named[name]: copies.banks[name] for name in written},
            quantizers={named[name]: spec for name, spec in written.items() if spec is not None},
            enabled=None if copies is None else copies.enabled,
        )
        self.ok = torch.ones((), dtype=torch.bool, device=device)
        self._found_inf = self.adam.found_inf = torch.zeros((), device=device)  # torch's name: 1 skips a fused step
        self._parameters, self._names = named, {p: name for name, p in named.items()}
        rounded = config.embed_dtype == "bfloat16"
        self.bf16_params = frozenset(of_kind(model.table, "embedding") if rounded else ())
        """Parameters with bfloat16 values. They, their gradients and their moments are rounded before and after Adam's
        step, which runs in float32. The result is that of the fused kernel for bfloat16 tensors."""
        self._round([named[name].data for name in sorted(self.bf16_params)])
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, multiplier: float, momentum: float, decay: float = 1.0) -> None:
        """Update every parameter from its .grad, which must be finite, with learning rates base * multiplier and, where
        it tapers, Muon's weight decay times `decay`."""
        values = torch.tensor([base * multiplier for base in self._base] + [momentum, self._decay * decay])
        if self._scalars.is_cuda:
            values = values.pin_memory()
        self._scalars.copy_(values, non_blocking=True)
        if self._graph is None:
            self._step()
        elif self._addresses() == self._captured:
            self._graph.replay()
        else:
            raise RuntimeError(
                "parameters, gradients or groups changed after the step was captured; call capture() again"
            )
        if self._flat is not None:
            self._flat.gather_weights()
        if self._refreshed:
            self._copies.refresh(self._refreshed)
        elif self._copies is not None:
            self._copies.mark()

    def _step(self) -> None:
        rounded = [p for name in sorted(self.bf16_params) if (p := self._parameters[name]).grad is not None]
        self._round([p.grad for p in rounded])
        torch.logical_not(self.ok, out=self._found_inf)
        self.adam.step()
        self._round([p.data for p in rounded] + [m for p in rounded for m in self._moments(p)])
        self.muon.step(ok=self.ok)

    def _moments(self, p: nn.Parameter) -> list[Tensor]:
        return [self.adam.state[p][key] for key in ("exp_avg", "exp_avg_sq")]

    @staticmethod
    def _round(tensors: list[Tensor]) -> None:
        if tensors:
            rounded = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
            torch._foreach_copy_(rounded, tensors)
            torch._foreach_copy_(tensors, rounded)

    def capture(self) -> None:
        """Record the step of all groups in one CUDA graph. From then on, `step` replays it.

        Every parameter must have been updated once before, so that all state exists and all kernels are compiled. After
        the capture, parameters, gradients and state must keep their addresses (`load_state` writes in place). The
        capture executes nothing. Raises RuntimeError without a GPU.
        """
        if not self._scalars.is_cuda:
            raise RuntimeError(f"a CUDA graph needs parameters on a GPU, got {self._scalars.device}")
        self.release()
        addresses = self._addresses()
        if None in (address for addresses_of in addresses for address in addresses_of):
            raise RuntimeError("some parameter has no gradient or no state yet; take a step before the capture")
        for group in self.adam.param_groups:
            group["capturable"] = True  # asserts what fused Adam is anyway; before a capture, torch would warn of it
        graph = record_graph(self._step)
        self._graph, self._captured = graph, addresses

    def release(self) -> None:
        """Drop the captured graph: `step` executes again."""
        self._graph = None

    def _addresses(self) -> list[tuple[int | None, ...]]:
        """Addresses of each parameter, its gradient and its state; None for what does not exist."""
        return [
            (p.data_ptr(), None if p.grad is None else p.grad.data_ptr())
            + (tuple(value.data_ptr() for _, value in sorted(optimizer.state[p].items())) or (None,))
            for optimizer in (self.adam, self.muon)
            for group in optimizer.param_groups
            for p in group["params"]
        ]

    def state(self) -> dict[str, Tensor]:
        """State tensors by 'parameter.key', for a checkpoint; empty before the first step. The result is the same for
        any number of ranks, replicated or sharded. All ranks must call it together, because shards are gathered."""
        out = {
            f"{self._names[p]}.{key}": value
            for optimizer in (self.adam, self.muon)
            for p, state in optimizer.state.items()
            if p in self._names
            for key, value in state.items()
        }
        for stack in self._flat.stacks if self._flat is not None else ():
            for key, shard in sorted(self.muon.state[stack.shard].items()):  # the same order on every rank
                banks = self._flat.gather(stack, shard)
                out |= {
                    f"{name}.{key}": bank.view(*self._parameters[name].shape[:-1], -1) for name, bank in banks.items()
                }
        return out

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `state`. Existing state is overwritten in place; state that is not in `tensors` becomes
        zero."""
        for optimizer in (self.adam, self.muon):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    named = self._tensors_of(p, tensors)
                    state = optimizer.state[p]
                    for key in {*state, *named}:
                        value = named.get(key)
                        if key not in state:
                            state[key] = value.to(p.device, copy=True)
                        elif value is None:
                            state[key].zero_()
                        else:
                            state[key].copy_(value)

    def _tensors_of(self, p: nn.Parameter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """State key -> tensor, of one parameter or of this rank's shard of a stack."""
        if self._flat is None or p in self._names:
            prefix = self._names[p] + "."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        stack = next(stack for stack in self._flat.stacks if stack.shard is p)
        banks = {name: self._parameters[name] for name in stack.names}
        found: dict[str, dict[str, Tensor]] = {}
        for name in banks:
            for key, value in tensors.items():
                if key.startswith(name + "."):
                    found.setdefault(key.removeprefix(name + "."), {})[name] = value.to(p.device)
        for values in found.values():
            width = next(iter(values.values())).shape[-1]
            for name in banks.keys() - values.keys():
                values[name] = torch.zeros(*banks[name].shape[:-1], width, device=p.device)
        return {key: self._flat.scatter(stack, values) for key, values in found.items()}
