"""An H100 that is not there: PyTorch traces and lowers programs for it, on tensors without memory, and runs nothing.

    import bench.fake_cuda          before torch, which looks for CUDA's hooks once, when it is imported
    bench.fake_cuda.install(on_graph)

Under FakeTensorMode, CUDA tensors can then be made, differentiated and compiled by a PyTorch without CUDA. Where
Inductor would load the code of a graph, `on_graph` receives the GraphLowering, scheduled and fused for sm_90, with its
code, and returns a function to call each time the graph would run. Written for torch 2.13, whose internals it replaces.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def _build(torch_folder: Path) -> Path:
    """The compiled hooks for this version of torch, in build/ beside bench/. Raises CalledProcessError with g++'s
    message."""
    library = SOURCE.parent.parent / "build" / f"fake_cuda-torch{version('torch')}.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        paths = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        options = ["-shared", "-fPIC", "-std=c++20", "-O0"]
        subprocess.run(["g++", *options, *paths, SOURCE, "-o", made, "-lc10", "-ltorch_cpu"], check=True)
        made.replace(library)
    return library


def _load() -> None:
    folder = Path(importlib.util.find_spec("torch").origin).parent
    hooks = _build(folder)
    for pattern in ("libgomp*", "libc10.so", "libtorch_cpu.so"):  # what the hooks need, in the order of dependence
        for library in (folder / "lib").glob(pattern):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(hooks))


if "torch" in sys.modules:
    raise ImportError("bench.fake_cuda must be imported before torch, which looks for CUDA's hooks only once")
_load()

import torch  # noqa: E402
import torch._inductor.config as inductor  # noqa: E402
import torch._inductor.constant_folding as constant_folding  # noqa: E402
import torch._inductor.fx_passes.fuse_attention as fuse_attention  # noqa: E402
import torch._inductor.fx_passes.joint_graph as joint_graph  # noqa: E402
import torch._inductor.fx_passes.misc_patterns as misc_patterns  # noqa: E402
import torch._inductor.fx_passes.pad_mm as pad_mm  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor import ir  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

DEVICE = torch.device("cuda", 0)
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
    gcnArchName="",
    uuid="none",
    pci_bus_id=0,
)


class _Stream:
    cuda_stream, device_index, device_type, stream_id = 0, 0, 1, 0

    def synchronize(self) -> None: ...
    def wait_stream(self, stream: object) -> None: ...


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


def install(on_graph: Callable[[GraphLowering, str], Callable[[], None]]) -> None:
    """Make torch, Inductor and triton believe in the GPU, in this process and for good."""
    _answer_queries()
    _replace_what_needs_memory()
    inductor.force_disable_caches = True  # a cached graph would not be lowered
    inductor.compile_threads = 1
    inductor.triton.cudagraphs = False

    def empty(size, stride, dtype, device) -> torch.Tensor:
        return torch.empty_strided([*map(int, size)], [*map(int, stride)], dtype=dtype, device=device)

    def compile_to_module(graph: GraphLowering):
        code, _ = graph.codegen()
        on_run, fake_mode = on_graph(graph, code.value), V.fake_mode
        outputs = [None if isinstance(o, ir.NoneAsConstantBuffer) else o for o in graph.graph_outputs]
        shapes = [o and (o.get_size(), o.get_stride(), o.get_dtype(), o.get_device()) for o in outputs]

        def call(args: list) -> list:
            args.clear()
            on_run()
            with fake_mode:
                return [shape and empty(*shape) for shape in shapes]

        graph.cache_key, graph.cache_path, graph.cache_linemap = "none", os.devnull, []
        return types.SimpleNamespace(call=call, runner=None, __file__=os.devnull, key="none")

    GraphLowering.compile_to_module = compile_to_module


def _answer_queries() -> None:
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_name": lambda device=None: H100.name,
        "current_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda *args, **options: True,
        "is_tf32_supported": lambda: True,
        "memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        if hasattr(CudaInterface, name):  # Dynamo's table of what it asks a device
            setattr(CudaInterface, name, staticmethod(answer))
    for name in ("current_device", "set_device", "get_device_properties"):
        setattr(CudaInterface.Worker, name, staticmethod(answers[name]))
    CudaInterface.exchange_device = CudaInterface.maybe_exchange_device = staticmethod(lambda index: 0)
    torch.version.cuda = "12.8"
    torch.Tensor.pin_memory = lambda self, *_device: self

    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        utils = None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return DEVICE

    driver.set_active(Driver())


def _replace_what_needs_memory() -> None:
    # Patterns that Inductor traces with small real CUDA tensors. None occurs in these models.
    for module, name in (
        (fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init"), (misc_patterns, "_misc_patterns_init")
    ):  # fmt: skip
        setattr(module, name, lambda *args, **options: None)
    inductor.shape_padding = False
    # Constants are folded with real tensors.
    for folder in (constant_folding.ConstantFolder, joint_graph.UniformValueConstantFolder):

        def deduce(self, *args, original=folder._deduce_value):
            with _OnCpu():
                return original(self, *args)

        folder._deduce_value = deduce

    # The choice of an attention backend is C++ of CUDA builds: name the flash kernel.
    def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None or dropout_p:
            raise ValueError("bench.fake_cuda has causal and full attention only; got a mask or dropout")
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]

    F.scaled_dot_product_attention = flash
