"""Submissions: the packed file, folders from runs, their checks by reading, and a run of the packed program alone."""

from __future__ import annotations

import ast
import base64
import bz2
import gzip
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from models import SMALL, lively, tiny_config

from golfgpt.cli import main
from golfgpt.config import BudgetConfig, QuantConfig
from golfgpt.errors import BudgetError, InputError, VerificationError, missing_package
from golfgpt.quant import artifact
from golfgpt.runs import read_config, write_config
from golfgpt.submit import bundle, fold, isolated
from golfgpt.submit.check import Finding, check
from golfgpt.submit.folder import PROGRAM, About, pack
from golfgpt.submit.pack import _file, from_digits, imports, minified, packed, to_digits
from golfgpt.submit.unwrap import read_code

ABOUT = About(author="Ada", github_id="ada", name="A title", blurb="What it does.", track="track_non_record_16mb")
SOURCE = '''
from __future__ import annotations
import os, sys
from dataclasses import dataclass
from pathlib import Path
import torch

@dataclass
class Settings:
    """Not needed."""
    long_name: dict[str, int]
    seed: int = 42

def describe(settings: Settings) -> str:
    """Not needed either."""
    return f"{__name__} {Path(__file__).name} {settings.long_name} {settings.seed}"

print(describe(Settings({"'": 1, "\\\\": 2})))
'''


# The packed file


