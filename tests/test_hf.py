"""The folder for transformers: the same logits, text and ids as golfgpt, in a process that has no golfgpt."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import latest_record, lively, tiny_config
from test_bpb import tokenizer as odd_tokenizer

import golfgpt
from golfgpt import recipes
from golfgpt.cli import main
from golfgpt.config import BigramConfig, ModelConfig, ParallelConfig, ValueEmbeddingConfig
from golfgpt.data.tokenizer import Tokenizer, train_tokenizer
from golfgpt.hf import source
from golfgpt.hf.export import model_card, sources, write_folder

transformers = pytest.importorskip("transformers")
WINDOW = 24
BASE = ModelConfig(vocab_size=384, num_layers=5, model_dim=48, num_heads=4, num_kv_heads=2, mlp_hidden=80)
ODD = ["", " ", "a  b", "   lead", "tail  ", "a\r\nb\n\n\tc", "f(x):\n    return x", "🙂 emoji é ß 中", "▁ and ▁▁x"]
ODD += ["<s> and </s> <unk> <0x41>", "The NASA iPhone McDonald", "\ue001 private \ue004", "\x00\ufeff\ufffd"]


def shrunk(recipe: str) -> ModelConfig:
    """A small model with all mechanisms of a recipe and all its layers."""
    c = recipes.get(recipe).config.model
    return replace(
        c, vocab_size=384, model_dim=8 * c.num_heads, mlp_hidden=48, rope_dims=min(c.rope_dims, 4),
        rope_reference_len=c.rope_reference_len and 16,
        bigram=replace(c.bigram, rows=min(c.bigram.rows, 50), dim=min(c.bigram.dim, 6)),
        value_embedding=replace(c.value_embedding, dim=min(c.value_embedding.dim, 6)),
    )  # fmt: skip


CONFIGS = {
    **{name: shrunk(name) for name in ("baseline", "int5-int6-swa", "xsa-ar-gptq", "loop-parallel", "frontier")},
    "latest record": latest_record(BASE),
    "merged": replace(
        BASE, tie_embeddings=False, parallel=ParallelConfig(kind="merged", first=3), attn_gate="window",
        bigram=BigramConfig(rows=50, dim=6), smear_gate="after_norm",
        value_embedding=ValueEmbeddingConfig(dim=6, layers=(1, 3)),
    ),
    "one lane": replace(
        BASE, parallel=ParallelConfig(kind="one_lane", first=2), attn_gate="dense", smear_gate="before_norm",
        bigram=BigramConfig(rows=50, dim=6, hash="linear"), xsa_layers=(0, 4),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _modules_of_exports(tmp_path_factory):
    """Where transformers copies the code of a folder that it loads."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


@functools.cache
def tokenizer(kind: str = "ours") -> Tokenizer:
    if kind == "case":
        text = "The lazy FOX jumps over iPhones. A Fox and a dog\r\n"
        return Tokenizer.from_bytes(train_tokenizer([text] * 30, 300, case_ops=True))
    return odd_tokenizer(kind)


def export(folder: Path, config: ModelConfig, kind: str = "ours"):
    """(golfgpt's model, transformers' of the folder)."""
    model = lively(config).eval()
    write_folder(folder, model, tokenizer(kind), window=WINDOW, card="")
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def ids_of(config: ModelConfig, *shape: int) -> torch.Tensor:
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    ids[:, shape[1] // 2] = 1  # a document that starts within
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_and_same_greedy_text(tmp_path, name):
    """Bit for bit, and generation past the window, with the cache that drops what is older."""
    golf, hf = export(tmp_path / "hf", CONFIGS[name])
    ids = ids_of(golf.config, 2, 30)
    with torch.no_grad():
        assert torch.equal(hf(ids).logits, golf.logits(golf(ids)))
    assert hf.dtype == torch.float32 and sum(p.numel() for p in hf.parameters()) == golf.num_parameters()
    for prompt in (ids[:1, :9], ids[:1]):  # shorter and longer than the window
        new = hf.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.size(1) :].tolist()
        wanted = golf.generate(prompt[0], 20, window=WINDOW, temperature=0, stop_id=1)
        assert new == wanted + [1] * (len(wanted) < 20)  # golfgpt leaves out the BOS that ends a text


