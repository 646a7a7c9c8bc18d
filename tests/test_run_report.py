"""The page of `golfgpt report`, and `golfgpt watch`."""

from __future__ import annotations

import html.parser
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from models import metrics, tiny_config

from golfgpt.cli import main
from golfgpt.errors import InputError
from golfgpt.runs import listed_run, read_run
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.train import train
from golfgpt.watch import watch

pytest.importorskip("matplotlib")
jinja2 = pytest.importorskip("jinja2")

from golfgpt.report import page  # noqa: E402
from golfgpt.report.figures import Series, curves, distribution  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "img", "link", "input"}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """A folder with two runs of 13 steps that differ in width and seed."""
    folder, config = tmp_path_factory.mktemp("runs"), tiny_config(corpus)
    runtime = replace(config.runtime, val_every=6, log_every=5, threads=1)  # else each run chooses by a timing
    config = replace(config, schedule=replace(config.schedule, max_steps=13), runtime=runtime)
    train(config, folder / "narrow")
    train(replace(config, seed=7, model=replace(config.model, mlp_hidden=96)), folder / "wide")
    return folder


@pytest.fixture
def copies(runs, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


class Document(html.parser.HTMLParser):
    """Elements, ids, text by element and headings; raises AssertionError for a tag that closes nothing."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text, self.open = set(), [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())


def test_a_page_says_what_the_run_says(runs):
    run, (text, missing) = read_run(runs / "narrow"), page.render([runs / "narrow"])
    shown, score = Document(text), run.result["score"]
    assert not missing and "What is missing" not in shown.text
    for value in (f"{score['val_bpb']:.4f}", score["label"], run.result["dataset"], run.result["artifact_sha256"]):
        assert value in shown.text
    assert f"nothing ({score['checks']['comparisons']:,} comparisons)" in shown.text
    assert {"train", "export", "eval"} <= set(shown.text) and run.env["python"] in shown.text
    (tensors,) = metrics(runs / "narrow", "tensors")
    for tensor in tensors["tensors"]:
        assert tensor["name"] in shown.text and f"{tensor['relative_rms_error']:.2e}" in shown.text
    start = shown.text.index("schedule.max_steps")
    assert shown.text[start : start + 3] == ["schedule.max_steps", "20000", "13"]
    for title in ("Loss by step", "Loss by time", "Step times", "Learning rate", "Gradient norm"):
        assert ("aria-label", title) in shown.attributes


def test_a_score_of_a_part_of_the_text_is_labelled(copies):
    file = copies / "wide" / "result.json"
    result = json.loads(file.read_text())
    result["score"] |= {"partial": True, "label": "val_bpb (first 9 tokens)"}
    file.write_text(json.dumps(result))
    shown = Document(page.render([copies / "wide"])[0]).text
    assert (
        "val_bpb (first 9 tokens)" in shown[shown.index("part of the text") : shown.index("How the score was checked")]
    )


def test_a_page_stands_alone(runs):
    text, _ = page.render([runs / "narrow", runs / "wide"])
    shown = Document(text)
    assert not shown.tags & {"script", "link", "img", "iframe", "object"} and len(text.encode()) < 1_000_000
    assert not [value for name, value in shown.attributes if name in ("src", "href") and not value.startswith("#")]
    assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", text) and "@import" not in text
    assert len(shown.ids) == len(set(shown.ids))
    links = re.findall(r"(?:href=\"|url\()#([\w.-]+)", text)
    assert links and set(links) <= set(shown.ids)
    colours = re.findall(r"(?:fill|stroke|color): *(#\w+)", text[text.index("</style>") :])
    assert not colours, "a figure has the colours of the page, light or dark"


def test_several_runs_are_compared(runs):
    text, missing = page.render([runs / "narrow", runs / "wide"])
    shown = Document(text)
    assert not missing
    start = shown.text.index("Fields in which the runs differ")
    cells = [cell for cell in shown.text[start:] if cell][4:10]
    assert cells == ["model.mlp_hidden", "64", "96", "seed", "1337", "7"]
    assert [line for line in shown.text if line.startswith("no test, so not known") and "one seed" in line]
    assert shown.text.count("narrow") > 5 and "--own: var(--c1)" in text
    other = replace(read_run(runs / "wide"), result=None)
    assert page._comparisons([page.View(other, "wide", 0)]) == []


def test_runs_that_cannot_be_compared_are_shown(copies):
    file = copies / "wide" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset": "0" * 64}))
    assert "no comparison: " in page.render([copies / "narrow", copies / "wide"])[0]


def test_names_and_values_are_text(copies):
    hostile = copies / "<img src=x onerror=alert(1)>$x_"
    (copies / "narrow").rename(hostile)
    for name, change in {
        "env.json": {"command": ["<script>alert(2)</script>"], "<b>": "</table>"},
        "config.json": {"data": json.loads((hostile / "config.json").read_text())["data"] | {"path": '"><script>'}},
    }.items():
        (hostile / name).write_text(json.dumps(json.loads((hostile / name).read_text()) | change))
    for paths in ([hostile], [hostile, copies / "wide"]):
        text, _ = page.render(paths)
        shown = Document(text)
        assert not shown.tags & {"img", "script", "b\\"} and hostile.name in shown.text
        assert {"<script>alert(2)</script>", "</table>", '"><script>', "<b>"} <= set(shown.text)
        assert [value for name, value in shown.attributes if name == "aria-label" and "<img" in value]
        assert not [name for name, _ in shown.attributes if name.startswith("on")]


def test_a_run_without_a_result_is_shown_as_far_as_it_came(copies, capsys):
    run, out = copies / "narrow", copies / "page.html"
    for name in ("result.json", "model.golf", "env.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] in ("train", "val")][:5]
    (run / "metrics.jsonl").write_text("\n".join(kept) + '\n{"kind": "tr\n')
    assert main(["report", str(run), "-o", str(out), "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    what = [text.split(": ")[1] for text in missing]
    assert what == ["the score (there is no result.json)", "tensors", "environment"]
    assert f"it stopped at step 5; golfgpt train --resume {run} continues it" in missing[0]
    shown = Document(out.read_text())
    assert "Loss by step" in shown.text and "What is missing" in shown.text
    folder = RunFolder.open(run)
    assert "it is training, at step 5" in page.render([run])[0]
    folder.close()
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run), "-o", str(out)]) == 0
    assert "missing: " in capsys.readouterr().out and "Loss by step" not in Document(out.read_text()).text


def test_a_folder_without_a_run_is_an_error_and_the_old_page_stays(copies, capsys):
    out = copies / "page.html"
    out.write_text("old")
    for paths, error in (
        ([copies], "holds no run"),
        ([copies / "narrow", copies / "nothing"], "nothing holds no run"),
        ([], "expected a run to report, got none"),
        ([copies / "narrow", copies / "wide" / ".." / "narrow"], "a run stands twice"),
    ):
        assert main(["report", *map(str, paths), "-o", str(out)]) == 3
        assert error in capsys.readouterr().err
    config = (copies / "wide" / "config.json").read_bytes()
    assert main(["report", str(copies / "wide"), "-o", str(copies / "wide" / "config.json")]) == 3
    assert "expected a name that ends in .html" in capsys.readouterr().err
    assert (copies / "wide" / "config.json").read_bytes() == config
    (copies / "wide" / "result.json").write_text('{"score": {"val_bpb": "low"}}')
    assert main(["report", str(copies / "wide"), "-o", str(out)]) == 3
    assert "result.json: score.val_bpb = 'low', expected a number; restore" in capsys.readouterr().err
    assert main(["report", str(copies / "narrow"), "-o", str(copies / "no" / "page.html")]) == 3
    assert "there is no such folder" in capsys.readouterr().err
    assert out.read_text() == "old"


def test_runs_of_earlier_versions_open(copies):
    run, values = copies / "narrow", json.loads((copies / "narrow" / "config.json").read_text())
    del values["runtime"]["tracker"]
    (run / "config.json").write_text(json.dumps(values))
    assert read_run(run).config == read_run(copies / "wide").config.__class__(**vars(read_run(run).config))
    assert read_run(run).config.runtime.tracker == "none"
    rows = [
        row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] != "tensors"
    ]
    for row in rows:
        row.pop("step_seconds", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, missing = page.render([run])
    assert [line.split(": ")[1] for line in missing] == ["step times", "quantization errors"]
    assert "tok_emb" in Document(text).text, "sizes are in the header of model.golf"
    with pytest.raises(InputError, match="missing key runtime"):
        (run / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "runtime"}))
        read_run(run)


def test_over_the_budget(copies):
    run = copies / "narrow"
    result = json.loads((run / "result.json").read_text())
    over = result | {"margin_bytes": -5, "total_bytes": 16_000_005, "artifact_bytes": 15_940_005}
    (run / "result.json").write_text(json.dumps(over))
    text, _ = page.render([run])
    assert 'class="over"' in text and "over by 5" in text and 'class="over"' not in page.render([copies / "wide"])[0]


def test_score_with_test_time_training(copies):
    run = copies / "narrow"
    assert main([*f"eval {run} --data.path".split(), read_run(run).config.data.path, "--eval.ttt.kind", "sgd",
                 "--eval.ttt.sgd.chunk-tokens", "1024", "--eval.max-tokens", "3000"]) == 0  # fmt: skip
    adapted = read_run(run).result["adapted"]
    shown = Document(page.render([run])[0])
    for value in (adapted["label"], adapted["ledger_sha256"], f"{adapted['compliance']['scored_once']:,}"):
        assert value in shown.text


# Metrics


def test_each_step_has_a_line_of_metrics(runs):
    rows = metrics(runs / "narrow", "train")
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert all(row["step_seconds"] > 0 for row in rows)
    assert sum(row["step_seconds"] for row in rows) == pytest.approx(rows[-1]["train_seconds"], abs=0.01)
    printed = re.findall(r"^step:(\d+)/13 train_loss", (runs / "narrow" / "train.log").read_text(), re.MULTILINE)
    assert printed == [*map(str, range(1, 11)), "13"], "the log has some steps, as before"


def test_a_resume_takes_back_the_steps_after_its_checkpoint(runs, tmp_path):
    shutil.copy(runs / "narrow" / "config.json", tmp_path)
    rows = [{"kind": "train", "step": step, "run": 1} for step in (1, 2, 3, 4, 5)]
    rows += [{"kind": "resume", "step": 2}, {"kind": "train", "step": 3, "run": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(row["step"], row["run"]) for row in read_run(tmp_path).steps()] == [(1, 1), (2, 1), (3, 2)]


# Figures


def points(svg: str) -> list[tuple[float, float]]:
    """Corners of the first curve of a run."""
    path = next(p for p in re.findall(r'<path d="([^"]+)"[^>]*var\(--c0\)', svg))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    y = [1.0] * 20_000
    y[12_345] = 9.0
    plain = curves([Series(0, range(20_000), y)], "a", "step", "loss")
    spiky = curves([Series(0, range(20_000), y)], "b", "step", "norm", spikes=True)
    assert max(len(plain), len(spiky)) < 40_000
    assert len({y for _, y in points(spiky)}) > 1 and len({y for _, y in points(plain)}) == 1


def test_the_last_bin_has_the_slowest_steps():
    svg = distribution([Series(0, (), [10.0 + i % 10 for i in range(995)] + [5000.0] * 5)], "times", "ms")
    shown = [float(text.replace(",", "")) for text in re.findall(r">([\d.,]+)</text>", svg)]
    assert 10 in shown and max(shown) < 100, "five slow steps do not squeeze the others into one bin"


# Colours and layout


def colours() -> dict[str, dict[str, str]]:
    """The CSS variables of the two themes."""
    style = (Path(page.__file__).parent / "page.html").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return {name: dict(re.findall(r"--(\w+): (#\w{6})", b)) for name, b in zip(("light", "dark"), blocks, strict=True)}


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    """At least WCAG's 4.5 to 1 of text, which the colours of runs reach too."""
    names = colours()[theme]
    for ground in ("ground", "panel"):
        for name in ("ink", "soft", "bad", *(f"c{i}" for i in range(8))):
            low, high = sorted((luminance(names[name]), luminance(names[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def chromium(*args: str) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    done = subprocess.run([CHROMIUM, *flags, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_layout_in_chromium(runs, tmp_path, width):
    """Nothing is wider than the page, on a phone and on a desktop; the colours follow the system's theme."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "page.html").write_text(
        page.render([runs / "narrow", runs / "wide"])[0].replace("<details>", "<details open>")
    )
    (tmp_path / "probe.html").write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="o"></pre>'
        "<script>f.onload = () => { const d = f.contentDocument.documentElement;"
        "const box = (e) => e.getBoundingClientRect();"
        "const texts = [...d.querySelectorAll('svg text')].map((e) => box(e).height);"
        "o.textContent = JSON.stringify({wide: d.scrollWidth, seen: d.clientWidth, texts: Math.min(...texts),"
        "out: [...d.querySelectorAll('body *')].filter((e) => box(e).right > d.clientWidth + 1"
        " && !e.closest('.scroll') && !e.closest('svg')).map((e) => e.outerHTML.slice(0, 80))}) }</script>"
    )
    dom = chromium("--virtual-time-budget=5000", "--dump-dom", (tmp_path / "probe.html").as_uri())
    found = json.loads(html.unescape(re.search(r'<pre id="o">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["wide"] <= found["seen"] and found["out"] == []
    assert found["texts"] >= 9, "figures are readable"
    for theme, scheme in (("light", 1), ("dark", 0)):
        file = tmp_path / f"{theme}.png"
        chromium(f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},3000",
                 f"--screenshot={file}", (tmp_path / "page.html").as_uri())  # fmt: skip
        shot = image.open(file).convert("RGB")
        counts = {f"#{bytes(colour).hex()}": n for n, colour in shot.getcolors(shot.width * shot.height)}
        names = colours()[theme]
        assert shot.width == width and max(counts, key=counts.get) == names["ground"]
        assert all(counts.get(names[name], 0) > 50 for name in ("ink", "c0", "c1", "panel", "rule")), theme


# Watch


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watch_once(runs, copies, capsys):
    assert main(["watch", str(runs / "narrow"), "--once"]) == 0
    line, rows = capsys.readouterr().out, metrics(runs / "narrow", "train")
    score = read_run(runs / "narrow").result["score"]["val_bpb"]
    val = metrics(runs / "narrow", "val")[-1]
    assert line.startswith(f"step 13  mean loss {rows[-1]['loss_ema']:.4f}  {rows[-1]['bpb_ema']:.4f} bits/byte  ")
    for text in (f"last loss {rows[-1]['loss']:.4f}", f"val_bpb {val['val_bpb']:.4f} at step 12", f"{score:.4f}"):
        assert text in line
    assert " s left" not in line
    (copies / "narrow" / "metrics.jsonl").unlink()
    (copies / "narrow" / "result.json").unlink()
    assert main(["watch", str(copies / "narrow"), "--once", "--json"]) == 0
    out = capsys.readouterr()
    facts = json.loads(out.out)
    assert facts["step"] is None and facts["ended"].startswith("no process trains it") and "no step yet" in out.err
    assert main(["watch", str(copies / "nothing")]) == 3


def test_watch_follows_a_run_to_its_end(runs, copies):
    """Lines that another process adds, one of them in two writes."""
    run = copies / "narrow"
    file, lines = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"")
    written = []

    def trains():
        for line in lines:
            for part in (line[:20], line[20:]):
                with open(file, "ab") as out:
                    out.write(part)
                time.sleep(0.005)
            written.append(line)

    writer, out = threading.Thread(target=trains), io.StringIO()
    writer.start()
    facts = watch(run, once=False, out=out, every=0.001, quiet=0)
    writer.join()
    seen = [int(step) for step in re.findall(r"^step (\d+)", out.getvalue(), re.MULTILINE)]
    assert seen == sorted(seen) and {1, 7, 13} <= set(seen) and facts["step"] == 13 and facts["ended"] == "finished"
    assert facts["seconds_left"] == 0 and facts["score_bpb"] == read_run(run).result["score"]["val_bpb"]
    terminal = Terminal()
    assert watch(run, once=False, out=terminal) == facts
    assert "bits per byte" in terminal.getvalue() and "finished" in terminal.getvalue()


def test_watch_ends_where_a_run_stopped(copies):
    run = copies / "narrow"
    lines = (run / "metrics.jsonl").read_text().splitlines()[:3]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "end", "reason": "stopped by SIGTERM"}']) + "\n")
    out = io.StringIO()
    assert watch(run, once=False, out=out)["ended"] == listed_run(run).status == "finished"  # it was scored before
    assert "finished: val_bpb" in out.getvalue() and "a later resume ended: stopped by SIGTERM" in out.getvalue()
    over = [*lines, json.dumps({"kind": "result", **read_run(run).result}), '{"kind": "end", "reason": "over budget"}']
    (run / "metrics.jsonl").write_text("\n".join(over) + "\n")
    assert watch(run, once=False, out=(out := io.StringIO()))["ended"] == "over budget"
    assert "finished: val_bpb" in out.getvalue() and "  ended: over budget" in out.getvalue()
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "end", "reason": "stopped by SIGTERM"}']) + "\n")
    (run / "result.json").unlink()
    assert watch(run, once=False, out=out)["ended"] == "stopped by SIGTERM"
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")  # as a kill leaves it
    assert watch(run, once=False, out=out, every=0.001, silence=0)["ended"].startswith("no process trains it")
    (run / "env.json").write_text('{"command": ["golfgpt", "import", "final_model.pt"]}')
    assert "--data.path DIR scores it" in watch(run, once=True, out=out)["ended"]


def test_a_stopped_run_says_why(corpus, tmp_path, monkeypatch):
    from golfgpt.errors import Interrupted
    from golfgpt.train.step import TrainStep

    wait = TrainStep.wait

    def stop(self, pending):
        if pending.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return wait(self, pending)

    monkeypatch.setattr(TrainStep, "wait", stop)
    with pytest.raises(Interrupted):
        train(tiny_config(corpus), tmp_path / "run")
    (end,) = metrics(tmp_path / "run", "end")
    assert (
        "SIGTERM" in end["reason"] and watch(tmp_path / "run", once=True, out=io.StringIO())["ended"] == end["reason"]
    )


def test_ctrl_c_ends_watch_with_130(copies):
    run = copies / "narrow"
    (run / "metrics.jsonl").write_text("")
    folder = RunFolder.open(run)
    child = subprocess.Popen(
        [sys.executable, "-m", "golfgpt", "watch", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().startswith("no step yet")
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130 and "interrupted" in child.stderr.read()
    folder.close()