def test_packed_file_runs(tmp_path):
    file = tmp_path / PROGRAM
    file.write_bytes(packed(SOURCE.replace("import torch\n", "")))
    assert file.read_bytes().isascii() and file.read_bytes().count(b"\n") == 4
    done = subprocess.run([sys.executable, "-I", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == """__main__ train_gpt.py {"'": 1, '\\\\': 2} 42\n""", done.stderr


def test_large_programs_are_packed_by_lzma(tmp_path):
    """Other than the small ones, which zlib makes smaller."""
    source = Path(fold.__file__).read_text()
    (tmp_path / PROGRAM).write_bytes(packed(source))
    code = read_code(tmp_path)
    assert code.texts[1] == minified(source) and code.how == ["base 95", "lzma.decompress"]
    b85 = len(base64.b85encode(lzma.compress(minified(source).encode(), preset=9 | lzma.PRESET_EXTREME)))
    assert len(code.texts[0]) < b85


def test_brotli_only_where_the_program_needs_it(tmp_path):
    source = Path(bundle.__file__).read_text()
    with_brotli = f"import importlib\nf = lambda: importlib.import_module('brotli')\n{source}"
    (tmp_path / PROGRAM).write_bytes(packed(with_brotli))
    code = read_code(tmp_path)
    assert code.texts[1] == minified(with_brotli) and code.how == ["base 95", "brotli.decompress"]
    assert "brotli" in imports(with_brotli) and len(code.texts[0]) < len(packed(source))


@pytest.mark.parametrize("data", [b"\x01", b"hello, world", bytes(range(1, 256)) * 9, b"\xff" * 1000])
def test_digits(data):
    assert from_digits(to_digits(data), len(data)) == data and set(to_digits(data)) <= set(range(32, 127))


@pytest.mark.parametrize(("digits", "quotes"), [(b"ab'''cd", b'"""'), (b'ab"""c"', b"'''"), (b"'''\"\"\"c", None)])
def test_digits_that_end_a_literal(digits, quotes):
    file = _file("zlib", from_digits(digits, 7), "f(x)", kernels=False)
    assert file is None if quotes is None else quotes + digits + quotes in file
    assert file is None or ast.parse(file).body[2].iter.value == digits


def test_trees_parsed_later_are_clean():
    """python-minifier hangs its tree from ast.Load, which all trees of a process share."""
    minified(SOURCE)
    assert not [node for node in ast.walk(ast.parse(SOURCE)) if not node._fields and vars(node)]


def test_annotations_of_custom_ops_stay():
    """torch derives their schema from them."""
    source = "@torch.library.custom_op('a::b', mutates_args=())\ndef f(x: Tensor) -> Tensor: return x\n"
    assert "x:Tensor" in minified(source) and "->Tensor" in minified(source)
    assert "Tensor" not in minified(source.splitlines()[1])


def test_without_minifier(monkeypatch):
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    with pytest.raises(ImportError) as error:
        packed(SOURCE)
    assert missing_package(error.value) == 'python_minifier is not installed: pip install "golfgpt[train]"'


# Unpacking by reading

INNER = b"import torch\nprint('inner')\n"
RAW = base64.b85encode(lzma.compress(INNER, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])).decode()
WRAPPERS = {
    "b85 raw lzma": "import lzma as L,base64 as B\n"
    f"exec(L.decompress(B.b85decode({RAW!r}),format=L.FORMAT_RAW,filters=[{{'id':L.FILTER_LZMA2}}]))",
    "b64 zlib": f"import base64,zlib\nblob='{base64.b64encode(zlib.compress(INNER)).decode()}'\n"
    "exec(zlib.decompress(base64.b64decode(blob)).decode())",
    "hex gzip": f"from gzip import decompress as d\nexec(d(bytes.fromhex('{gzip.compress(INNER).hex()}')))",
    "dunder import": f"exec(__import__('bz2').decompress({bz2.compress(INNER)!r}))",
    "compile": f"exec(compile({INNER.decode()!r}, 'x', 'exec'), globals())",
    "in a function": f"def f():\n    exec({INNER!r})\nf()",
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers(wrapper, tmp_path):
    (tmp_path / PROGRAM).write_text(wrapper)
    code = read_code(tmp_path)
    assert [text.encode() for text in code.texts[1:]] == [INNER] and not code.unread
    (tmp_path / PROGRAM).write_text(f"exec({wrapper!r})")  # and twice
    assert [text.encode() for text in read_code(tmp_path).texts[2:]] == [INNER]


@pytest.mark.parametrize("compress", [zlib.compress, gzip.compress, bz2.compress, lzma.compress])
def test_bombs(compress, tmp_path):
    module = compress.__module__.lstrip("_") if compress is not zlib.compress else "zlib"
    bomb = compress(b" " * (64 * 2**20))
    (tmp_path / PROGRAM).write_text(f"import {module}\nexec({module}.decompress({bomb!r}))")
    with pytest.raises(InputError, match=r"holds more than"):
        read_code(tmp_path)


@pytest.mark.parametrize(
    "hostile",
    [
        "exec(open(__file__).read()[10:])",
        "exec(input())",
        "eval('1' + str(2))",
        "import marshal; exec(marshal.loads(b'x'))",
        "e = 'print(1)' if f() else ''\nexec(e)",
        "import runpy; runpy.run_path('other.txt')",
        "from triton.runtime.build import compile_module_from_src as c\nc(f(), 'x')",
        "import triton\ntriton.compile('a.ttir')",
        "import torch.utils._triton as t\nt.triton.compile('a.ttir')",
        "from triton.compiler import ASTSource as A\nA(f)",
        "from triton.backends import backends\nbackends['nvidia']",
        "import triton\ntriton._C.libtriton.ir.parse_mlir_module('a.ttir', f())",
        "import triton\ng = [triton]",
        "import torch\ntorch.cuda._compile_kernel('x', 'y')",
        "kernel._unsafe_update_src('x')",
        "kernel._src = 'x'",
        "setattr(kernel, 'raw_src', ['x'])",
        "getattr(kernel, '_unsafe_update_src')('x')",
        "getattr(f, '__globals__')",
    ],
)
def test_what_reading_cannot_tell_is_reported(hostile, tmp_path):
    (tmp_path / PROGRAM).write_text(hostile)
    assert read_code(tmp_path).unread


SHOWN = "import linecache\nt = 'pass'\nlinecache.cache['k'] = len(t), None, t.splitlines(True), 'k'\n"
SHOWN += "exec(compile(t, 'k', 'exec'))"
B64 = "import base64\nx = base64.b64decode(b'aW1wb3J0IHNvY2tldA==')\n"
CHEATS = {
    "bound again": B64 + "exec(x)\nx = 'pass'",
    "dead branch": "x = 'import soc'\nx += 'ket'\nif 0:\n    x = 'pass'\nexec(x)",
    "parameter": "x = 'pass'\ndef f(x):\n    exec(x)\nf('import soc' + 'ket')",
    "try": "x = y = 'import soc' + 'ket'\ntry:\n    1/0; x = 'pass'\nexcept: pass\nexec(x)",
    "except": "try: 1/0; x = 'pass'\nexcept: pass\nexec(x)",
    "walrus": "x = '1'\n(x := '__import__(\"socket\")')\neval(x)",
    "loop": "x = 'pass'\nfor x in ['import socket']: pass\nexec(x)",
    "del": "x = 'pass'\ndel x\nexec(x)",
    "global": "x = 'pass'\ndef f():\n    global x\n    x = 'import socket'\nf()\nexec(x)",
    "attribute of itself": "import __main__\nx = 'pass'\n__main__.x = 'import socket'\nexec(x)",
    "item of a list": "x = ['pass']\nx[0] = 'import socket'\nexec(x[0])",
    "globals": "x = 'pass'\nglobals()['x'] = 'import socket'\nexec(x)",
    "names as a dict": "import base64\nvars(base64)['b64decode'] = f",
    "names of the text": "exec('exec(bytes(b\"pass\"))', {'bytes': f})",
    "by what runs before": "x = 'pass'\nexec('x = 1')\nexec(x)",
    "by the text around": "def f():\n    global x\n    x = 'import socket'\nexec('x = \"pass\"\\nf()\\nexec(x)')",
    "digits twice": "n = 0\nfor c in b'abc':\n    n = n * 95 + c - 32\n    n = 5\nexec(n.to_bytes(3, 'big'))",
    "another decoder": "import base64\nbase64.b64decode = f\nexec(base64.b64decode(b'cGFzcw=='))",
    "decoder set by name": "import base64\nsetattr(base64, 'b64decode', f)\nexec(base64.b64decode(b'cGFzcw=='))",
    "another decoder around": "import base64\nbase64.b64decode = f\n"
    "exec('import base64\\nexec(base64.b64decode(b\"cGFzcw==\"))')",
    "another bytes": "def bytes(x): return b'import socket'\nexec(bytes(b'pass'))",
    "another exec": "def exec(x): pass\nexec('pass')",
    "alias": "e = exec\ne('import socket')",
    "map": "list(map(exec, ['import socket']))",
    "decorator": "@exec\n@(lambda f: 'import socket')\ndef f(): pass",
    "builtins": "__builtins__.exec('import ' + f())",
    "getattr": "import builtins\ngetattr(builtins, 'ex' + 'ec')('import socket')",
    "getattr by another name": "import torch\ng = getattr\ng(torch, 'lo' + 'ad')",
    "import alias": "from builtins import exec as e\nlist(map(e, ['import socket']))",
    "globals of a function": "(lambda: 0).__globals__['__builtins__']",
    "code of a function": "def f(): pass\nf.__code__ = f.__code__.replace(co_code=b'')",
    "FunctionType": "import types\ntypes.FunctionType(compile('import socket', '', 'exec'), {})()",
    "Unpickler": "import pickle, io\npickle.Unpickler(io.BytesIO(b'')).load()",
    "torch.load": "import torch\ntorch.load('model.golf', weights_only=False)",
    "numpy.load": "import numpy as np\nnp.load('model.golf', allow_pickle=True)",
    "ctypes": "import ctypes\nctypes.CDLL(None).system(b'curl')",
    "all names": "from os import *",
    "kernels of another text": SHOWN.replace("t.split", "'x'.split"),
    "kernels under another name": SHOWN.replace("'k', 'exec'", "'j', 'exec'"),
    "kernels bound again": SHOWN + "\nlinecache.cache['k'] = 1, None, ['x'], 'k'",
    "kernels bound inside": SHOWN.replace("pass", "import linecache\\nlinecache.cache.clear()"),
    "kernels through an import": SHOWN + "\nfrom linecache import cache as c\nc.clear()",
    "kernels through inspect": SHOWN + "\nimport inspect\ninspect.linecache.cache.clear()",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS.keys())
def test_cheats_that_execute_another_text(cheat, tmp_path):
    """Than the one that reading would find."""
    (tmp_path / PROGRAM).write_text(cheat)
    assert read_code(tmp_path).unread


def test_the_text_that_triton_reads(tmp_path):
    (tmp_path / PROGRAM).write_text(SHOWN)
    code = read_code(tmp_path)
    assert code.texts[1:] == ["pass"] and not code.unread


def test_a_decoder_that_another_file_replaced(tmp_path):
    (tmp_path / "helper.py").write_text("import base64\nbase64.b64decode = f")
    (tmp_path / PROGRAM).write_text("import helper, base64\nx = base64.b64decode(b'cGFzcw==')\nexec(x)")
    assert read_code(tmp_path).unread == ["b64decode, which another text binds"]


def test_variables_may_be_called_like_modules(tmp_path):
    text = "code = trace = requests = []\nrequests.append(code)\ndef f(types, profile): return [types, profile.x]\n"
    (tmp_path / PROGRAM).write_text(text)
    code = read_code(tmp_path)
    assert not code.unread and not code.network


def test_a_decoder_of_the_folder(tmp_path):
    (tmp_path / "base64.py").write_text("b64decode = lambda s: b'import socket'")
    (tmp_path / PROGRAM).write_text("import base64\nexec(base64.b64decode(b'cGFzcw=='))")
    assert read_code(tmp_path).unread


NETWORK = {
    "system": "import os\nos.system('curl')",
    "popen": "from os import popen as p\np('curl')",
    "execv": "import os\nf = os.execv",
    "spawn": "import os\ngetattr(os, 'spawnv')(0, 'curl', [])",
    "posix_spawn": "import shutil\nshutil.os.posix_spawn('curl', [], {})",
    "asyncio": "import asyncio\nasyncio.run(asyncio.open_connection('x', 80))",
    "streams": "from asyncio import streams\nstreams.StreamReader",
    "import of the text around": "import os as o\nexec('o.system(1)')",
    "import_module": "from importlib import import_module as im\nim('socket')",
    **{name: f"import {name}" for name in ("subprocess", "pty", "ssl", "ctypes", "multiprocessing")},
}


@pytest.mark.parametrize("program", NETWORK.values(), ids=NETWORK.keys())
def test_network_and_other_programs(program, sub):
    write(PROGRAM, program)(sub)
    assert "no network and no other programs" in failed(check(sub)).get("imports", "nothing")


READS = (
    "open('model' + '.golf', 'rb')", "k = 'model'; open(f'{k}.golf')", "from pathlib import Path; Path('.').glob('*')",
    "import glob; glob.glob('*.log')", "import os; os.listdir('.')", "from pathlib import Path; Path().iterdir()",
    "import torch; torch.load('model' + '.golf')", "import numpy as np; np.load(f())", "open('../other')",
    "import os; open(os.path.join(os.path.dirname(__file__), 'README.md'))", "o = open; o(f())",
)  # fmt: skip


@pytest.mark.parametrize("program", READS)
def test_reads_of_computed_names(program, sub):
    write(PROGRAM, f"\n{program}")(sub)
    found = {finding.check: finding for finding in check(sub)}["files read"]
    assert found.result == "not checked" and "line 2 of train_gpt.py: " in found.detail


def test_reads_of_given_names(tmp_path):
    text = "import os, sys\nfrom pathlib import Path\nopen('model.golf')\nopen(sys.argv[1])\n"
    text += "Path(os.environ['DATA_PATH']).glob('*.bin')\n(Path(os.environ.get('DATA_PATH', 'x')) / f()).read_bytes()"
    (tmp_path / PROGRAM).write_text(text)
    assert not read_code(tmp_path).reads


def test_readable_source_is_all_that_runs(sub):
    """The readable text must be what the wrapper executes, and the wrapper nothing more."""
    text, whole = minified(SOURCE), (sub / PROGRAM).read_text()
    for cheat in (f"print('else')\nif 0:\n    exec({text!r})", f"{whole}print('else')", f"print('else')\n{whole}"):
        write(PROGRAM, cheat)(sub)
        assert "readable source" in failed(check(sub)), cheat
    write(PROGRAM, text)(sub)
    assert "readable source" not in failed(check(sub))


def test_a_file_is_no_module(sub):
    """That a file has the name of a package does not make the package one of the folder."""
    write("requests.txt", "")(sub)
    write(PROGRAM, "import golfgpt\nopen('golfgpt.md')")(sub)
    write("golfgpt.md", "")(sub)
    found = failed(check(sub))
    assert "golfgpt" in found["imports"] and "requests.txt" in found["files"]


def test_damage_and_nesting(tmp_path):
    for text, words in (
        ("import zlib\nexec(zlib.decompress(b'nothing'))", "zlib.decompress refuses"),
        ("def f(:", "no Python"),
        ("x = " + "(" * 5000 + ")" * 5000, "no Python"),
        ("x = " + "-" * 100_000 + "1", "no Python"),
        ("\0", "no Python"),
        ("#" * 9 * 2**20, "expected at most"),
    ):
        (tmp_path / PROGRAM).write_text(text)
        with pytest.raises(InputError, match=words):
            read_code(tmp_path)


def test_nothing_is_executed(tmp_path):
    mark = tmp_path / "mark"
    text = f"open({str(mark)!r}, 'w')\n"
    (tmp_path / PROGRAM).write_text(f"{text}exec({text!r})\nimport helper\n")
    (tmp_path / "helper.py").write_text(text)
    code = read_code(tmp_path)
    assert len(code.texts) == 3 and "helper.py" in code.files and not mark.exists()


# Folders, from runs that nobody trained


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three run folders and `sub`, the submission of them, with a program of a few lines."""
    folder = tmp_path_factory.mktemp("made")
    for i, seed in enumerate((42, 1337, 2025)):
        path = folder / f"run{seed}"
        path.mkdir()
        write_config(path, replace(tiny_config(folder / "data"), seed=seed))
        state = lively(seed=seed).state_dict()
        blob = artifact.pack(state, model=SMALL, quant=QuantConfig(), tokenizer_sha256="0" * 64, seq_len=64)
        (path / "model.golf").write_bytes(blob)
        loss, bpb = 2.5 + i / 100 + 1 / 3, 1.2 + i / 1000 + 1 / 3
        log = LOG.format(seed=seed, loss=loss, bpb=bpb, bytes=len(blob))
        (path / "train.log").write_text(log)
        score = {"val_loss": loss, "val_bpb": bpb, "tokens": 999, "bytes": 2000, "label": "val_bpb", "dtype": "float32"}
        result = {
            "score": score,
            "adapted": None,
            "artifact_bytes": len(blob),
            "artifact_sha256": hashlib.sha256(blob).hexdigest(),
            "steps": 8,
            "seconds": {"train": 500.5, "calibrate": 0.0, "eval": 20.5},
            "dataset": "ab" * 32,
        }
        (path / "result.json").write_text(json.dumps(result))
        env = {"torch": "2.13.0+cpu", "golfgpt": "0.1.0", "gpus": [], "cpus": 2, "world_size": 1}
        env |= {"started": "2026-04-01T00:00:00Z", "command": ["golfgpt", "train", "--recipe", "baseline"]}
        (path / "env.json").write_text(json.dumps(env))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "source", lambda config: SOURCE)
        pack(runs_of(folder), folder / "sub", ABOUT)
    return folder


LOG = """\
train_loader:dataset:data/x train_shards:80 digest:abababababababab
val_loader:tokens:1000
model_params:1234 payload_bytes:5 forecast_bytes:6
train_batch_tokens:1024 train_seq_len:64 iterations:8 max_wallclock_seconds:600.000 seed:{seed}
step:7/8 train_loss:5.1234 train_time:400000ms step_avg:1.00ms
step:8/8 train_loss:5.0234 train_time:500500ms step_avg:1.00ms
final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:20500ms
final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
val_bpb {bpb:.4f}   val_loss {loss:.4f}   window 64 stride 48   float32   999 tokens, 2,000 bytes, 20.5 s
checked on 8 windows: probabilities sum to 1 within 8.9e-08; later tokens and tokens outside the window change nothing \
(1,331 comparisons); 1 to 128 tokens of context
phase       seconds  in the budget
train        500.5  yes
calibrate      0.0  yes
eval          20.5  no
"""


def runs_of(folder: Path) -> list[Path]:
    return [folder / f"run{seed}" for seed in (1337, 42, 2025)]


@pytest.fixture
def sub(made, tmp_path) -> Path:
    return shutil.copytree(made / "sub", tmp_path / "sub")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bundle, "source", lambda config: SOURCE)


def failed(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.detail for finding in findings if finding.result == "FAILED"}


def test_a_good_folder(sub, capsys):
    findings = check(sub)
    assert {finding.result for finding in findings} == {"ok"}, findings
    assert main(["submit", "check", str(sub)]) == 0
    assert capsys.readouterr().out.endswith("no check failed\n")
    assert main(["submit", "check", str(sub), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["findings"]) == len(findings)


def test_what_a_folder_says(made):
    sub = made / "sub"
    s = json.loads((sub / "submission.json").read_text())
    assert s["author"] == "Ada" and s["date"] == "2026-04-01" and s["seeds"] == [42, 1337, 2025]
    assert s["val_bpb"] == pytest.approx(1.201 + 1 / 3) and s["val_bpb_std"] == pytest.approx(0.001)
    assert s["artifact_seed"] == 42 and s["bytes_code"] == (sub / PROGRAM).stat().st_size
    assert s["bytes_total"] == s["bytes_code"] + max(r["artifact_bytes"] for r in s["seed_results"].values())
    assert (sub / "model.golf").read_bytes() == (made / "run42" / "model.golf").read_bytes()
    assert (sub / "train_seed2025.log").read_bytes() == (made / "run2025" / "train.log").read_bytes()
    assert (sub / "requirements.txt").read_text() == "torch==2.13.0\n"
    assert str(made) not in "".join(file.read_text() for file in sub.glob("*.md"))


def edit(file: str, old: str, new: str):
    def change(sub: Path) -> None:
        text = (sub / file).read_text()
        assert old in text
        (sub / file).write_text(text.replace(old, new))

    return change


def edit_json(change):
    def apply(sub: Path) -> None:
        value = json.loads((sub / "submission.json").read_text())
        change(value)
        (sub / "submission.json").write_text(json.dumps(value))

    return apply


def write(file: str, text: str):
    return lambda sub: (sub / file).write_text(text)


def changed_byte(sub: Path) -> None:
    blob = bytearray((sub / "model.golf").read_bytes())
    blob[-5] ^= 1
    (sub / "model.golf").write_bytes(blob)


def two_seeds(sub: Path) -> None:
    (sub / "train_seed42.log").unlink()
    (sub / "result_seed42.json").unlink()
    edit_json(lambda s: (s["seeds"].remove(42), s["seed_results"].pop("42")))(sub)


def set_seed(name, value, seed="1337"):
    return edit_json(lambda s: s["seed_results"][seed].update({name: value}))


BAD = {
    "no README": (lambda sub: (sub / "README.md").unlink(), "files", "there is no README.md"),
    "a link": (lambda sub: (sub / "more").symlink_to("/etc/passwd"), "files", "links: more"),
    "weights": (write("weights.bin", "x"), "files", "weights.bin: not of a submission"),
    "no JSON": (write("submission.json", "{"), "submission.json", "submission.json: Expecting"),
    "no author": (edit_json(lambda s: s.pop("author")), "submission.json", "'author' is a required property"),
    "no github_id": (edit_json(lambda s: s.update(github_id="a b")), "submission.json", "github_id: 'a b'"),
    "syntax": (write(PROGRAM, "def f(:"), "program", "train_gpt.py is no Python"),
    "hidden code": (write(PROGRAM, "exec(input())"), "program", "exec(input())"),
    "packed hidden code": (lambda sub: (sub / PROGRAM).write_bytes(packed("exec(input())")), "program", "(input())"),
    "network": (write(PROGRAM, "import urllib.request"), "imports", "urllib"),
    "own package": (write(PROGRAM, "import golfgpt"), "imports", "golfgpt"),
    "readable": (edit("train_gpt_readable.py", "seed: int = 42", "seed: int = 43"), "readable source", "is not what"),
    "helper": (lambda sub: (write("helper.py", "")(sub), write(PROGRAM, "import helper")(sub)), "code bytes", "helper"),
    "exec of a file": (write(PROGRAM, "exec(open('train_gpt_readable.py').read())"), "code bytes", "readable.py"),
    "code size": (edit_json(lambda s: s.update(bytes_code=s["bytes_code"] - 1)), "code bytes", "bytes_code is"),
    "artifact": (changed_byte, "artifact", "model.golf"),
    "artifact of another seed": (edit_json(lambda s: s.update(artifact_seed=2025)), "artifact", "artifact"),
    "total": (edit_json(lambda s: s.update(bytes_total=s["bytes_total"] - 1)), "bytes_total", "bytes_total is"),
    "two seeds of a record": (
        lambda sub: (two_seeds(sub), edit_json(lambda s: s.update(track="track_10min_16mb"))(sub)),
        "seeds",
        "2 seeds; a record needs 3, and the track is track_10min_16mb",
    ),
    "missing log": (lambda sub: (sub / "train_seed42.log").unlink(), "seeds", "no log of seed 42"),
    "log of another seed": (edit("train_seed42.log", "seed:42", "seed:43"), "seeds", "the log of seed 43"),
    "a seed left out": (
        lambda sub: write("train_seed7.log", LOG.format(seed=7, loss=3.0, bpb=2.0, bytes=1))(sub),
        "seeds",
        "a log of seed 7, which submission.json leaves out",
    ),
    "another configuration": (edit("train_seed42.log", "iterations:8", "iterations:9"), "seeds", "iterations:"),
    "shards": (edit("train_seed42.log", "train_shards:80", "train_shards:79"), "data", "train_shards"),
    "data": (edit_json(lambda s: s.update(dataset="cd" * 32)), "data", "submission.json of cdcd"),
    "score": (set_seed("val_bpb", 1.2 + 1e-3 + 1 / 3 - 1e-7), "scores", "no val_bpb 1.5343"),
    "loss": (set_seed("val_loss", 2.0), "scores", "no val_loss 2.0"),
    "steps": (set_seed("steps", 9), "scores", "ends at step 8"),
    "mean": (edit_json(lambda s: s.update(val_bpb=1.53)), "scores", "val_bpb, the mean over the seeds,"),
    "deviation": (edit_json(lambda s: s.update(val_bpb_std=0.0001)), "scores", "val_bpb_std"),
    "result": (edit("result_seed42.json", '"steps": 8', '"steps": 7'), "scores", "result_seed42.json has steps 7"),
    "part of the text": (edit("train_seed42.log", "999 tokens", "899 tokens"), "whole text", "[899, 999] tokens"),
    "labelled part": (edit_json(lambda s: s.update(score="val_bpb (first 9 tokens)")), "whole text", "of a part"),
    "long training": (edit("train_seed42.log", "500.5  yes", "600.5  yes"), "times", "train of seed 42 took 600.5 s"),
    "long evaluation": (edit("train_seed42.log", "20.5  no", "601.0  no"), "times", "eval of seed 42 took 601.0 s"),
    "time": (set_seed("train_time_s", 400.0), "times", "train_time_s of seed 1337 is 400.0"),
    "README mean": (edit("README.md", "**1.53433333**", "**1.5344**"), "README.md", "does not have val_bpb 1.5343"),
    "README seed": (edit("README.md", "1.53533333", "1.53433334"), "README.md", "1.53433334 for seed 2025"),
    "README bytes": (edit("README.md", " bytes: `train", "1 bytes: `train"), "README.md", "bytes_total"),
    "distribution": (
        edit("train_seed42.log", "within 8.9e-08", "within 1.0e-02"),
        "#1017 full distribution",
        "a log says 1.0e-02",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "name", "words"), BAD.values(), ids=BAD.keys())
def test_bad_folders(change, name, words, sub):
    change(sub)
    found = failed(check(sub))
    assert words in found.get(name, "nothing"), found
    assert main(["submit", "check", str(sub)]) == 6


def test_a_score_of_the_whole_text_after_one_of_a_part(sub):
    """As a run logs them that was resumed with --eval.max-tokens None: the last one counts."""
    log = sub / "train_seed42.log"
    whole, part = log.read_text(), "final_int8_zlib_roundtrip_exact val_loss:2.5 val_bpb_first_9_tokens:1.5\n"
    log.write_text(part + whole)
    assert not failed(check(sub))
    log.write_text(whole + part)
    assert "val_bpb_first_9_tokens" in failed(check(sub))["whole text"]


def test_an_artifact_over_the_cap(sub):
    total = json.loads((sub / "submission.json").read_text())["bytes_total"]
    assert not failed(check(sub, cap=total))
    assert failed(check(sub, cap=total - 1)) == {
        "bytes_total": f"{total:,} bytes, 1 over the cap of {total - 1:,}"
    }  # fmt: skip


def test_logs_without_checks_are_not_checked(sub):
    """As published scripts write them."""
    for log in sub.glob("*.log"):
        log.write_text(re.sub(r"(?m)^checked.*\n|^val_bpb.*\n", "", log.read_text()))
    results = {finding.check: finding.result for finding in check(sub)}
    unknown = {"whole text", "#1017 causal", "#1017 full distribution", "#1017 score first", "#1017 single pass"}
    assert {name for name, result in results.items() if result == "not checked"} == unknown
    assert set(results.values()) == {"ok", "not checked"}


# Bad runs


def test_no_folder(tmp_path, capsys):
    assert main(["submit", "check", str(tmp_path / "none")]) == 3
    assert "expected that of a submission" in capsys.readouterr().err
    assert main(["submit", "check", str(tmp_path)]) == 3
    assert "it has no README.md, submission.json and train_gpt.py" in capsys.readouterr().err
    assert main(["submit", "check", str(tmp_path), "--run"]) == 3
    assert "--data DIR" in capsys.readouterr().err


def test_a_run_is_no_submission_and_a_submission_no_run(made, capsys):
    assert main(["submit", "check", str(made / "run42")]) == 3
    assert f"it is a run, of which golfgpt submit pack {made / 'run42'} --out DIR" in capsys.readouterr().err
    assert main(["runs", "show", str(made / "sub")]) == 3
    assert f"it is a submission, which golfgpt submit check {made / 'sub'} checks" in capsys.readouterr().err


@pytest.fixture
def runs(made, tmp_path) -> list[Path]:
    return [shutil.copytree(path, tmp_path / path.name) for path in runs_of(made)]


def refused(runs: list[Path], error: type[Exception], words: str, **options) -> None:
    """`pack` raises, and leaves the runs and everything else as they were."""
    folder = runs[0].parent
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(error, match=words):
        pack(runs, folder / "sub", ABOUT, **options)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert options or not (folder / "sub").exists()


def test_what_only_the_author_knows(runs, short):
    about = {"an empty author": {"author": " "}, "another track": {"track": "foo"}}
    for fields, message in zip(about.values(), ("--author is empty", "--track is foo; expected track_"), strict=True):
        with pytest.raises(InputError, match=message):
            pack(runs, runs[0].parent / "sub", replace(ABOUT, **fields))
    with pytest.raises(InputError, match=r"golfgpt submit pack RUN"):
        pack([], runs[0].parent / "sub", ABOUT)


def test_a_run_without_a_result(runs, short):
    (runs[1] / "result.json").unlink()
    refused(runs, InputError, "run42 has no result.json: golfgpt train --resume")


def test_a_run_without_a_log(runs, short):
    (runs[1] / "train.log").unlink()
    refused(runs, InputError, "needs the log of every seed")


def test_an_artifact_that_changed(runs, short):
    changed_byte(runs[2])
    refused(runs, VerificationError, "run2025/model.golf has the SHA-256 .* changed since it was scored")


def test_runs_of_two_configurations(runs, short):
    config = tiny_config(runs[0].parent / "data")
    write_config(runs[0], replace(config, seed=1337, optim=replace(config.optim, matrix_lr=0.5)))
    refused(runs, InputError, r"got several: optim.matrix_lr is 0.04 in .*run42, .*run2025 and 0.5 in .*run1337$")


def test_a_score_of_a_part_of_the_text_is_not_packed(runs, short):
    for run in runs[:2]:
        result = json.loads((run / "result.json").read_text())
        result["score"] |= {"partial": True, "label": "val_bpb (first 9 tokens)"}
        (run / "result.json").write_text(json.dumps(result))
    refused(runs, InputError, r"run42 is val_bpb \(first 9 tokens\).*golfgpt train --resume .*run42 --eval")
    refused(runs, InputError, r"--resume .*run1337 --eval")
    config = tiny_config(runs[0].parent / "data")
    write_config(runs[0], replace(config, seed=1337, optim=replace(config.optim, matrix_lr=0.5)))
    refused(runs, InputError, "got several: optim.matrix_lr")  # before a long evaluation


def test_a_score_that_golfgpt_eval_added_is_no_part_of_a_submission(runs, short):
    """Pack and check follow one rule: the runs were made without test-time training, and so is the program."""
    result = json.loads((runs[0] / "result.json").read_text())
    adapted = result["score"] | {"val_loss": 9.5, "val_bpb": 5.5, "partial": True, "label": "val_bpb (adapted: sgd)"}
    (runs[0] / "result.json").write_text(json.dumps(result | {"adapted": adapted}))
    packed = pack(runs, runs[0].parent / "sub", ABOUT)
    assert any("the score val_bpb (adapted: sgd) of golfgpt eval, which is left out" in note for note in packed.notes)
    assert not failed(check(runs[0].parent / "sub"))
    assert json.loads((runs[0] / "result.json").read_text())["adapted"] == adapted


def test_a_run_given_twice(runs, short):
    refused([*runs, runs[0]], InputError, "both have seed 1337")


def test_over_the_cap(runs, short):
    for run in runs:
        config = replace(tiny_config(run.parent / "data"), seed=int(run.name[3:]))
        write_config(run, replace(config, budget=BudgetConfig(artifact_bytes=20_000, code_bytes=1000)))
    refused(runs, BudgetError, r"largest artifact .* budget.artifact_bytes is 20,000: nothing was written")


def test_a_full_disk(runs, short, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("golfgpt.submit.folder.shutil.copyfile", full)
    refused(runs, OSError, "No space left")


def test_overwrite(runs, short):
    out = runs[0].parent / "sub"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(runs, InputError, "sub exists; choose another --out", overwrite=False)
    refused(runs, InputError, "no folder of a submission", overwrite=True)
    shutil.rmtree(out)
    pack(runs, out, ABOUT)
    (out / "README.md").write_text("old")
    pack(runs, out, replace(ABOUT, name="Second"), overwrite=True)
    assert (out / "README.md").read_text().startswith("# Second\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["run1337", "run2025", "run42", "sub"]


def test_notes(runs, short, capsys):
    """Of fewer seeds than a record has, and of seeds that were left out; the check has the same opinion of both."""
    options = ["--out", str(runs[0].parent / "sub"), "--author", "Ada", "--github-id", "ada", "--name", "Title"]
    assert main(["submit", "pack", *map(str, runs[:2]), *options]) == 0
    out = capsys.readouterr().out
    assert "note: 2 seeds: a record needs 3" in out and "run2025 (seed 2025, finished) has this configuration" in out
    assert not failed(check(runs[0].parent / "sub"))
    shutil.rmtree(runs[0].parent / "sub")
    assert main(["submit", "pack", *map(str, runs[:2]), *options, "--track", "track_10min_16mb"]) == 3
    assert "2 seeds for the track track_10min_16mb, which needs 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("used", "asked", "packed_with"), [("mlp,loss", True, "mlp,loss"), ("mlp,loss", False, "eager")]
)
def test_kernels(used, asked, packed_with, runs, monkeypatch):
    """The program has those of the runs if they are asked for, and says so if it lacks them."""
    seen = []
    monkeypatch.setattr(bundle, "source", lambda config: seen.append(config.runtime.kernels) or SOURCE)
    for run in runs:
        config = read_config(run)
        write_config(run, replace(config, runtime=replace(config.runtime, kernels=used)))
    notes = pack(runs, runs[0].parent / "sub", ABOUT, kernels=asked).notes
    assert seen == [packed_with] and any(used in note for note in notes) != asked


def test_kernels_that_no_run_used(runs, short):
    refused(runs, InputError, "used no kernels.*leave out --kernels", kernels=True)


def test_an_author_is_asked_for(runs, capsys):
    assert main(["submit", "pack", str(runs[0]), "--out", "sub", "--github-id", "ada", "--name", "Title"]) == 2
    assert "--author" in capsys.readouterr().err


# Running


def alone(folder: Path, program: str, tmp_path: Path) -> dict[str, str]:
    write(PROGRAM, program)(folder)
    return {
        finding.check: f"{finding.result} {finding.detail}" for finding in isolated.run(folder, tmp_path, seconds=30)
    }


GOOD = """
import os, sys
from pathlib import Path
if len(sys.argv) > 1:
    print("final_roundtrip_exact val_loss:2.0 val_bpb:1.53333333")
else:
    for step in range(int(os.environ["ITERATIONS"])):
        print(f"step:{step + 1}/8 train_loss:5.0 train_time:1ms")
    Path("model.golf").touch()
"""


def test_run(sub, tmp_path):
    found = alone(sub, GOOD, tmp_path)
    assert found["--run trains"].startswith("ok 3 steps")
    assert found["--run scores"] == "ok model.golf scores 1.53333333, its run scored 1.53333333"
    assert (sub / "model.golf").stat().st_size, "the folder itself is as it was"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import golfgpt", "golfgpt is blocked"),
        ("import golfgpt_kernels.linear", "golfgpt_kernels is blocked"),
        ("import tyro", "tyro is blocked"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 2)", "exit code 1"),
        (
            "import os; assert not os.listdir(os.environ['HOME']) and 'PYTHONPATH' not in os.environ; 1/0",
            "ZeroDivision",
        ),
        ("print('nothing'); sys.exit()", "nothing"),
    ],
)
def test_run_catches(line, words, sub, tmp_path):
    found = alone(sub, GOOD.replace("if len", f"{line}\nif len", 1), tmp_path)
    for name in ("--run trains", "--run scores"):
        assert found[name].startswith("FAILED") and words in found[name], found


def test_run_without_namespaces(sub, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "_namespace", lambda: ([], "no network namespace is permitted here"))
    found = alone(sub, "import socket\nsocket.socket()", tmp_path)
    assert found["isolation"].startswith("not checked") and "only Python's sockets" in found["isolation"]
    assert "the network is blocked" in found["--run trains"]
    assert alone(sub, f"import ssl\n{GOOD}", tmp_path)["--run trains"].startswith("ok")


def test_another_score_and_another_loss(sub, tmp_path):
    edit("train_seed42.log", "step:7/8 train_loss:5.1234", "step:1/8 train_loss:5.1")(sub)
    edit("train_seed42.log", "step:8/8", "step:2/8 train_loss:5.0\nstep:3/8 train_loss:5.0\nstep:8/8")(sub)
    found = alone(sub, GOOD.replace("1.53333333", "1.53333500"), tmp_path)
    assert "the loss of step 1 is 5.0, that of the log of seed 42 5.1" in found["--run trains"]
    assert "model.golf scores 1.53333500" in found["--run scores"] and "1.53333333" in found["--run scores"]


def test_a_program_that_does_not_end(sub, tmp_path):
    write(PROGRAM, "import time; time.sleep(60)")(sub)
    findings = failed(isolated.run(sub, tmp_path, seconds=1))
    assert "did not end within 1 s" in findings["--run trains"]


@pytest.mark.slow
def test_a_real_run(corpus, tmp_path, capsys):
    """Train, pack, check, and run the packed program alone: losses and score are those of the run."""
    from golfgpt.train.train import train

    config = tiny_config(corpus)
    runtime = replace(config.runtime, threads=1, kernels="eager", compile="off", attention="flash", graph="off")
    config = replace(config, runtime=runtime, eval=replace(config.eval, max_tokens=None, stride=None))
    train(config, tmp_path / "run")
    out = tmp_path / "sub"
    options = ["--out", str(out), "--author", "Ada", "--github-id", "ada", "--name", "Title"]
    assert main(["submit", "pack", str(tmp_path / "run"), *options]) == 0
    capsys.readouterr()
    assert main(["submit", "check", str(out), "--run", "--data", str(corpus), "--json"]) == 0
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert {name for name, f in found.items() if f["result"] == "FAILED"} == set(), found
    assert found["--run trains"]["detail"].endswith("equal to the log's") and found["--run scores"]["result"] == "ok"
