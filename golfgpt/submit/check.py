"""Checks of a submission's folder, by reading. Nothing in it is executed: code is parsed, wrappers are decoded under a
size limit (`golfgpt.submit.unwrap`), the artifact's header is read.

The checks are those that reviewers of parameter-golf make by hand: openai/parameter-golf issues and pull requests 683
(files, fields, syntax), 1603 (code, unpacked), 2124 (seeds of one configuration), 2146 (train_shards), 2118 (text
against logs), 1017 (conditions of a score). What reading cannot decide is "not checked", never "ok".
"""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from golfgpt.errors import GolfError, InputError
from golfgpt.files import parse_json, sha256_file
from golfgpt.submit.folder import ARTIFACT, PACKAGES, PROGRAM, READABLE, SCHEMA, SEEDS, is_record, score_of
from golfgpt.submit.pack import execution, imports, minified
from golfgpt.submit.reader import Code
from golfgpt.submit.unwrap import NETWORK, read_code

LOGS = re.compile(r"[^/]*\.log|[^/]*train[^/]*\.txt|result_seed\d+\.json")
"""Names of logs and results of the seeds."""
SECONDS = 600.0
"""Of training, and of evaluation."""
MAX_TEXT = 64 * 2**20


class Finding(NamedTuple):
    check: str
    result: Literal["ok", "FAILED", "not checked"]
    detail: str


class Failed(GolfError):
    """What a check found wrong."""


class NotChecked(GolfError):
    """Why a check was not made."""


@dataclass(frozen=True)
class Log:
    """A training log, in the published scripts' format or golfgpt's."""

    text: str

    def last(self, pattern: str) -> str | None:
        """The first group of the last match."""
        found = re.findall(pattern, self.text, re.MULTILINE)
        return found[-1] if found else None

    @cached_property
    def decimals(self) -> set[str]:
        """Numbers with at least four decimals, as they stand."""
        return set(re.findall(r"(?<![\w.])\d+\.\d{4,}(?![\w.])", self.text))

    def has(self, value: float) -> bool:
        """Whether the log has this number: of those nearest to it, one with the most decimals equals it, at the coarser
        rounding of the two."""
        near = [text for text in self.decimals if abs(float(text) - value) < 1e-4]
        most = max((_decimals(text) for text in near), default=0)
        given = _decimals(repr(value))
        return any(
            math.isclose(round(value, min(most, given)), round(float(text), min(most, given)), abs_tol=1e-12)
            for text in near
            if _decimals(text) == most
        )

    @property
    def settings(self) -> list[str]:
        """The lines that say what was run, without seed and path."""
        keys = r"^(?:model_params|world_size|train_batch_tokens|tie_embeddings|val_loader|train_loader|qat):.*$"
        lines = dict.fromkeys(re.findall(keys, self.text, re.MULTILINE))
        return [re.sub(r" ?\bseed:\d+|dataset:\S+|pattern=\S+", "", line) for line in lines]

    @property
    def train_seconds(self) -> float | None:
        budgeted = re.findall(r"^(?:train|calibrate) +([\d.]+)  yes$", self.text, re.MULTILINE)
        if budgeted:
            return sum(map(float, budgeted[-2:]))
        ms = self.last(r"train_time:(\d+)ms")
        return None if ms is None else int(ms) / 1000

    @property
    def eval_seconds(self) -> float | None:
        if (seconds := self.last(r"^eval +([\d.]+)  no$")) is not None:
            return float(seconds)
        ms = self.last(r"eval_time:(\d+)ms")
        return None if ms is None else int(ms) / 1000


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


