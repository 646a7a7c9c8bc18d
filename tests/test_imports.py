"""The arrows between the parts, and imports that must stay cheap."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "golfgpt_kernels"
GOLFGPT = ROOT / "golfgpt"


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports when it runs, anywhere in it, relative imports resolved to '.name'."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in for_types]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return names


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    roots = {name.split(".")[0] for name in imported(path) if not name.startswith(".")}
    assert roots <= {"torch", "triton"} | sys.stdlib_module_names
    if not path.name.startswith("_") and path.stem not in ("testing", "tuning"):  # which use the ops
        siblings = {name.lstrip(".").split(".")[0] for name in imported(path) if name.startswith(".")}
        assert all(name.startswith("_") for name in siblings), "an op never imports another op"


@pytest.mark.parametrize("path", sorted(GOLFGPT.rglob("*.py")), ids=lambda p: str(p.relative_to(GOLFGPT)))
def test_golfgpt_uses_public_kernel_names_and_tyro_only_in_cli(path):
    names = imported(path)
    assert not [n for n in names if n.startswith("golfgpt_kernels._")]
    if path.parent.name != "cli":
        assert not [n for n in names if n.split(".")[0] == "tyro"]
    assert not [n for n in names if n.split(".")[0] in ("bench", "tests", "pickle")]


@pytest.mark.parametrize("path", sorted([*KERNELS.glob("*.py"), *GOLFGPT.rglob("*.py")]), ids=lambda p: p.name)
def test_no_message_names_a_command_of_the_checkout(path):
    """Docstrings of files and functions aside, for only a checkout shows them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef) and ast.get_docstring(n)]
    unseen = {id(node.body[0].value) for node in functions}
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    shown = [n.value for n in strings if id(n) not in unseen]
    assert not [text for text in shown if re.search(r"`make |\bbench\.\w|python -m (?!golfgpt)", text)]


LAYERS = (
    {"errors", "files", "distributed", "fields", "vector_math"},
    {"config"},
    {"bpb", "data", "recipes", "runs"},
    {"model"},
    {"published", "quant"},
    {"optim", "score"},
    {"tables"},
    {"train"},
    {"importer", "doctor", "compare", "sweep"},
    {"report", "watch", "submit", "hf"},
    {"cli", "__main__"},
)
"""What stands in one of golfgpt's layers imports from its own and from those above it in this list. Every file named
config is of the layer "config"."""


def modules() -> dict[str, set[str]]:
    """golfgpt's files by dotted name, each with those that it imports anywhere in it; of
    `from package import module` that is the module."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in GOLFGPT.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    needs = {name: imported(path) & paths.keys() - {"golfgpt", name} for name, path in paths.items()}
    return {name: needed - {n.rpartition(".")[0] for n in needed} for name, needed in needs.items()}


def test_arrows_point_one_way():
    ranks = {part: i for i, layer in enumerate(LAYERS) for part in layer}

    def rank(name: str) -> int:
        return ranks["config" if name.endswith(".config") else name.split(".")[1]]

    found = {name: needs for name, needs in modules().items() if name != "golfgpt"}
    assert {name.split(".")[1] for name in found} == ranks.keys()
    assert not [f"{name} imports {n}" for name, needs in found.items() for n in needs if rank(n) > rank(name)]


def test_no_import_circles():
    """Imports inside functions count too: a file that is read from top to bottom needs what it names."""
    list(graphlib.TopologicalSorter(modules()).static_order())  # raises CycleError with the circle


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "golfgpt",
        "golfgpt.config",
        "golfgpt.recipes",
        "golfgpt.optim.schedule",
        "golfgpt.cli",
        "golfgpt.report.page",
        "golfgpt.watch",
    ],
)
def test_no_torch_at_import(module):
    run_python(f"import sys, {module}; assert 'torch' not in sys.modules")


def test_data_needs_no_torch():
    run_python("import sys, golfgpt.data.prepare, golfgpt.bpb, golfgpt.tables; assert 'torch' not in sys.modules")


def test_trains_with_triton_blocked():
    """Where triton cannot be installed everything but impl='triton' works."""
    run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from golfgpt.config import ModelConfig, OptimConfig\n"
        "from golfgpt.model.gpt import GPT\n"
        "from golfgpt.optim.optimizers import Optimizers\n"
        "config = ModelConfig(vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_hidden=32)\n"
        "model = GPT(config)\n"
        "optimizers = Optimizers(model, OptimConfig())\n"
        "ids = torch.arange(40).view(2, 20)\n"
        "losses = []\n"
        "for _ in range(5):\n"
        "    model.zero_grad()\n"
        "    loss = model.loss(ids[:, :-1], ids[:, 1:])\n"
        "    loss.backward()\n"
        "    optimizers.step(1.0, 0.9)\n"
        "    losses.append(loss.item())\n"
        "assert min(losses) < losses[0]\n"
    )
