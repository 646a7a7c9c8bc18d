"""A training run from start to score: set up, warm up, train, export `model.golf`, reload it, score it."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from golfgpt_kernels import implementation
from torch import Tensor

from golfgpt import artifact, checkpoint, compile_cache, distributed
from golfgpt.attention import select_backend
from golfgpt.bpb import bits_per_byte
from golfgpt.clock import Ledger
from golfgpt.config import EvalConfig, RunConfig, differences, from_dict, to_dict
from golfgpt.data.shards import Dataset
from golfgpt.data.yardsticks import yardsticks
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, GolfError, InputError, Interrupted, NonFiniteError
from golfgpt.evaluate import PartialSums, Score, evaluate, plan_windows
from golfgpt.files import sha256_file, write_json
from golfgpt.fit import fitted, forecast_bytes, out_of_memory
from golfgpt.quant import Quantizer
from golfgpt.report import budget_lines, score_lines, table, tensor_table
from golfgpt.run import Reporter, RunFolder, read_config
from golfgpt.schedule import crosses_cap
from golfgpt.signals import Signals
from golfgpt.trainer import Pending, StepResult, Trainer


def open_dataset(config: RunConfig, ranks: Ranks) -> Dataset:
    """The data set of `config`, checked against the model; each rank reads its share. Raises InputError."""
    if config.data.path is None:
        raise InputError("no data: name a prepared folder with --data.path DIR (see golfgpt data prepare)")
    dataset = Dataset.open(Path(config.data.path))
    bos, start = dataset.need_tokenizer().bos_id, config.model.document_start
    if start is not None and start != bos:
        raise InputError(f"model.document_start is {start}, but texts in {config.data.path} start with token {bos}")
    if dataset.vocab_size != config.model.vocab_size:
        raise InputError(
            f"the tokenizer of {config.data.path} has {dataset.vocab_size} tokens, the model "
            f"{config.model.vocab_size}; use --model.vocab-size {dataset.vocab_size}"
        )
    plan_windows(dataset, config)  # fail now, not after training
    m = config.model
    if config.eval.document_aware and m.document_start is None and (m.smear_gate, m.bigram_hash) != ("none", "none"):
        raise InputError(
            f"eval.document_aware: smear_gate {m.smear_gate} and bigram_hash {m.bigram_hash} of this model mix "
            "documents; train with --model.document-start 1 (the BOS id), or score without it"
        )
    dataset.check_token_ids(config.model.vocab_size, deal=(ranks.rank, ranks.world))
    return dataset


DECAY = 0.96
"""Of the running mean of the losses, a step: its noise is that of the mean over the last 49 losses."""

RESUMABLE = ("runtime.", "eval.", "budget.", "data.path")
"""Fields that may change when a run is resumed: none of them changes what is trained."""


def train(config: RunConfig, path: Path, *, resume: bool = False, quiet: bool = False) -> dict:
    """Train, export to `path`/model.golf, score the reloaded file; returns what result.json holds.

    Run under torchrun for several ranks; other ranks than the first return {}. With `resume` the newest
    whole checkpoint in `path` continues. Raises InputError for configurations and data that do not fit,
    NonFiniteError for a diverged run, Interrupted after a signal (state saved), BudgetError when the clock
    is too short for one step or, after scoring, when the artifact exceeds its budget (it is kept).
    """
    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(path))
        ranks = distributed.start(config.runtime.device)
        stack.callback(ranks.close)
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        folder, failed = None, None
        try:
            with ledger.phase("setup"):
                artifact.require_compressor(config.quant.compressor)
                dataset = open_dataset(config, ranks)
                config = config if resume else fitted(config)  # a run keeps the width that it was started with
                artifact.check_payload_bytes(Quantizer(config.model, config.quant).formats)
        except GolfError as error:
            failed = error
        ranks.settle(failed)  # before the ranks agree on a dtype
        try:
            with ledger.phase("setup"):
                trainer = Trainer(config, dataset, ranks)
                config = replace(config, runtime=replace(config.runtime, dtype=trainer.dtype_choice.name))
                if ranks.main:
                    tokenizer = dataset.need_tokenizer().model_bytes
                    folder = RunFolder.open(path) if resume else RunFolder.create(path, config, tokenizer)
                    stack.callback(folder.close)
        except GolfError as error:
            failed = error
        ranks.settle(failed)
        for p in trainer.model.parameters():  # an orthogonal start is a QR, whose rounding differs between CPUs
            ranks.broadcast_(p.data)
        trainer.prepare(0)
        reporter = Reporter(folder, speak=ranks.main, quiet=quiet)
        stack.callback(reporter.close)
        run = _Run(config, path, trainer, dataset, ranks, ledger, folder, reporter, signals)
        try:
            with ledger.phase("setup"):
                if resume:
                    run.restore()
                run.announce()
            run.warm_up()
            run.loop()
            return run.finish()
        except Exception as error:
            if folder and not resume and not isinstance(error, Interrupted):
                folder.discard()
            raise


@dataclass
class _Run:
    """One execution of `train` on one rank: the loop and what surrounds it."""

    config: RunConfig
    path: Path
    trainer: Trainer
    dataset: Dataset
    ranks: Ranks
    ledger: Ledger
    folder: RunFolder | None
    reporter: Reporter
    signals: Signals
    step: int = 0
    finished: bool = False
    stopping: bool = False
    """Whether the steps on their way are the last."""
    pending: deque[tuple[Pending, float]] = field(default_factory=deque)
    """Steps on their way, with their learning-rate multipliers."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    """Seconds of the last steps."""
    loss: float = 0.0
    """Of the last step."""
    losses: float = 0.0
    """Decayed sum of the losses of this execution: a resumed run starts its mean anew."""
    weight: float = 0.0
    """What `losses` is divided by."""
    first: bool = True
    """Whether no step but the first of this execution is over."""
    attention: str = ""
    """Backend of scaled_dot_product_attention."""
    graphs: int = 0
    """Graphs that torch.compile had made before the clock started."""
    ended: float = 0.0
    """Training clock when the last step was known to be over."""
    last_save: float = 0.0
    """time.monotonic() of the last checkpoint."""
    projection: str = ""
    """Forecast of the artifact's bytes at the last checkpoint."""

    def restore(self) -> None:
        """Load rank 0's newest whole checkpoint on every rank; without one the run starts over from step 0."""
        saved = failed = None
        if self.folder:
            try:
                saved = self.find_checkpoint()
            except GolfError as error:
                failed = error
        self.ranks.settle(failed)
        saved = self.ranks.share(saved)
        if saved is None:
            self.reporter.line(f"no checkpoint in {self.path}: starting from step 0")
            return
        self.step, self.finished = saved.step, saved.finished
        self.trainer.model.load_state_dict(saved.model)
        self.trainer.optimizers.load_state(saved.optimizers)
        self.trainer.average.load_state(saved.average)
        self.trainer.learn(max(saved.step - 1, 0), saved.clock)
        self.trainer.prepare(saved.step)
        self.ledger.seconds.update(saved.seconds)
        self.signals.saved = f"step {self.step} is saved"
        self.reporter.line(f"resumed at step:{self.step} train_time:{saved.seconds['train'] * 1000:.0f}ms")
        self.reporter.metric("resume", step=self.step)

    def find_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint; damaged newer ones are set aside. Raises InputError if it does not fit."""
        saved, refused = checkpoint.latest(self.folder.checkpoints)
        try:
            started = from_dict(RunConfig, saved.config) if saved else read_config(self.path)
        except ValueError as error:
            raise InputError(f"{self.path} was written by another version: {error}") from None
        changed = [d for d in differences(started, self.config) if not d.startswith(RESUMABLE)]
        if changed:
            what = "; ".join(changed)
            raise InputError(
                f"the run in {self.path} has another config ({what}); start a new --name or drop the change"
            )
        if saved and not saved.dataset:
            raise InputError(f"{self.path} was imported: there is no training to continue; eval, sample or export it")
        if saved and saved.dataset != self.dataset.digest:
            raise InputError(f"{self.config.data.path} has changed since the checkpoint was written")
        for path, reason in refused.items():
            self.reporter.line(f"warning: {reason}")
            path.rename(path.with_suffix(".damaged"))
        write_json(self.path / "config.json", to_dict(self.config))
        return saved

    def announce(self) -> None:
        """Decide what is left to decide, and say once what was decided."""
        c, t, say = self.config, self.trainer, self.reporter.line
        micro = c.data.microbatch_tokens or c.data.span_tokens
        shapes = [(micro // c.data.seq_len, c.data.seq_len), (1, c.window)]
        attention = select_backend(c.runtime.attention, c.model, shapes, self.ranks, t.dtype)
        self.attention = attention.backend
        cap = f"{c.schedule.max_seconds:.3f}" if c.schedule.max_seconds else "none"
        digest = self.dataset.digest[:16]
        say(f"train_loader:dataset:{c.data.path} train_shards:{len(self.dataset.train)} digest:{digest}")
        say(f"val_loader:tokens:{self.dataset.val_tokens}")
        self.reporter.status("forecasting the size of the artifact")
        quantizer = Quantizer(c.model, c.quant)
        fit = f" mlp_hidden:{c.model.mlp_hidden} (fitted)" if c.budget.fit == "mlp_hidden" else ""
        say(
            f"model_params:{t.model.num_parameters()} payload_bytes:{quantizer.payload_bytes} "
            f"forecast_bytes:{forecast_bytes(quantizer)}{fit}"
        )
        if c.quant.qat != "off":
            when = f"from {c.quant.qat_start:.0%} of the budget" if c.quant.qat_start else "from step 0"
            lr = f", learning rate at most {c.quant.qat_below_lr:g} of its base" if c.quant.qat_below_lr < 1 else ""
            say(f"qat:{c.quant.qat} {quantizer.label} {when}{lr}")
        say(f"world_size:{self.ranks.world} spans:{c.data.spans} microbatch_tokens:{micro}")
        say(f"device:{self.ranks.device} dtype:{t.dtype_choice} compile:{t.compiled} threads:{torch.get_num_threads()}")
        say(f"attention:{attention}")
        compute = dict.fromkeys(("relu2_mlp", "softcap_cross_entropy", "token_logprobs"), t.dtype)
        update = {"newton_schulz": torch.bfloat16, "muon_momentum_": torch.float32, "muon_update_": torch.float32}
        chosen: dict[tuple[str, str], list[str]] = {}
        for op, dtype in (compute | update).items():
            chosen.setdefault(implementation(op, self.ranks.device, dtype), []).append(op)
        for (choice, why), ops in chosen.items():
            say(f"kernels:{choice} {' '.join(ops)} ({why})")
        say(
            f"train_batch_tokens:{c.data.batch_tokens} train_seq_len:{c.data.seq_len} "
            f"iterations:{c.schedule.max_steps} max_wallclock_seconds:{cap} seed:{c.seed}"
        )

    def warm_up(self) -> None:
        """Compile before the clock starts."""
        steps, t = self.config.runtime.warmup_steps, self.trainer
        if not (t.compiled and steps and not self.finished):
            return
        with self.ledger.phase("compile"), self.memory():
            file = compile_cache.cache_file(self.config, t.dtype, self.ranks.device, self.attention)
            found = compile_cache.load(file)
            t.warm_up(steps, lambda i: self.reporter.status(f"compiling and warming up ({i + 1} of {steps})"))
            if self.ranks.main:
                compile_cache.save(file)
        seconds = self.ledger.seconds["compile"]
        self.reporter.line(
            f"compile_time:{seconds:.1f}s graphs:{compile_cache.graphs()} cache:{'loaded' if found else 'new'} {file}"
        )

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Say what to do when the first step does not fit. Nothing is made smaller unasked."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory(self.config, self.trainer.dtype.itemsize, error) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # what torch's CPU allocator raises
                raise
            raise out_of_memory(self.config, self.trainer.dtype.itemsize, error) from None

    def loop(self) -> None:
        """Train until max_steps or until rank 0 votes that another step could cross the cap.

        On a GPU the next step is enqueued before the last one's result is read. What a result asks for, a checkpoint or
        the end, happens once the steps on their way are over; all ranks read the same results in the same order.
        """
        c = self.config
        self.last_save, self.ended = time.monotonic(), self.ledger.seconds["train"]
        self.graphs = compile_cache.graphs()
        self.signals.deferred = True
        with self.ledger.phase("train"):
            while self.step < c.schedule.max_steps and not self.finished:
                self.launch()
                issued = self.step + len(self.pending)
                validate = bool(c.runtime.val_every) and issued % c.runtime.val_every == 0
                drain = validate or issued == c.schedule.max_steps or self.first
                save = signaled = False
                while self.pending and (drain or len(self.pending) > self.trainer.ahead):
                    result = self.collect()
                    save, signaled = save or result.save, signaled or result.signaled
                    drain = drain or self.stopping or save or signaled
                if self.pending:
                    continue
                self.finished = self.stopping or self.step == c.schedule.max_steps
                if signaled:
                    saved = self.save()
                    self.signals.saved = (
                        f"state saved at step {self.step}" if saved else "the last step could not be saved"
                    )
                    self.ranks.barrier()  # torchrun ends the others as soon as one rank leaves
                    raise self.signals.interrupted()
                if self.finished:
                    self.trainer.check_finite()
                if self.finished or validate or save:
                    self.save()
                if validate:
                    self.validate()
                    self.graphs = compile_cache.graphs()
        self.signals.release()
        self.trainer.data.close()
        seconds, cap = self.ledger.seconds["train"], c.schedule.max_seconds
        if not self.recent:
            self.reporter.line(f"training was over at step {self.step}: exporting and scoring again")
        elif self.step < c.schedule.max_steps:
            self.reporter.line(
                f"stopping_early: wallclock_cap train_time:{seconds * 1000:.0f}ms "
                f"step:{self.step}/{c.schedule.max_steps} (the slowest of the last steps took "
                f"{max(self.recent, default=0.0) * 1000:.0f}ms: one more could cross {cap:g} s)"
            )
        if self.loss >= 0.99 * math.log(c.model.vocab_size):
            self.reporter.line(
                f"warning: the training loss ended at {self.loss:.4f}, no better than guessing one of "
                f"{c.model.vocab_size} tokens: lower learning rates, or more steps"
            )
        if cap is not None and seconds > cap:
            self.reporter.line(f"warning: training took {seconds:.3f} s, more than schedule.max_seconds {cap:g}")

    def launch(self) -> None:
        """Enqueue one step."""
        c, t = self.config, self.trainer
        begun = self.ledger.elapsed("train")

        def votes() -> tuple[bool, bool, bool]:
            slowest, every = 0.0 if self.first else max(self.recent), c.runtime.checkpoint_seconds
            due = bool(every) and time.monotonic() - self.last_save >= every
            return crosses_cap(begun, slowest * (1 + t.ahead), c.schedule), due, bool(self.signals.caught)

        step = self.step + len(self.pending)

        def tick(done: int, of: int) -> None:
            if (waited := self.ledger.elapsed("train") - begun) > 5:  # a sign of life in a long step
                self.reporter.status(f"step {step + 1}: {done} of {of} microbatches after {waited:.0f} s")

        with self.memory() if not self.recent else contextlib.nullcontext():
            pending = t.launch(step, begun, votes, tick)
            self.pending.append((pending, t.update(step)))

    def collect(self) -> StepResult:
        """Read the oldest pending step's result."""
        pending, multiplier = self.pending.popleft()
        try:
            result = self.trainer.wait(pending)
        except NonFiniteError:
            self.save()
            self.ranks.barrier()
            raise
        self.step += 1
        self.loss = result.loss
        self.losses, self.weight = DECAY * self.losses + result.loss, DECAY * self.weight + 1
        self.stopping = self.stopping or result.stop
        seconds = self.ledger.elapsed("train")
        duration, self.ended = seconds - self.ended, seconds
        if self.first and self.config.schedule.max_seconds is not None:
            self.decide_for_all(seconds, duration)
        if len(self.recent) == 1 and self.first:  # its duration holds what happens once only
            self.recent.clear()
            self.first = False
        self.recent.append(duration)
        if self.trainer.compiled and (graphs := compile_cache.graphs()) > self.graphs:
            if len(self.recent) > 1 or self.config.runtime.warmup_steps:
                self.reporter.line(
                    f"warning: torch.compile made {graphs - self.graphs} new graphs by step {self.step}, on the "
                    "training clock; TORCH_LOGS=recompiles says why"
                )
            self.graphs = graphs
        self.log_step(result, multiplier, seconds)
        return result

    def decide_for_all(self, seconds: float, duration: float) -> None:
        """Whether another step fits, as rank 0 sees it after the first two of an execution: there is no duration to
        vote by yet, for the first holds what happens once only, and nothing is enqueued ahead."""
        cap = self.config.schedule.max_seconds
        stop, seconds, duration = self.ranks.share((seconds + 1.05 * duration > cap, seconds, duration))
        if seconds > cap and self.step == 1:
            raise BudgetError(
                f"schedule.max_seconds {cap:g} is too short for one step, which took {duration:.1f} s; "
                "raise it or lower --data.batch-tokens"
            )
        self.stopping = self.stopping or stop
        self.trainer.learn(self.step, seconds)

    def log_step(self, result: StepResult, multiplier: float, seconds: float) -> None:
        c = self.config
        mean = sum(self.recent) / len(self.recent)
        left = (c.schedule.max_steps - self.step) * mean
        if c.schedule.max_seconds is not None:
            left = min(left, c.schedule.max_seconds - seconds)
        smooth, bpb = self.losses / self.weight, None
        if manifest := self.dataset.manifest:
            bpb = bits_per_byte(smooth * manifest.train.tokens, manifest.train.decoded_bytes)
        self.reporter.status(
            f"step {self.step}  loss {smooth:.4f}  {f'{bpb:.4f} bits/byte  ' if bpb else ''}{mean * 1000:.1f} ms/step  "
            f"{c.data.batch_tokens / mean:,.0f} tokens/s  {max(left, 0):.0f} s left  {self.projection}"
        )
        last = not self.pending and (self.stopping or self.step == c.schedule.max_steps)
        if self.step <= 10 or self.step % c.runtime.log_every == 0 or last:
            self.reporter.line(
                f"step:{self.step}/{c.schedule.max_steps} train_loss:{result.loss:.4f} "
                f"train_time:{seconds * 1000:.0f}ms step_avg:{seconds / self.step * 1000:.2f}ms "
                f"train_loss_ema:{smooth:.4f}"
            )
            self.reporter.metric(
                "train",
                step=self.step,
                loss=result.loss,
                loss_ema=smooth,
                bpb_ema=bpb,
                grad_norm=result.grad_norm,
                lr_multiplier=multiplier,
                train_seconds=round(seconds, 4),
            )

    def save(self) -> bool:
        """Checkpoint on rank 0, off the training clock; all ranks call it, for shards are gathered. A full disk is a
        warning: training goes on.

        Returns whether the state is on disk. State that is not finite is not written: the last good one stays.
        """
        with self.ledger.phase("checkpoint"):
            optimizers = self.trainer.optimizers.state()
            self.last_save = time.monotonic()
            if not self.folder:
                return True
            state = checkpoint.Checkpoint(
                step=self.step,
                finished=self.finished,
                seconds=dict(self.ledger.seconds),
                config=to_dict(self.config),
                dataset=self.dataset.digest,
                model=self.trainer.model.state_dict(),
                optimizers=optimizers,
                average=self.trainer.average.state(),
                clock=self.trainer.seconds_at(max(self.step - 1, 0)),
            )
            try:
                self.trainer.check_finite()
                checkpoint.save(self.folder.checkpoints, state)
            except (OSError, NonFiniteError) as error:
                self.reporter.line(f"warning: no checkpoint at step {self.step}: {error}")
                return False
            self.signals.saved = f"state saved at step {self.step}"
            projected = None
            with contextlib.suppress(InputError):  # weights that the export could not hold end the run there
                projected = Quantizer(self.config.model, self.config.quant).projected_bytes(state.model)
                self.projection = f"about {projected:,} bytes"
            self.reporter.metric("checkpoint", step=self.step, projected_artifact_bytes=projected)
            return True

    def score(self, status: str, eval: EvalConfig, keep: PartialSums | None = None) -> Score:
        """Score the model as it is."""
        return evaluate(
            self.trainer.model,
            self.dataset,
            replace(self.config, eval=eval),
            self.ranks,
            dtype=self.trainer.dtype,
            progress=lambda text: self.reporter.status(f"{status}: {text}"),
            keep=keep,
        )

    def validate(self) -> None:
        """Score the unquantized weights in chunks, off the training clock; the state was just saved. With runtime.probe
        the weights as an export would leave them, too: averaged, quantized, decoded."""
        chunks = replace(self.config.eval, stride=None)
        probed, size = None, None
        self.signals.release()
        with self.ledger.phase("validate"):
            score = self.score("validating", chunks)
            if self.config.runtime.probe:
                weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
                try:
                    size = self.load_exported()
                    probed = self.score("scoring a probe", chunks)
                finally:
                    self.trainer.model.load_state_dict(weights)
        self.signals.deferred = True
        seconds = self.ledger.elapsed("train")
        probe = f"probe_bpb:{probed.val_bpb:.4f} probe_bytes:{size} " if probed else ""
        self.reporter.line(
            f"step:{self.step}/{self.config.schedule.max_steps} val_loss:{score.val_loss:.4f} "
            f"{score.key}:{score.val_bpb:.4f} {probe}train_time:{seconds * 1000:.0f}ms "
            f"step_avg:{seconds / self.step * 1000:.2f}ms"
        )
        self.reporter.metric(
            "val", step=self.step, **asdict(score), probe_bpb=probed and probed.val_bpb, probe_bytes=size
        )

    def load_exported(self) -> int | None:
        """Give every rank the weights that an artifact of the present ones would decode to; rank 0 gets its bytes."""
        blob = failed = None
        if self.folder:
            try:
                blob = artifact.pack(self.final_weights(), **self.artifact_options())
                self.trainer.model.load_state_dict(artifact.unpack(blob).state)
            except GolfError as error:
                failed = error
        self.ranks.settle(failed)
        for p in self.trainer.model.parameters():
            self.ranks.broadcast_(p.data)
        return len(blob) if blob else None

    def final_weights(self) -> dict[str, Tensor]:
        """What is exported: the average where there is one, else the weights as they are."""
        state = {name: value.cpu() for name, value in self.trainer.model.state_dict().items()}
        return state | {name: value.cpu() for name, value in self.trainer.average.weights().items()}

    def artifact_options(self) -> dict[str, Any]:
        c, digest = self.config, self.dataset.need_tokenizer().digest
        return {"model": c.model, "quant": c.quant, "tokenizer_sha256": digest, "seq_len": c.data.seq_len}

    def finish(self) -> dict:
        """Export, reload, score, report. The artifact is on disk before the scoring starts, the score before the
        yardsticks."""
        c, t, say = self.config, self.trainer, self.reporter.line
        info = failed = None
        if self.folder:
            try:
                with self.ledger.phase("export"):
                    info = self.export()
                t.model.load_state_dict(artifact.read(self.folder.artifact).state)
            except (GolfError, OSError) as error:
                failed = error
        self.ranks.settle(failed)
        with self.ledger.phase("eval"):
            for p in t.model.parameters():
                self.ranks.broadcast_(p.data)
            digest = self.ranks.share(sha256_file(self.path / "model.golf") if self.ranks.main else None)
            keep = PartialSums(self.path, self.ranks.rank, digest, self.reporter.line)
            score = self.score("scoring model.golf", c.eval, keep)
        if not self.folder:
            return {}
        stage = f"final_{Quantizer(c.model, c.quant).label.replace('/', '_')}_{info.compressor}_roundtrip"
        ms = score.seconds * 1000
        say(f"{stage} val_loss:{score.val_loss:.4f} {score.key}:{score.val_bpb:.4f} eval_time:{ms:.0f}ms")
        say(f"{stage}_exact val_loss:{score.val_loss:.8f} {score.key}:{score.val_bpb:.8f}")
        budget = artifact.budget_report(info.file_bytes, c.budget)
        result = {
            "score": asdict(score),
            "artifact_bytes": info.file_bytes,
            "code_bytes_allowance": c.budget.code_bytes,
            "total_bytes": budget.total_bytes,
            "margin_bytes": budget.margin_bytes,
            "compressor": info.compressor,
            "parameters": info.parameters,
            "steps": self.step,
            "seconds": {name: round(seconds, 3) for name, seconds, _ in self.ledger.report()},
            "dataset": self.dataset.digest,
            "artifact_sha256": sha256_file(self.folder.artifact),
            "yardsticks_bpb": None,
        }
        write_json(self.path / "result.json", result)
        self.reporter.status("compressing the text with gzip, xz and zstd for comparison")
        result["yardsticks_bpb"] = None if score.partial else yardsticks(self.dataset)
        write_json(self.path / "result.json", result)
        self.reporter.metric("result", **result)
        say(score_lines(score, result["yardsticks_bpb"]))
        phases = [(name, round(used, 2), "yes" if counted else "no") for name, used, counted in self.ledger.report()]
        say(table(("phase", "seconds", "in the budget"), phases))
        artifact.check_budget(info.file_bytes, c.budget)
        return result

    def export(self) -> artifact.ArtifactInfo:
        """Write model.golf and say what it holds."""
        c = self.config
        state, average = self.final_weights(), self.trainer.average
        if c.average.kind != "none":
            self.reporter.line(
                f"{c.average.kind}:exporting the average of {average.count} steps' weights"
                if average.enough
                else f"warning: {c.average.kind}: {average.count} of {self.step} steps were taken, too few to average "
                f"(every {c.average.swa_every} below {c.average.swa_start_lr:g} of the rate: average.swa_every, "
                "average.swa_start_lr): exporting the last weights"
            )
        self.reporter.status("compressing")
        info = artifact.write(self.folder.artifact, state, **self.artifact_options())
        label = f"{Quantizer(c.model, c.quant).label}+{info.compressor}"
        raw = sum(value.numel() * value.element_size() for value in state.values())
        self.reporter.line(tensor_table(Quantizer(c.model, c.quant).table(state)))
        self.reporter.line(f"Serialized model: {raw} bytes")
        self.reporter.line(f"Code size: {c.budget.code_bytes} bytes (allowance)")
        self.reporter.line(
            f"Serialized model {label}: {info.file_bytes} bytes (payload:{info.payload_bytes} "
            f"payload_ratio:{raw / info.payload_bytes:.2f}x)"
        )
        self.reporter.line(f"Total submission size {label}: {info.file_bytes + c.budget.code_bytes} bytes")
        self.reporter.line(budget_lines(info, c.budget))
        return info