def test_loads_without_golfgpt_and_offline(tmp_path):
    """In another process, where importing either package fails."""
    golf, _ = export(tmp_path / "hf", latest_record(BASE))
    ids = ids_of(golf.config, 1, 12)
    expected = golf.logits(golf(ids)).tolist()
    code = f"""
import sys
sys.modules["golfgpt"] = sys.modules["golfgpt_kernels"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "hf")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert model(torch.tensor({ids.tolist()})).logits.tolist() == {expected}
inputs = tokenizer("unlucky foxes", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=3)[0], skip_special_tokens=True)
assert text.startswith("unlucky foxes"), text
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
print(config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["384", "48", "5", "4"]


def test_refused_without_trust(tmp_path):
    write_folder(tmp_path / "hf", lively(BASE), tokenizer(), window=WINDOW, card="")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)


def test_beams_samples_and_generation_without_cache(tmp_path):
    """Beams reorder the cache; all of it, for with a wrong row another beam wins."""
    _, hf = export(tmp_path / "hf", CONFIGS["merged"])
    ids = ids_of(BASE, 2, 8)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    lengths = []
    hf.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    for beams in (1, 3):
        plain = hf.generate(ids, num_beams=beams, use_cache=False, **options)
        lengths.clear()
        assert torch.equal(hf.generate(ids, num_beams=beams, **options), plain)
        assert lengths == [8] + [1] * 9
    assert hf.generate(ids[:1], do_sample=True, num_return_sequences=2, max_new_tokens=4).shape[0] == 2


def test_padding_on_the_right_scores_and_all_other_padding_is_refused(tmp_path):
    golf, hf = export(tmp_path / "hf", latest_record(BASE))
    ids = ids_of(BASE, 2, 12)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 7:], left[1, :5] = 0, 0
    padded = hf(ids, attention_mask=right).logits
    torch.testing.assert_close(padded[1:, :7], hf(ids[1:, :7]).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="on the left of others"):
        hf(ids, attention_mask=left)
    for mask in (left, right):
        with pytest.raises(ValueError, match="equal length"):
            hf.generate(ids, attention_mask=mask, max_new_tokens=2)
    labels = ids.masked_fill(right == 0, -100)
    loss = hf(ids, attention_mask=right, labels=labels).loss
    wanted = golf.logits(golf(ids))[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(wanted, labels[:, 1:].flatten()))


def test_saved_again_and_in_half_precision(tmp_path):
    _, hf = export(tmp_path / "hf", CONFIGS["merged"])
    hf.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ids = ids_of(BASE, 1, 12)
    assert torch.equal(again(ids).logits, hf(ids).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.bfloat16
    )
    assert half.model.c_q.dtype == torch.bfloat16
    error = (half(ids).logits - hf(ids).logits).abs().mean() / hf(ids).logits.abs().mean()
    assert 0 < error < 0.05


@pytest.mark.parametrize("kind", ["ours", "stripping", "words", "spaceless", "case"])
def test_same_ids_and_same_text(tmp_path, kind):
    golf = tokenizer(kind)
    write_folder(tmp_path / "hf", lively(replace(BASE, vocab_size=golf.vocab_size)), golf, window=WINDOW, card="")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    texts = [*ODD, "The unlucky lazy foxes jumped over THE dog. " * 3]
    for text in texts:
        ids = golf.encode(text)
        assert hf.encode(text, add_special_tokens=False) == ids
        assert hf(text)["input_ids"] == [golf.bos_id, *ids]
        assert hf.decode(ids) == hf.decode([golf.bos_id, *ids], skip_special_tokens=True) == golf.decode(ids)
        assert hf.decode([golf.bos_id, *ids, golf.bos_id]) == f"<s>{golf.decode(ids)}<s>"
    assert hf.batch_decode([[golf.bos_id, *golf.encode(t)] for t in texts], skip_special_tokens=True) == [
        golf.decode(golf.encode(t)) for t in texts
    ]
    batch = hf(texts, padding=True, return_tensors="pt")
    lengths = [1 + len(golf.encode(text)) for text in texts]
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["attention_mask"][:, 0].all()
    assert (len(hf), hf.bos_token_id, hf.eos_token_id, hf.model_max_length) == (golf.vocab_size, 1, 1, WINDOW)
    hf.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "hf")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert [again.encode(text) for text in texts] == [hf.encode(text) for text in texts]
    with pytest.raises(ValueError, match="lone surrogate"):
        hf.encode("\ud800")


def test_files_name_nothing_of_golfgpt_and_do_not_depend_on_hashes():
    for text in sources().values():
        assert "import golfgpt" not in text and "from golfgpt" not in text
    code = "import json; from golfgpt.hf.export import sources; print(json.dumps(sources()))"
    root = Path(golfgpt.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout) == sources()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package that `standalone` takes for this distribution's."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "PACKAGES", ("fakegolf",))

    def write(**modules: str) -> None:
        (tmp_path / "fakegolf").mkdir()
        for name, text in {"__init__": "", **modules}.items():
            (tmp_path / "fakegolf" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    source.read_module.cache_clear()
    sys.modules.pop("fakegolf", None)


def test_what_a_file_takes_along(package):
    package(
        entry="from fakegolf import tools\nfrom fakegolf.passes import f as g\n\n"
        "def run():\n    return g() + tools.two()\n",
        passes="from fakegolf.defines import f\n\ndef unused():\n    return f\n",
        defines='"""About f."""\n\nimport math\n\n# a constant\nONE = 1\n"""Its docstring."""\n\ndef f():\n    return '
        "ONE + math.floor(0.5)\n\ndef f_ref():\n    return 10 * ONE\n",
        tools="def two():\n    return 2\n\ndef three():\n    return 3\n",
    )
    text, own = source.standalone("fakegolf.entry")
    names: dict = {}
    exec(text, names)
    assert names["run"]() == 12, "f_ref stands in for f"
    assert {d.name for d in own} == {"run", "f_ref", "ONE", "two"}
    assert "# a constant" in text and "Its docstring." in text and "import math" not in text and "three" not in text
    beside, _ = source.standalone(
        "fakegolf.entry", dict.fromkeys([source.Definition("fakegolf.tools", "two")], "other")
    )
    assert "from .other import two" in beside and "def two" not in beside


def test_two_definitions_of_one_name_are_an_error(package):
    package(
        a="from fakegolf.b import _x\n\ndef _helper():\n    pass\n\ndef f():\n    return _x() or _helper()\n",
        b="def _helper():\n    pass\n\ndef _x():\n    return _helper()\n",
    )
    with pytest.raises(AssertionError, match=r"two definitions named _helper; rename one"):
        source.standalone("fakegolf.a")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A finished run."""
    from golfgpt.train.train import train

    path = tmp_path_factory.mktemp("hf_run") / "run"
    train(tiny_config(corpus), path)
    return path