@dataclass(frozen=True)
class Folder:
    """The files of a submission, read when they are asked for."""

    path: Path
    cap: int

    def text(self, name: str) -> str:
        """Raises Failed for a file that is missing, not text, too large, or a link out of the folder."""
        file = self.path / name
        if not file.is_file():
            raise Failed(f"there is no {name}")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise Failed(f"{name} is a link out of the folder")
        if file.stat().st_size > MAX_TEXT:
            raise Failed(f"{name} has {file.stat().st_size:,} bytes; expected text")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Failed(f"{name} is not UTF-8: {error}") from None

    def object(self, name: str) -> dict[str, Any]:
        try:
            return parse_json(self.text(name), dict)
        except ValueError as error:
            raise Failed(f"{name}: {error}") from None

    @cached_property
    def submission(self) -> dict[str, Any]:
        """Raises Failed unless it has the form of the schema."""
        import jsonschema

        value = self.object("submission.json")
        errors = list(jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(value))
        if errors:
            words = [f"{'.'.join(map(str, e.absolute_path)) or 'the object'}: {e.message[:160]}" for e in errors]
            raise Failed("submission.json: " + "; ".join(words))
        return value

    @cached_property
    def results(self) -> dict[int, dict[str, Any]]:
        return {int(seed): values for seed, values in self.submission["seed_results"].items()}

    @cached_property
    def logs(self) -> dict[int, Log]:
        """By seed: by the seed that a log says, else by its name. Raises Failed for two logs of one seed."""
        found: dict[int, Log] = {}
        for file in sorted({*self.path.glob("*.log"), *self.path.glob("*train*.txt")}):
            log = Log(self.text(file.name))
            seed = log.last(r"\bseed:\s*(\d+)") or next(iter(re.findall(r"seed_?(\d+)", file.name)), None)
            if seed is None:
                raise Failed(f"{file.name} names no seed")
            if (named := re.findall(r"seed_?(\d+)", file.name)) and int(named[0]) != int(seed):
                raise Failed(f"{file.name} is the log of seed {seed}")
            if int(seed) in found:
                raise Failed(f"two logs of seed {seed}")
            found[int(seed)] = log
        if not found:
            raise Failed("there are no logs")
        if missing := sorted(self.results.keys() - found.keys()):
            raise Failed(f"there is no log of seed {', '.join(map(str, missing))}, which submission.json has")
        return found

    @cached_property
    def code(self) -> Code:
        self.text(PROGRAM)
        return read_code(self.path)

    @cached_property
    def code_bytes(self) -> dict[str, int]:
        """Of every file that counts as code."""
        names = [PROGRAM, *sorted(self.code.files - {PROGRAM, ARTIFACT})]
        return {name: (self.path / name).stat().st_size for name in names}


