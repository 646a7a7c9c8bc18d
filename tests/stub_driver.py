"""Every kernel's whole host path without a GPU: compile, load, parse arguments, encode descriptors, launch.

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER python tests/stub_driver.py

FOLDER holds tests/stub_driver.c, compiled to libcuda.so.1, which runs nothing: what kernels should have written is
whatever was there. Prints a line of JSON for each case: its name, how many launches and descriptors the library
counted, how many of them it refused, and what was raised.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import golfgpt_kernels as gk
import torch
from golfgpt_kernels import RowQuant, _dispatch, _jit, _tiles
from golfgpt_kernels.relu2_mlp import gluon_cannot_run

from bench import offline

INT6 = RowQuant(bits=6)
YES = torch.tensor(True)

# ---- operands


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def misaligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


def transposed(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT


@dataclass(frozen=True)
class Form:
    """Operands of these sides, of a dtype and a layout."""

    m: int = 64
    k: int = 128
    n: int = 256
    dtype: torch.dtype = torch.bfloat16
    layout: Callable[..., torch.Tensor] = torch.zeros

    def __call__(self, sides: str, *batch: int) -> torch.Tensor:
        """form("mk", 3) is 3 matrices (m, k)."""
        return self.layout(*batch, *(getattr(self, side) for side in sides), dtype=self.dtype).requires_grad_()

    def banks(self) -> list[torch.Tensor]:
        return [self("mk", 3), self("nk")]

    def targets(self) -> torch.Tensor:
        return torch.zeros(self.m, dtype=torch.int64)


# Triton compiles a kernel for each dtype, and anew where a number is 1 or no multiple of 16. So each dtype comes with
# other numbers, not with all.
LAYOUTS = {layout.__name__: Form(layout=layout) for layout in (strided, misaligned, transposed)}
ODD = {"ragged float16": Form(37, 100, 51, torch.float16), "1x1 float32": Form(1, 1, 1, torch.float32)}
MATRICES = {**LAYOUTS, **ODD}
ROWS = {**MATRICES, "one row": Form(m=1)}
HALF_PRECISION = {name: form for name, form in ROWS.items() if form.dtype != torch.float32}
CONTIGUOUS = {"misaligned": LAYOUTS["misaligned"], **ODD}  # Muon's kernels refuse other layouts

# ---- cases


def relu2_mlp_gluon(t: Form) -> None:
    gk.relu2_mlp(t("mk"), t("nk"), t("kn"), negative_slope=0.5, impl="gluon").sum().backward()


def fake_quantize_groups(t: Form) -> None:
    spec = replace(INT6, group_size=max(1, t.k // 4))
    gk.fake_quantize_banks(t.banks(), t.banks(), [spec, replace(spec, bits=5)], enabled=YES)


def muon_momentum(t: Form) -> None:
    sums = [torch.zeros(*u.shape[:-2], gk.square_parts(*u.shape[-2:])) for u in t.banks()]
    gk.muon_momentum_(t.banks(), t.banks(), t.banks(), torch.tensor(0.95), square_sums=sums, ok=YES)


def muon_update(t: Form) -> None:
    """With a compute copy that is quantized and one that is not."""
    options = {"scales": [1.0, 1.5], "weight_decay": 0.1, "specs": [INT6, None], "ok": YES}
    gk.muon_update_(t.banks(), t.banks(), torch.tensor(0.02), compute_copies=t.banks(), **options)


# Backward too: the gradient of a sum has strides of zero. token_logprobs passes the least int64 as ignore_index.
OPS = {
    "linear_relu2": (ROWS, lambda t: gk.linear_relu2(t("mk"), t("nk"), negative_slope=0.5).sum().backward()),
    "relu2_mlp": (ROWS, lambda t: gk.relu2_mlp(t("mk"), t("nk"), t("kn"), negative_slope=0.5).sum().backward()),
    "relu2_mlp gluon": (HALF_PRECISION, relu2_mlp_gluon),
    "softcap_cross_entropy": (ROWS, lambda t: gk.softcap_cross_entropy(t("mk"), t("nk"), t.targets()).backward()),
    "token_logprobs": (ODD, lambda t: gk.token_logprobs(t("mk"), t("nk"), t.targets(), mask=t.targets() == 0)),
    "newton_schulz wide": (MATRICES, lambda t: gk.newton_schulz(t("mk", 3), steps=1, dtype=t.dtype)),
    "newton_schulz tall": (MATRICES, lambda t: gk.newton_schulz(t("km"), steps=1, dtype=t.dtype)),
    "newton_schulz_": (CONTIGUOUS, lambda t: gk.newton_schulz_([t("mk", 3), t("km"), t("kk")], steps=1, dtype=t.dtype)),
    "fake_quant_linear": (ROWS, lambda t: gk.fake_quant_linear(t("mk"), t("nk"), INT6, form="codes").sum().backward()),
    "fake_quantize_groups": (MATRICES, fake_quantize_groups),
    "muon_momentum": (CONTIGUOUS, muon_momentum),
    "muon_update": (CONTIGUOUS, muon_update),
}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tests/test_offline.py compiles for sm_90, with the tiles that launchers select themselves; then the ops."""
    for name, case in offline.CASES.items():
        for variant in (case.variants[0], case.variants[-1])[: len(case.variants)]:
            words = " ".join([name, *(f"{key}={value}" for key, value in variant.items())])
            yield words, partial(case.launch, torch.bfloat16 if case.dots else torch.float32, None, **variant)
    for op, (forms, run) in OPS.items():
        for name, form in forms.items():
            yield f"{op} {name}", partial(run, form)


CASES = dict(cases())

# ---- the driver


def activate(sm: int = 90) -> None:
    """From here on triton and golfgpt_kernels take tensors of the CPU for those of such a GPU."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device=None: 0
    active.get_device_capability = lambda device=None: divmod(sm, 10)
    driver.set_active(active)
    offline.replace(_jit.num_programs, lambda device: offline.MULTIPROCESSORS[sm])
    offline.replace(_tiles.compute_capability, lambda device: sm)
    offline.replace(_dispatch.cannot_run, lambda device, dtype: None)
    offline.replace(gluon_cannot_run, lambda device, dtype: None)
    gk.set_implementation("triton")
    offline.hash_kernels()  # what tests/test_offline.py has compiled is found


def main() -> None:
    torch.set_num_threads(1)
    activate()
    stub = ctypes.CDLL("libcuda.so.1")
    counts = {name: ctypes.c_long.in_dll(stub, f"stub_{name}") for name in ("launches", "descriptors", "refused")}
    for name, run in CASES.items():
        for count in counts.values():
            count.value = 0
        raised = None
        try:
            run()
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        found = {key: count.value for key, count in counts.items()}
        print(json.dumps({"case": name, "raised": raised, **found}), flush=True)


if __name__ == "__main__":
    main()