def test_command(run, capsys):
    assert main(["export", str(run), "--to", "hf", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(run / "hf") and facts["scored"]
    assert facts["files"] == {f.name: f.stat().st_size for f in (run / "hf").iterdir()}
    golf, _ = golfgpt.load(run)
    hf = transformers.AutoModelForCausalLM.from_pretrained(run / "hf", trust_remote_code=True)
    ids = ids_of(golf.config, 1, 64)
    assert torch.equal(hf(ids).logits, golf.logits(golf(ids)))
    assert hf.config.max_position_embeddings == 64
    card = (run / "hf" / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert card.startswith("---\nlicense: mit\n") and f"{result['score']['val_bpb']:.4f}" in card
    assert result["artifact_sha256"] in card and "4,000 tokens" in card
    assert main(["export", str(run), "--to", "hf"]) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "hf", "--overwrite", "--license", "cc-by-4.0"]) == 0
    assert "license: cc-by-4.0" in (run / "hf" / "README.md").read_text()
    assert main(["export", str(run), "--to", "hf", "--overwrite", "--out", str(run)]) == 3
    assert "is not an export" in capsys.readouterr().err
    assert golfgpt.load(run), "the run is unharmed"


def test_command_refuses_what_has_no_effect(run, tmp_path, capsys):
    for flag, value in (("--quant.bits", "5"), ("--source", "checkpoint")):
        assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf"), flag, value]) == 3
        assert "has no effect on --to hf" in capsys.readouterr().err


def test_no_score_for_other_weights(run, tmp_path, capsys):
    """result.json is about model.golf, and about no other file."""
    shutil.copytree(run, tmp_path / "run")
    assert (
        main(["export", str(run), "--to", "golf", "--out", str(tmp_path / "run" / "export.golf"), "--quant.bits", "4"])
        == 0
    )
    assert main(["export", str(tmp_path / "run" / "export.golf"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "have no score" in (tmp_path / "hf" / "README.md").read_text()


def test_card_without_a_run():
    card = model_card(lively(BASE), window=WINDOW, artifact_sha256="ab", result=None, license="mit")
    assert "SHA-256 ab" in card and "have no score" in card


@pytest.mark.slow
def test_lm_eval_scores_a_text_as_golfgpt_does(run, tmp_path, corpus):
    """loglikelihood_rolling has golfgpt's windows at stride = window: equal sums, where the text fills all windows."""
    pytest.importorskip("lm_eval", reason="lm-eval is not in the test extra")
    golf, tokens = golfgpt.load(run)
    text = (Path(os.__file__).read_text())[:4000]
    ids = tokens.encode(text)
    ids = next(ids[:n] for n in range(len(ids) // 64 * 64, 0, -64) if tokens.encode(tokens.decode(ids[:n])) == ids[:n])
    row = torch.tensor([1, *ids])
    with torch.no_grad():
        nats = 64 * sum(golf.loss(row[i : i + 64][None], row[i + 1 : i + 65][None]) for i in range(0, len(ids), 64))
    wanted = nats.item() / math.log(2) / len(tokens.decode(ids).encode())
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": tokens.decode(ids)}) + "\n")
    (tmp_path / "golf.yaml").write_text(
        f"task: golf\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/text.jsonl\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    model = f"pretrained={tmp_path / 'hf'},trust_remote_code=True,add_bos_token=False"
    options = [
        "--include_path",
        str(tmp_path),
        "--tasks",
        "golf",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "o"),
    ]
    argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, *options]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(next((tmp_path / "o").rglob("results*.json")).read_text())["results"]["golf"]
    assert found["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)