def check(path: Path, *, cap: int = 16_000_000) -> list[Finding]:
    """All findings, in the order of `CHECKS`. Raises InputError if there is no folder."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; expected that of a submission")
    if not any((path / name).exists() for name in ("README.md", "submission.json", PROGRAM)):
        raise InputError(f"{path} is not the folder of a submission: {_instead(path)}")
    folder, findings = Folder(path, cap), []
    for name, check in CHECKS.items():
        try:
            findings.append(Finding(name, "ok", check(folder)))
        except NotChecked as error:
            findings.append(Finding(name, "not checked", str(error)))
        except (Failed, InputError) as error:
            findings.append(Finding(name, "FAILED", str(error)))
    return findings


def _instead(path: Path) -> str:
    """What a folder is in place of a submission, and what to do."""
    if (path / "config.json").is_file():
        make = f"golfgpt submit pack {shlex.quote(str(path))} --out DIR --author NAME --github-id USER --name TITLE"
        return f"it is a run, of which {make} makes one"
    return f"it has no README.md, submission.json and {PROGRAM}; golfgpt submit pack makes one from runs"


def files(folder: Folder) -> str:
    for name in ("README.md", "submission.json", PROGRAM):
        folder.text(name)
    links = [file.name for file in folder.path.rglob("*") if file.is_symlink()]
    if links:
        raise Failed(f"links: {', '.join(links)}; expected files")
    found = {str(file.relative_to(folder.path)) for file in folder.path.rglob("*") if file.is_file()}
    known = {"README.md", "submission.json", "requirements.txt", PROGRAM, READABLE, ARTIFACT, *folder.code.files}
    if further := sorted(name for name in found - known if not LOGS.fullmatch(name)):
        raise Failed(f"{', '.join(further[:8])}: not of a submission, and not counted as code")
    sizes = [file.stat().st_size for file in folder.path.rglob("*") if file.is_file()]
    return f"{len(sizes)} files, {sum(sizes):,} bytes; a log for each of {len(folder.logs)} seeds"


def fields(folder: Folder) -> str:
    return f"{len(folder.submission)} keys by {SCHEMA.name}"


def program(folder: Folder) -> str:
    code = folder.code
    if code.unread:
        raise Failed(f"executes what reading cannot tell: {'; '.join(code.unread[:4])}")
    how = f" by {', '.join(dict.fromkeys(code.how))}" if code.how else ""
    return f"parses; {' -> '.join(f'{len(text.encode()):,}' for text in code.texts)} bytes{how}"


def reads(folder: Folder) -> str:
    if found := folder.code.reads:
        raise NotChecked(f"reads files of a name that reading cannot tell: {_few(found)}")
    return "names the files that it reads"


def _few(lines: list[str]) -> str:
    """The first of `lines` of code, and how many more there are."""
    shown = "; ".join(line if len(line) <= 60 else f"{line[:59]}…" for line in lines[:2])
    return f"{shown}; and {len(lines) - 2} more" if len(lines) > 2 else shown


def code_size(folder: Folder) -> str:
    sizes = folder.code_bytes
    total, words = sum(sizes.values()), " + ".join(f"{name} {size:,}" for name, size in sizes.items())
    if total != folder.submission["bytes_code"]:
        raise Failed(f"{words} = {total:,} bytes; bytes_code is {folder.submission['bytes_code']:,}")
    return words


def modules(folder: Folder) -> str:
    found = set().union(folder.code.imported, *map(imports, folder.code.texts))
    if network := sorted(found & NETWORK):
        raise Failed(f"imports {', '.join(network)}: no network and no other programs")
    if calls := folder.code.network:
        raise Failed(f"{'; '.join(calls[:4])}: no network and no other programs")
    files = [Path(name) for name in folder.code.files]
    own = {file.stem for file in files if file.suffix == ".py"} | {file.parts[0] for file in files if file.parts[1:]}
    others = found - sys.stdlib_module_names - own
    if further := sorted(others - PACKAGES):
        raise Failed(f"imports {', '.join(further)}; expected only {', '.join(sorted(PACKAGES))}")
    if computed := folder.code.computed:
        raise NotChecked(f"{', '.join(sorted(others))}, and by a computed name: {_few(computed)}")
    return ", ".join(sorted(others)) or "the standard library"


def readable(folder: Folder) -> str:
    if not (folder.path / READABLE).is_file():
        raise NotChecked(f"there is no {READABLE}")
    try:
        text, texts = minified(folder.text(READABLE)), folder.code.texts
        if text == texts[0] or (texts[1:] == [text] and is_wrapper(texts[0]) and not folder.code.unread):
            return f"{PROGRAM} is {READABLE}, minified"
    except SyntaxError as error:
        raise Failed(f"{READABLE} is no Python: {error}") from None
    raise Failed(f"{PROGRAM} is not what {READABLE} becomes with the python-minifier that is installed")


def is_wrapper(text: str) -> bool:
    """Whether a text is what golfgpt.submit.pack writes around a program, and nothing else."""
    match ast.parse(text).body:
        case [
            ast.Import(names=[ast.alias(name="lzma" | "zlib" | "brotli" as module, asname=None), *others]),
            ast.Assign(targets=[ast.Name(id="n")], value=ast.Constant(value=0)),
            ast.For() as loop,
            *last,
        ] if ast.unparse(loop).startswith("for c in b") and len(loop.body) == 1 and not loop.orelse:
            size = r"n\.to_bytes\(\d+, 'big'\)"
            options = r"(, 3, None, \[\{'id': 33\}\])?"
            line = ast.unparse(loop.body[0]) == "n = n * 95 + c - 32" and isinstance(loop.iter, ast.Constant)
            kernels = list(map(ast.unparse, others)) == ["linecache"]
            expected = re.escape(ast.unparse(ast.parse(execution("CALL", kernels))))
            expected = expected.replace("CALL", rf"{module}\.decompress\({size}{options}\)")
            alone = kernels or not others
            return line and alone and bool(re.fullmatch(expected, "\n".join(map(ast.unparse, last))))
    return False


def artifact(folder: Folder) -> str:
    file = folder.path / ARTIFACT
    if not file.is_file():
        raise NotChecked(f"there is no {ARTIFACT}; other formats are not read")
    from golfgpt.quant.artifact import inspect

    seed = folder.submission.get("artifact_seed")
    result, size = folder.results.get(seed), file.stat().st_size
    if result is None:
        raise Failed(f"artifact_seed is {seed}; expected one of {', '.join(map(str, folder.results))}")
    if size != result["artifact_bytes"]:
        raise Failed(f"{ARTIFACT} has {size:,} bytes; artifact_bytes of seed {seed} is {result['artifact_bytes']:,}")
    info = inspect(file)
    if sha256_file(file) != result.get("artifact_sha256"):
        raise Failed(f"{ARTIFACT} is not the file that was scored: its SHA-256 is not artifact_sha256 of seed {seed}")
    return f"seed {seed}: {size:,} bytes, {info.parameters:,} parameters, SHA-256 as scored; its data have no code"


def total_bytes(folder: Folder) -> str:
    code, given = sum(folder.code_bytes.values()), folder.submission["bytes_total"]
    most = max(result["artifact_bytes"] for result in folder.results.values())
    if given != code + most:
        raise Failed(f"code {code:,} + largest artifact {most:,} = {code + most:,}; bytes_total is {given:,}")
    if given > folder.cap:
        raise Failed(f"{given:,} bytes, {given - folder.cap:,} over the cap of {folder.cap:,}")
    return f"code {code:,} + largest artifact {most:,} = {given:,}; {folder.cap - given:,} below the cap"


def seeds(folder: Folder) -> str:
    given = folder.submission["seeds"]
    if sorted(given) != sorted(folder.results):
        raise Failed(f"seeds are {given}, seed_results has {sorted(folder.results)}")
    if further := sorted(folder.logs.keys() - folder.results.keys()):
        raise Failed(f"there is a log of seed {further[0]}, which submission.json leaves out")
    settings = {seed: log.settings for seed, log in folder.logs.items()}
    first = next(iter(settings))
    for seed, lines in settings.items():
        other = [line for line in lines if line not in settings[first]] or [
            line for line in settings[first] if line not in lines
        ]
        if other:
            raise Failed(f"the logs of seed {first} and {seed} are of different configurations: {other[0][:160]}")
    few = f"{len(given)} seed{'s' * (len(given) > 1)}; a record needs {SEEDS}"
    if len(given) < SEEDS and is_record(folder.submission["track"]):
        raise Failed(f"{few}, and the track is {folder.submission['track']}")
    if not settings[first]:
        raise NotChecked("the logs have no lines of settings")
    equal = f"{', '.join(map(str, sorted(given)))}: {len(settings[first])} lines of settings are equal"
    return equal if len(given) >= SEEDS else f"{equal}; {few}"


def data(folder: Folder) -> str:
    shards = {seed: log.last(r"train_shards:(\d+)") for seed, log in folder.logs.items()}
    digests = {seed: log.last(r"digest:([0-9a-f]{8,})") for seed, log in folder.logs.items()}
    tokens = {log.last(r"^val_loader:.*?tokens:(\d+)") for log in folder.logs.values()}
    if len(set(shards.values())) > 1 or len(set(digests.values())) > 1 or len(tokens) > 1:
        raise Failed(f"the logs are of different data: train_shards {shards}")
    count, digest = next(iter(shards.values())), next(iter(digests.values()))
    if count is None:
        raise NotChecked("the logs do not have train_shards")
    if digest and not str(folder.submission.get("dataset", digest)).startswith(digest):
        raise Failed(f"the logs are of the data {digest}, submission.json of {folder.submission['dataset'][:16]}")
    return f"train_shards {count} in all logs" + (f", digest {digest}" if digest else "")


def scores(folder: Folder) -> str:
    for seed, result in folder.results.items():
        log = folder.logs[seed]
        for name in ("val_bpb", "val_loss"):
            if name in result and not log.has(result[name]):
                raise Failed(f"the log of seed {seed} has no {name} {result[name]}")
        steps = log.last(r"step:(\d+)/\d+ .*train_time")
        if "steps" in result and steps is not None and int(steps) != result["steps"]:
            raise Failed(f"the log of seed {seed} ends at step {steps}; submission.json says {result['steps']}")
        file = f"result_seed{seed}.json"
        if (folder.path / file).is_file():
            _same_as_result(folder.object(file), result, file)
    s = folder.submission
    for name in ("val_bpb", "val_loss"):
        values = [result[name] for result in folder.results.values() if name in result]
        if name in s and len(values) == len(folder.results):
            _near(s[name], statistics.fmean(values), f"{name}, the mean over the seeds,")
    if s.get("val_bpb_std") is not None:
        values = [result["val_bpb"] for result in folder.results.values()]
        _near(s["val_bpb_std"], statistics.stdev(values) if len(values) > 1 else 0.0, "val_bpb_std")
    return f"of {len(folder.results)} seeds as in the logs; mean {s['val_bpb']:.6f}"


COPIED = {"val_bpb", "val_loss", "artifact_bytes", "artifact_sha256", "steps"}
"""Numbers of result.json that submission.json has for a seed."""


def _same_as_result(found: dict[str, Any], result: dict[str, Any], file: str) -> None:
    for name, value in {**score_of(found), **found}.items():
        if name in COPIED and value != result.get(name, value):
            raise Failed(f"{file} has {name} {value}, submission.json has {result[name]}")


def _near(given: float, found: float, what: str) -> None:
    decimals = min(max(_decimals(repr(given)), 4), 8)
    if abs(given - found) > 0.51 * 10.0**-decimals:
        raise Failed(f"{what} is {given} in submission.json; the seeds give {found:.8f}")


def whole_text(folder: Folder) -> str:
    label = folder.submission.get("score", "val_bpb")
    final = [log.last(r"^final_\w+_exact .*?(val_bpb\w*):") or "" for log in folder.logs.values()]
    partial = [name for name in final if "_first_" in name]
    if "first" in label or partial:
        raise Failed(f"the score is of a part of the validation text: {next(iter(partial), label)}")
    tokens = {log.last(r"^val_loader:.*?tokens:(\d+)") for log in folder.logs.values()}
    scored = {log.last(r"([\d,]+) tokens, [\d,]+ bytes") for log in folder.logs.values()}
    if None in tokens | scored:
        raise NotChecked("the logs do not say how many tokens were scored")
    counts = {int(text.replace(",", "")) for text in scored if text}
    if counts != {int(text) - 1 for text in tokens if text}:
        raise Failed(f"{sorted(counts)} tokens were scored; the text has {sorted(map(str, tokens))}, all but the first")
    return f"{counts.pop():,} tokens, all but the first"


def times(folder: Folder) -> str:
    words = []
    for what in ("train", "eval"):
        found = {seed: getattr(log, f"{what}_seconds") for seed, log in folder.logs.items()}
        if None in found.values():
            raise NotChecked(f"a log does not have the time of {what}")
        seed, most = max(found.items(), key=lambda item: item[1])
        if most > SECONDS:
            raise Failed(f"{what} of seed {seed} took {most:.1f} s; expected at most {SECONDS:g}")
        words.append(f"{what} at most {most:.1f} s")
        for seed, result in folder.results.items():
            given = result.get(f"{what}_time_s", found[seed])
            if abs(given - found[seed]) > max(0.1, 0.02 * found[seed]):
                raise Failed(f"{what}_time_s of seed {seed} is {given}; its log has {found[seed]:.2f} s")
    return ", ".join(words)


def text(folder: Folder) -> str:
    readme, s = folder.text("README.md"), folder.submission
    rows = {line: [cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in readme.splitlines() if "|" in line}
    rows = {line: row for line, row in rows.items() if row and row[0].isdecimal() and int(row[0]) in folder.results}
    prose = "\n".join(line for line in readme.splitlines() if line not in rows)
    if not any(_rounds(text, s["val_bpb"]) for text in re.findall(r"(?<![\w.,])\d+\.\d{4,}(?![\w.])", prose)):
        raise Failed(f"README.md does not have val_bpb {s['val_bpb']:.4f}, the mean")
    if str(s["bytes_total"]) not in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", prose)):
        raise Failed(f"README.md does not have bytes_total {s['bytes_total']:,}")
    checked = 0
    for row in rows.values():
        result, log = folder.results[int(row[0])], folder.logs[int(row[0])]
        for number in (cell.replace(",", "") for cell in row[1:]):
            if re.fullmatch(r"\d+\.\d{4,}", number):
                known = any(_rounds(number, value) for value in result.values() if isinstance(value, float))
                known = known or log.has(float(number))
            elif re.fullmatch(r"\d{4,}", number):
                known = int(number) in result.values() or number in re.findall(r"\d+", log.text)
            else:
                continue
            checked += 1
            if not known:
                raise Failed(f"README.md has {number} for seed {row[0]}; its log and submission.json do not")
    if not checked:
        raise NotChecked("README.md has the mean, and no table with a row for each seed")
    return f"mean, bytes and {checked} numbers of the seeds as in logs and submission.json"


def _rounds(text: str, value: float) -> bool:
    return abs(float(text) - value) <= 0.5000001 * 10.0 ** -_decimals(text)


def _said(folder: Folder, pattern: str, limit: float = math.inf) -> list[str]:
    """What every log says by `pattern`. Raises NotChecked if one says nothing, Failed above `limit`."""
    found = [log.last(pattern) for log in folder.logs.values()]
    if None in found:
        raise NotChecked("reading cannot tell, and the logs have no such check")
    if worst := [text for text in found if limit < math.inf and float(text) > limit]:
        raise Failed(f"a log says {worst[0]}; expected at most {limit:g}")
    return [str(text) for text in found]


def causal(folder: Folder) -> str:
    changes = _said(folder, r"later tokens.*? change (nothing|at most [\d.e+-]+ nats) \(")
    return f"by the logs' own test, later tokens change {', '.join(dict.fromkeys(changes))}"


def full_distribution(folder: Folder) -> str:
    sums = _said(folder, r"probabilities sum to 1 within ([\d.e+-]+)", 1e-3)
    return f"by the logs' own test, probabilities sum to 1 within {max(sums, key=float)}"


def _adapts(folder: Folder) -> bool:
    return any(log.last(r"^(ledger [0-9a-f]+)") for log in folder.logs.values())


def score_first(folder: Folder) -> str:
    if _adapts(folder):
        counts = _said(folder, r"by the ledger ([\d,]+ tokens are scored once and [\d,]+ learned afterwards)")
        return f"by the ledger, {counts[0]}"
    _said(folder, r"^final_\w+_roundtrip_exact .*(val_bpb)")
    _said(folder, r"(later tokens and tokens outside the window|later tokens, tokens outside the window)")
    return "by the logs nothing learns while it scores: one score, of the file, without test-time training"


def single_pass(folder: Folder) -> str:
    if _adapts(folder):
        counts = _said(folder, r"by the ledger ([\d,]+) tokens are scored once")
        return f"by the ledger, {counts[0]} tokens are scored once"
    return f"by the logs, {whole_text(folder)}, in one pass"


CHECKS: dict[str, Callable[[Folder], str]] = {
    "files": files,
    "submission.json": fields,
    "program": program,
    "imports": modules,
    "files read": reads,
    "readable source": readable,
    "code bytes": code_size,
    "artifact": artifact,
    "bytes_total": total_bytes,
    "seeds": seeds,
    "data": data,
    "scores": scores,
    "whole text": whole_text,
    "times": times,
    "README.md": text,
    "#1017 causal": causal,
    "#1017 full distribution": full_distribution,
    "#1017 score first": score_first,
    "#1017 single pass": single_pass,
}


def failures(findings: list[Finding]) -> Iterator[str]:
    return (finding.check for finding in findings if finding.result == "FAILED")
