"""Benchmark results as Markdown tables, and a picture of the training steps.

    python -m bench.report               tables to stdout, and bench/results/step.png
    python -m bench.report --readme      and into kernels/README.md, between <!-- bench:begin --> and <!-- bench:end -->
    python -m bench.report --adopt FILE  copy a result's entries into measured.json, from which impl="auto" decides, or
                                         the baseline's step into steps.json, with which `golfgpt doctor` compares

A result file, bench/results/gpu-<gpu>-torch<version>-triton<version>.json, is written by `python -m bench.kernels`:

    gpu, sm, torch, triton, cuda, driver, date, command
    roofs      {"tflops", "gbps"} as bench/roofs.py measured them in that process
    entries    one per case; the fields are in golfgpt_kernels/tuning.py, and here also flops and bytes

floor = max(flops / roof, bytes / roof) of the case's flops and bytes. TFLOP/s, GB/s and the share of the roof (floor /
time) are the kernel's. A kernel that failed its check has no figures, and "auto" never picks it. Training steps are
step-*.json, written and described by bench/step.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from golfgpt_kernels import _dispatch
from golfgpt_kernels._dispatch import slug
from golfgpt_kernels.tuning import QUICK, decides, merged, write_json

from bench.roofs import floor_us

RESULTS = Path(__file__).parent / "results"
KERNELS = Path(__file__).parent.parent / "kernels"
README = KERNELS / "README.md"
MEASURED = KERNELS / "golfgpt_kernels" / "measured.json"
STEPS = KERNELS.parent / "golfgpt" / "doctor" / "steps.json"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOTHING = "On a GPU: not yet measured."
ADOPTED = (
    "op", "sm", "gpu", "dtype", "rows", "shape", "direction", "us", "correct", "torch", "triton", "date", "command",
)  # fmt: skip


ASKED = {case.op for case in QUICK}  # by impl="auto"


def result_name(environment: dict) -> str:
    return f"gpu-{slug(environment)}.json"


def step_result_name(result: dict) -> str:
    return f"{'small-' if result['small'] else ''}step-{slug(result)}.json"


def read_results(folder: Path = RESULTS, pattern: str = "gpu-*.json") -> list[dict]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(pattern))]


def table(result: dict) -> str:
    roofs = result["roofs"]
    lines = [
        f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}, {result['date']}: {result['command']}"
    ]
    if roofs:
        lines[0] += f". Roofs: {roofs['tflops']:.0f} TFLOP/s, {roofs['gbps']:.0f} GB/s."
    header = (
        "op", "shape", "direction", "eager us", "compile us", "golfgpt us", "floor us",
        "golfgpt / compile", "TFLOP/s", "GB/s", "of roof", "auto",
    )  # fmt: skip
    lines += ["", _line(header), "|" + "---|" * 3 + "---:|" * 8 + "---|"]
    lines += [_line(_cells(entry, result)) for entry in result["entries"]]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(entry: dict, result: dict) -> list[str]:
    us, failed = entry["us"], entry["failed"].get("triton")
    kernel = us.get("triton") if entry["correct"] else None
    floor = _floor(entry, result)
    golfgpt = "-" if failed is None else "failed"
    return [
        entry["op"],
        " x ".join(f"{size:,}" for size in entry["shape"]),
        entry["direction"],
        *(f"{us[column]:,.1f}" if column in us else "-" for column in ("eager", "compile")),
        f"{kernel:,.1f}" if kernel else golfgpt,
        f"{floor:,.1f}" if floor else "-",
        f"{kernel / us['compile']:.2f}" if kernel and "compile" in us else "-",
        f"{entry['flops'] / kernel / 1e6:,.0f}" if kernel else "-",
        f"{entry['bytes'] / kernel / 1e3:,.0f}" if kernel else "-",
        f"{floor / kernel:.0%}" if kernel and floor else "-",
        choice(entry["op"], result["entries"]),
    ]


BOTH = "forward+backward"
WANTED = {
    ("relu2_mlp", BOTH): {"torch.compile": 0.75, "floor": 1.54},  # 1.54: 65 % of the roof
    ("fake_quant_linear", BOTH): {"the plain linear layer": 1.05},
    ("codes_linear", BOTH): {"the plain linear layer": 1.05},
    ("softcap_cross_entropy", "forward"): {"torch.compile": 0.6},
    ("softcap_cross_entropy", BOTH): {"torch.compile": 0.85},
    ("fake_quantize_rows", "forward"): {"floor": 2},  # the floor is to read fp32 and write bf16 once
}
"""Of an op and direction: {what its kernel is compared with: the largest ratio of their times}."""


def figures(result: dict) -> str:
    """The ratios that this project wants to reach, each reached or missed, where both sides were measured."""
    plain = {(*e["shape"], e["direction"]): e["us"] for e in result["entries"] if e["op"] == "linear"}
    lines = []
    for entry in result["entries"]:
        us = entry["us"]
        against = {"torch.compile": us.get("compile"), "floor": _floor(entry, result)}
        against["the plain linear layer"] = min(
            plain.get((*entry["shape"], entry["direction"]), {}).values(), default=None
        )
        for what, most in WANTED.get((entry["op"], entry["direction"]), {}).items():
            if entry["correct"] and against[what]:
                ratio = us["triton"] / against[what]
                name = f"{entry['op']} {' x '.join(map(str, entry['shape']))} {entry['direction']}"
                verdict = "reached" if ratio <= most else "missed"
                lines.append(f"- {name} / {what}: wanted at most {most}; {ratio:.2f}, {verdict}")
    return "\n".join(lines)


def _floor(entry: dict, result: dict) -> float | None:
    return floor_us(entry["flops"], entry["bytes"], result["roofs"]) if result["roofs"] else None


def choice(op: str, entries: Sequence[dict]) -> str:
    """What impl="auto" would choose by these entries alone; empty for an op that it does not choose for."""
    if op not in ASKED:
        return ""
    measured = [entry for entry in entries if entry["op"] == op and decides(entry)]
    return "triton" if measured and all(_dispatch.against_best(entry) < 1 for entry in measured) else "eager"


# ---- training steps

STEP_PHASES = ("forward", "backward", "optimizer", "data", "rest")
STEP_FORMS = {
    "eager": "eager", "published": "published", "published_all": "published, all matrices", "golfgpt": "golfgpt",
}  # fmt: skip


def step_table(result: dict) -> str:
    lines = [
        f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}, {result['dtype']}, {result['date']}"
    ]
    if result["small"]:
        lines[0] += ": tiny models, which say nothing about speed"
    header = ("recipe", "form", "ms", *STEP_PHASES, "golfgpt / form", "tokens/s", "MFU", "of floor", "peak GB")
    lines += ["", _line(header), "|" + "---|" * 2 + "---:|" * (len(header) - 2)]
    for entry in result["entries"]:
        for name, label in STEP_FORMS.items():
            if name in entry["forms"]:
                lines.append(_line([entry["recipe"], label, *_step_cells(entry, name)]))
    return "\n".join(lines)


def _step_cells(entry: dict, name: str) -> list[str]:
    form, ratio = entry["forms"][name], entry["ratios"].get(name, {}).get("step")
    return [
        *(f"{form['ms'][phase]:,.2f}" for phase in ("step", *STEP_PHASES)),
        f"{ratio:.2f}" if ratio else "-",
        f"{form['tokens_per_second']:,}",
        f"{form['mfu']:.1%}",
        f"{form['of_floor']:.0%}" if form["of_floor"] else "-",
        f"{form['peak_bytes'] / 1e9:.1f}" if form["peak_bytes"] else "-",
    ]


def step_figures(result: dict) -> str:
    """What this project wants of a training step, each reached, missed or not yet measured, and what went wrong."""
    lines = []

    def line(recipe: str, what: str, value: float | None, bound: float, at_least: bool = False) -> None:
        verdict = "not yet measured"
        if value is not None and not result["small"]:
            reached = value >= bound if at_least else value <= bound
            verdict = f"{value:.3g}, {'reached' if reached else 'missed'}"
        lines.append(f"- {recipe}: {what}, wanted at {'least' if at_least else 'most'} {bound}; {verdict}")

    for entry in result["entries"]:
        recipe, ours, ratios = entry["recipe"], entry["forms"].get("golfgpt", {}), entry["ratios"].get("published", {})
        line(recipe, "ms golfgpt / published", ratios.get("step"), 0.60)
        line(recipe, "MFU", ours.get("mfu"), 0.38, at_least=True)
        line(recipe, "peak memory golfgpt / published", ratios.get("peak_bytes"), 0.8)
        line(recipe, "optimizer's share", entry["optimizer_share"], 0.03)
        stops = entry["synchronizations"]
        line(recipe, "host synchronizations", None if stops is None else len(stops), 0)
        if stops:
            lines[-1] += f" ({', '.join(stops)})"
        if entry["fake_quant_ms"] is not None:
            line(recipe, "fake quantization's share", entry["fake_quant_share"], 0.01)
        if curve := entry.get("curve"):
            ratio = curve["difference"] / curve["spread"]
            what = f"losses of {curve['steps']} steps ({curve['tokens']}): distance to published / between seeds"
            line(recipe, what, ratio, 1.0)
        differences = ", ".join(f"{STEP_FORMS[name]} {value:.1e}" for name, value in entry["loss_difference"].items())
        work = {None: "not compared", True: "the same", False: "NOT the same"}[entry["same_work"]]
        lines.append(f"- {recipe}: losses {work} ({differences or 'no other form'}, relative to golfgpt's)")
        if chosen := entry["execution"]:
            lines.append(f"- {recipe}: chosen {', '.join(f'{k} {v}' for k, v in chosen.items() if k != 'trials')}")
            lines += [f"  - {trial}" for trial in chosen["trials"]]
        lines += [f"- {recipe}: {name} failed: {why}" for name, why in entry["failed"].items()]
    return "\n".join(lines)


def step_picture(results: Sequence[dict], file: Path) -> None:
    """Milliseconds of each phase, stacked, a bar per recipe and form; the floor is a line. One panel per result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(sum(len(entry["forms"]) for entry in result["entries"]) for result in results)
    figure, panels = pyplot.subplots(1, len(results), figsize=(9 * len(results), 1.5 + 0.4 * rows), squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        bars = [(e, name) for e in result["entries"] for name in STEP_FORMS if name in e["forms"]]
        left = [0.0] * len(bars)
        for phase in STEP_PHASES:
            widths = [entry["forms"][name]["ms"][phase] for entry, name in bars]
            panel.barh(range(len(bars)), widths, left=left, label=phase)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, (entry, _) in enumerate(bars):
            if entry["floor_ms"]:
                label = "floor" if row == 0 else None
                panel.vlines(entry["floor_ms"], row - 0.4, row + 0.4, color="black", label=label)
        panel.set_yticks(range(len(bars)), [f"{entry['recipe']}, {STEP_FORMS[name]}" for entry, name in bars])
        panel.invert_yaxis()
        tiny = ", tiny models" if result["small"] else ""
        panel.set(xlabel="ms per step", title=f"{result['gpu']}, torch {result['torch']}, {result['date']}{tiny}")
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def insert(text: str, readme: Path) -> None:
    page = readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{readme} has no {BEGIN} followed by {END}, each once")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def adopt(file: Path, measured: Path = MEASURED) -> int:
    """Entries that "auto" can decide by; what was measured before for the same is replaced."""
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    entries = [{name: entry[name] for name in ADOPTED} for entry in entries if entry["op"] in ASKED and decides(entry)]
    write_json(measured, merged(_dispatch.read_entries(measured), entries))
    return len(entries)


def adopt_step(file: Path, steps: Path = STEPS) -> None:
    """The baseline's step; what was measured before on that kind of GPU with that torch is replaced."""
    result = json.loads(file.read_text(encoding="utf-8"))
    forms = next((entry["forms"] for entry in result["entries"] if entry["recipe"] == "baseline"), {})
    if result["small"] or not {"eager", "golfgpt"} <= forms.keys():
        raise SystemExit(f"{file} has no step of the baseline at full size, eager and golfgpt's")
    step = {name: result[name] for name in ("gpu", "torch", "date")}
    step["eager"] = forms["eager"]["ms"]["forward"] + forms["eager"]["ms"]["backward"]
    step["golfgpt"] = forms["golfgpt"]["ms"]["step"]
    others = [e for e in _dispatch.read_entries(steps) if (e["gpu"], e["torch"]) != (step["gpu"], step["torch"])]
    write_json(steps, [*others, step])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results and of step.png")
    parser.add_argument("--readme", nargs="?", type=Path, const=README, help="file with the two markers")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="a result file, gpu-*.json or step-*.json")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="where --adopt copies kernels to")
    parser.add_argument("--steps", type=Path, default=STEPS, help="where --adopt copies steps to")
    options = parser.parse_args(arguments)
    if options.adopt and options.adopt.name.startswith("step-"):
        adopt_step(options.adopt, options.steps)
        print(f"The baseline's step of {options.adopt} is now in {options.steps}")
        return
    if options.adopt:
        print(f"{adopt(options.adopt, options.measured)} entries of {options.adopt} are now in {options.measured}")
        return
    results = read_results(options.results)
    text = "\n\n".join(f"{table(result)}\n\n{figures(result)}" for result in results) or NOTHING
    print(text)
    if options.readme:
        insert(text, options.readme)
    steps = read_results(options.results, "step-*.json")
    print(*(f"\n{step_table(result)}\n\n{step_figures(result)}" for result in steps), sep="\n")
    if steps := [result for result in steps if any(entry["forms"] for entry in result["entries"])]:
        step_picture(steps, options.results / "step.png")


if __name__ == "__main__":
    main()
