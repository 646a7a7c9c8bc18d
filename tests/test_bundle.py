"""The one-file program of a configuration: equal to the package, bit for bit, and nothing else in it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from models import tiny_config

from golfgpt import recipes
from golfgpt.config import RunConfig
from golfgpt.data.prepare import prepare
from golfgpt.errors import InputError
from golfgpt.submit.bundle import facts_of, source
from golfgpt.submit.facts import UNKNOWN
from golfgpt.submit.fold import Fold
from golfgpt.submit.pack import packed
from golfgpt.submit.size import counted
from golfgpt.train.train import train


def toy(recipe: str, corpus: Path) -> RunConfig:
    """A recipe with all its mechanisms, formats and orders, small."""
    c, tiny = recipes.get(recipe).config, tiny_config(corpus)
    m, ttt = c.model, c.eval.ttt
    model = replace(
        m, vocab_size=tiny.model.vocab_size, model_dim=8 * m.num_heads, mlp_hidden=48, rope_dims=min(m.rope_dims, 4),
        rope_reference_len=m.rope_reference_len and 16,
        bigram=replace(m.bigram, rows=min(m.bigram.rows, 50), dim=min(m.bigram.dim, 6)),
        value_embedding=replace(m.value_embedding, dim=min(m.value_embedding.dim, 6)),
    )  # fmt: skip
    tokens = 256 if c.data.order == "packed" else None
    data = replace(
        c.data, path=str(corpus), batch_tokens=512, seq_len=32, microbatch_tokens=tokens, spans=2,
        document_start=c.data.document_start,
    )  # fmt: skip
    adapted = replace(
        ttt,
        lora=replace(ttt.lora, chunk_tokens=32, rank=2, documents=1),
        sgd=replace(ttt.sgd, chunk_tokens=64),
        phase_documents=2,
        phases=2,
    )
    return replace(
        c,
        model=model,
        data=data,
        quant=replace(
            c.quant,
            keep_numel=400,
            level=4 if c.quant.compressor == "brotli" else None,
            calibration_tokens=512 if c.quant.method == "gptq" else c.quant.calibration_tokens,
        ),
        eval=replace(
            c.eval,
            max_tokens=1500,
            window=None,
            stride=c.eval.stride and 16,
            ttt=adapted,
        ),
        schedule=replace(c.schedule, max_steps=4, max_seconds=None, reserve_seconds=None, warmdown_max_frac=None),
        budget=replace(c.budget, fit="off", code_bytes=0),
        runtime=replace(tiny.runtime, kernels="eager", attention="flash", graph="off", dtype="float32", threads=1),
    )


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    """Prepared text of short documents: test-time training in phases needs several, and reads them slowly."""
    folder, library = tmp_path_factory.mktemp("documents"), Path(sysconfig.get_path("stdlib"))
    texts = [{"text": file.read_text(encoding="utf-8")[500:1100]} for file in sorted(library.glob("[a-d]*.py"))]
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    prepare([folder / "text.jsonl"], folder / "data", vocab_size=384, val_fraction=0.2, workers=1)
    return folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["baseline", "mixed-qat", "frontier"])
def test_program_gives_what_the_package_gives(recipe, documents, tmp_path):
    """Losses, artifact and scores, of the readable source and of the packed file: with rounding, with fake
    quantization, and with packed rows, loops, lanes, GPTQ and test-time training."""
    config = toy(recipe, documents)
    result = train(config, tmp_path / "run", quiet=True)
    log = (tmp_path / "run" / "train.log").read_text()
    losses = [line.split(" train_time")[0] for line in log.splitlines() if line.startswith("step:")]
    text = source(config)
    programs = {}
    if recipe != "frontier":  # one of the two is enough to compare, and saves time
        programs["readable"] = text.encode()
    if recipe != "mixed-qat":
        programs["packed"] = packed(text)
    for name, program in programs.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train_gpt.py").write_bytes(program)
        done = subprocess.run(
            [sys.executable, "-I", "train_gpt.py"], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found = [line.split(" train_time")[0] for line in done.stdout.splitlines() if line.startswith("step:")]
        assert found == losses and len(found) == 4
        assert (folder / "model.golf").read_bytes() == (tmp_path / "run" / "model.golf").read_bytes()
        for kind, score in (("roundtrip", result["score"]), ("adapted", result["adapted"])):
            if score:
                shown = f"final_{kind}_exact val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"
                assert shown in done.stdout, (kind, done.stdout)
    assert bool(result["adapted"]) == (recipe == "frontier")


def test_program_holds_what_its_configuration_needs(corpus):
    text = source(toy("baseline", corpus))
    tree = ast.parse(text)
    modules = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules - sys.stdlib_module_names == {"torch", "numpy", "sentencepiece"}
    for absent in ("_Exclusive", "def smear", "class LoRA", "import brotli", "cholesky", "import triton", "RunConfig("):
        assert absent not in text, absent
    known_nothing = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Constant)]
    assert not [n.attr for n in known_nothing if n.value.value is None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("config.num_layers + 1", 4),
        ("config.tie_embeddings and x", UNKNOWN),
        ("not config.tie_embeddings and x", False),
        ("x if config.num_layers == 3 else y", UNKNOWN),
        ("7 if config.num_layers == 3 else y", 7),
        ("{'a': 1}['a']", 1),
        ("x.num_layers", UNKNOWN),
        ("len(layer_plan(config))", 3),
        ("1 / 0", UNKNOWN),
        ("config.no_such_field", UNKNOWN),
    ],
)
def test_values_that_a_configuration_decides(text, value, corpus):
    facts = facts_of(tiny_config(corpus))
    function = ast.parse(f"def f(config, x, y):\n    return {text}").body[0]
    function.args.args[0].annotation = ast.Name("golfgpt.model.config:ModelConfig", ast.Load())
    for n in ast.walk(function):
        if isinstance(n, ast.Name) and n.id == "layer_plan":
            n.id = "golfgpt.model.plan:layer_plan"
    fold = Fold(facts, "a:f")
    found = fold.run(function).body[0].value
    if value is UNKNOWN:
        assert not isinstance(found, ast.Constant)
    else:
        assert ast.literal_eval(found) == value


def test_what_can_change_has_no_value(corpus):
    """A list that is filled later is not the empty list that it was."""
    function = ast.parse("def f(x):\n    found = []\n    found.append(x)\n    return found if found else None").body[0]
    folded = ast.unparse(Fold(facts_of(tiny_config(corpus)), "a:f").run(function))
    assert "return found if found else None" in folded


def test_code_is_counted_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = replace(toy("baseline", corpus), budget=replace(toy("baseline", corpus).budget, code_bytes=None))
    size = counted(config).budget.code_bytes
    assert 15_000 < size < 40_000
    monkeypatch.setattr("golfgpt.submit.bundle.source", None)
    assert counted(replace(config, seed=5)).budget.code_bytes == size  # kept, whatever the seed
    assert counted(counted(config)) == counted(config)
    with pytest.raises(TypeError):  # another configuration is measured
        counted(replace(config, model=replace(config.model, num_layers=4)))


def test_a_missing_minifier_is_an_error(corpus, monkeypatch):
    from golfgpt.errors import missing_package

    monkeypatch.setitem(sys.modules, "python_minifier", None)
    with pytest.raises(ImportError) as error:
        packed("x = 1")
    assert not isinstance(error.value, InputError)
    assert "golfgpt[train]" in missing_package(error.value)


@pytest.mark.long
def test_program_does_not_depend_on_the_order_of_sets(corpus, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from test_bundle import toy; "
        "from golfgpt.submit.bundle import source; "
        f"Path(sys.argv[1]).write_text(source(toy('frontier', Path({str(corpus)!r}))))"
    )
    root, texts = Path(__file__).parent.parent, []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], cwd=root, env=environment, check=True)
        texts.append((tmp_path / seed).read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "body",
    [
        "found = set(); found.add(x); return found if found else None",
        "found = [0] * 3; found[0] = x; return found[0]",
        "found = list(range(3)); found.append(x); return len(found)",
        "it = iter(x)\n    if it.read(4) != 5: raise ValueError\n    return it.read(4)",
    ],
)
def test_effects_stay(body, corpus):
    function = ast.parse(f"def f(x):\n    {body}").body[0]
    before = len(list(ast.walk(function)))
    folded = Fold(facts_of(tiny_config(corpus)), "a:f").run(function)
    calls = [n for n in ast.walk(folded) if isinstance(n, ast.Call)]
    assert not isinstance(folded.body[-1].value, ast.Constant)
    assert "read" not in body or len(calls) == 3
    assert len(list(ast.walk(folded))) > before - 12


def test_a_parameter_that_is_bound_again_has_no_value(corpus):
    function = ast.parse("def f(x=None):\n    if x is None:\n        x = 3\n    return x + 1").body[0]
    assert "return x + 1" in ast.unparse(Fold(facts_of(tiny_config(corpus)), "a:f").run(function))
