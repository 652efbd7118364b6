"""One run from its first step to its summary: data, steps, logging, evaluation, checkpoints, and leaving cleanly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from scale_guide import tracking
from scale_guide.bad_steps import BadSteps
from scale_guide.build import build_distillation, build_guidance, plan_guidance
from scale_guide.checkpoint import Checkpoints, SaveError, identity
from scale_guide.config import Recipe
from scale_guide.data_order import TrainOrder, batch_sizes, steps_per_epoch
from scale_guide.engine import Engine
from scale_guide.evaluate import evaluate
from scale_guide.guidance import Guidance
from scale_guide.guide import Guide
from scale_guide.journal import Journal
from scale_guide.launch import check_compile
from scale_guide.layer_map import LayerMap
from scale_guide.loading import Unreadable, training_steps
from scale_guide.manifest import step_of
from scale_guide.reading import Reading, check_inputs
from scale_guide.schedule import Schedule
from scale_guide.tasks import Batch, Task
from scale_guide.trackers import Trackers
from scale_guide.trainer import StepLog, count_steps, guided_step, make_optimizer, step_values


class Run:
    """One run: a task, a target, perhaps a guide, trained under one engine into one run folder."""

    MAX_LISTED = 100
    """How many unreadable samples, and how many skipped steps, the summary names."""

    def __init__(
        self, recipe: Recipe, *, task: Task, target: nn.Module, guide: Guide | None, layers: LayerMap, engine: Engine
    ) -> None:
        """Checks the sizes; nothing is prepared yet.

        Raises:
            ValueError: sizes that do not fit, alike on every rank.
        """
        self.recipe, self.task, self.engine, self.guide, self.layers = recipe, task, engine, guide, layers
        run_dir = Path(recipe.run_dir)
        self.bare_target = target
        self.folder = tracking.RunFolder(run_dir, writes=engine.is_main)
        training = recipe.training
        self.micro_batch_size, self.num_micro_batches = batch_sizes(
            training.batch_size, training.micro_batch_size, engine.world_size
        )
        self.per_epoch = steps_per_epoch(len(task.train), training.batch_size)
        self.num_steps = count_steps(recipe, self.per_epoch)
        self.schedule = Schedule(recipe, self.num_steps, self.per_epoch)
        check_inputs(recipe, task, self.micro_batch_size)
        if training.compile:
            check_compile(engine.name, engine.device)
        self.distillation = build_distillation(recipe, guide)
        self.guide_hash = guide.fingerprint() if guide is not None else None
        same = identity(recipe, engine, self.guide_hash)
        self.checkpoints = Checkpoints(run_dir, engine, keep=training.keep_checkpoints, identity=same)
        self.unreadable = Unreadable()
        self.bad_steps = BadSteps(training.max_bad_steps)
        self.seconds_before = 0.0
        self.resumed: Path | None = None

    def finished(self) -> dict[str, Any] | None:
        """Returns the summary of a run that has nothing left to do, else None. Collective.

        Raises:
            ValueError: a checkpoint that does not fit this recipe.
        """
        self.resumed = self.checkpoints.find(self.recipe.resume)
        complete = self.resumed is not None and step_of(self.resumed) >= self.num_steps
        found = tracking.read_summary(self.folder.path) if complete and self.engine.is_main else None
        summary: dict[str, Any] | None = self.engine.gather_list([found] if self.engine.is_main else [])[0]
        return summary if summary is not None and summary["step"] == self.num_steps else None

    def prepare(self) -> None:
        """Hands the target to the engine, hooks the guidance on, resumes, and opens the run folder. Collective.

        To be called after `finished`.

        Raises:
            ValueError: launch files that contradict the recipe.
        """
        recipe, engine = self.recipe, self.engine
        resumed = self.resumed
        self.target = engine.prepare(
            self.bare_target,
            make_optimizer(recipe.optimizer, self.bare_target),
            micro_batch_size=self.micro_batch_size,
            clip_norm=recipe.optimizer.clip_norm,
        )
        self.first_step = self.checkpoints.load(resumed) if resumed is not None else 0
        # After prepare (ZeRO-3 wraps outputs in hooks of its own) and before the first forward.
        self.guidance: Guidance | None = None
        if self.guide is not None and recipe.guidance.weight:
            bare, k = engine.unwrap(self.target), self.num_micro_batches
            plan = plan_guidance(recipe, self.layers, self.task, num_processes=engine.world_size, num_micro_batches=k)
            self.guidance = build_guidance(recipe, self.layers, bare, self.guide, plan=plan, num_micro_batches=k)
        if recipe.training.compile:  # last of all: what hooks come later, compiled code does not run
            engine.unwrap(self.target).compile(options={"fallback_random": True})
        earlier = [line for line in tracking.read_metrics(self.folder.path) if line["step"] <= self.first_step]
        self.seconds_before = float(earlier[-1].get("seconds", 0.0)) if earlier and resumed else 0.0
        facts = tracking.environment(
            engine=engine.name,
            world_size=engine.world_size,
            batch_size=recipe.training.batch_size,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.num_micro_batches,
            seed=recipe.training.seed,
            guide_hash=self.guide_hash,
            resumed_from=str(resumed) if resumed is not None else None,
        )
        engine.barrier()
        self.folder.start(recipe, facts, asdict(self.layers), self.first_step)
        self.trackers = Trackers(engine.accelerator, self.folder.path, {"recipe": str(tracking.plain(recipe))})

    def _steps(self) -> Iterator[list[Batch]]:
        """Yields the micro-batches of every step still to do."""
        training, engine = self.recipe.training, self.engine
        order = TrainOrder(
            len(self.task.train),
            training.batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=engine.rank,
            world_size=engine.world_size,
            seed=training.seed,
            first_step=self.first_step,
            last_step=self.num_steps,
        )
        return training_steps(
            self.task, order, num_workers=training.num_workers, pin_memory=engine.device.type == "cuda"
        )

    def run(self, label: str) -> dict[str, Any] | None:
        """Trains to the end; returns the summary, or None when the run was asked to stop and has saved. Collective.

        Raises:
            SaveError: the last checkpoint could not be written.
            BadNumbersError: too many steps in a row had to be skipped.
        """
        stop = tracking.StopSignal()
        try:
            return self._run(label, stop)
        finally:
            stop.close()
            self.trackers.finish()
            self._drop_guide()

    def _drop_guide(self) -> None:
        if self.guidance is not None:
            self.guidance.close()
        self.guidance = self.guide = self.distillation = None

    def _run(self, label: str, stop: tracking.StopSignal) -> dict[str, Any] | None:
        self.journal = self._open_journal(label)
        say, training = self.journal.progress.say, self.recipe.training
        saved = self.first_step if self.first_step else -1
        for step, micro_batches in enumerate(self._steps(), start=self.first_step):
            self._enter(step)
            log = self._one_step(step, micro_batches, stop)
            done = step + 1
            self._judge(log, done)
            self.journal.progress.advance()
            if step == self.first_step and self.guidance is not None:
                say(f"statistics by {self.guidance.plan}")
            if self._is_logged(done):
                self._log(log, done)
            validates = training.evaluate_every and done % training.evaluate_every == 0
            if validates and done < self.num_steps:
                self._validate(done)
            _, asked, unreadable = log.agreed()
            self.unreadable.tell_once(unreadable, say)
            due = training.checkpoint_every and done % training.checkpoint_every == 0
            if (due or asked) and self.checkpoints.save(done):
                saved = done
            if asked or due or validates:
                self.journal.progress.rate(done)  # rows/s are those of training alone
            if asked and done < self.num_steps:
                self._leave(saved)
                return None
        if saved != self.num_steps and not self.checkpoints.save(self.num_steps):
            raise SaveError(f"the state after the last step could not be saved in {self.folder.path}: free disk space")
        return self._finish()

    def _open_journal(self, label: str) -> Journal:
        progress = tracking.Progress(
            label,
            first_step=self.first_step,
            num_steps=self.num_steps,
            batch_size=self.recipe.training.batch_size,
            shown=self.engine.is_main,
        )
        if self.first_step:
            progress.say(f"resumed from step {self.first_step}")
        return Journal(self.folder, self.trackers, progress, seconds_before=self.seconds_before)

    def _enter(self, step: int) -> None:
        """Does what changes with this step: the rates, the end of the warm-up, the end of guidance."""
        schedule = self.schedule
        self.engine.set_learning_rate(schedule.learning_rate(step))
        if schedule.starts_anew(step):
            self.engine.reset_optimizer()
        if self.guide is None:
            return
        if step and step == self.recipe.guidance.warmup_steps:
            self.journal.progress.say(f"the warm-up ended with step {step}: the task loss joins in")
        if self.guidance is not None:
            self.guidance.weight = schedule.guidance_weight(step)
            self.guidance.watch.is_on = self._is_logged(step + 1) and not self.recipe.training.compile
        if schedule.guidance_is_over(step):
            over = f"guidance ended with step {self.recipe.guidance.stop_after}: the target trains alone"
            self.journal.progress.say(over)
            self._drop_guide()

    def _one_step(self, step: int, micro_batches: list[Batch], stop: tracking.StopSignal) -> StepLog:
        for batch in micro_batches:
            self.unreadable.note(batch)
        recipe = self.recipe
        return guided_step(
            micro_batches,
            target=self.target,
            task=self.task,
            engine=self.engine,
            guidance=self.guidance,
            distillation=self.distillation,
            accumulation=recipe.guidance.accumulation,
            reading=Reading(
                warmup=self.schedule.warmup(step),
                noise_for=recipe.guidance.warmup_noise_for,
                guide_input=recipe.guide.input if self.guide is not None else "data",
            ),
            seed=recipe.training.seed,
            step=step,
            stop=stop.requested,
        )

    def _judge(self, log: StepLog, done: int) -> None:
        """Counts a step that was skipped, says why, and ends the run after too many. Collective."""
        if log.trace is None or (self.engine.has_loss_scale and log.is_finite(self.engine)):
            self.bad_steps.in_a_row = 0
            return
        self.bad_steps.add(f"step {done}: {log.trace()}")
        self.journal.progress.say(f"skipped, for there is no number to learn from: {self.bad_steps.told[-1]}")
        if self.bad_steps.are_too_many:
            before = done - self.bad_steps.in_a_row
            saved = before > 0 and self.checkpoints.save(before)
            raise self.bad_steps.error(self.folder.path, before if saved else None)

    def _is_logged(self, done: int) -> bool:
        return done % self.recipe.training.log_every == 0 or done == self.num_steps

    def _log(self, log: StepLog, done: int) -> None:
        """Writes and shows one logged step. Collective."""
        found = step_values(log, self.engine, self.guidance) if log.trace is None else {"skipped": True}
        self.journal.step(done, self.schedule.values(done - 1) | found)

    def _validate(self, done: int) -> dict[str, float]:
        """Returns the validation scores, logged and shown. Collective."""
        rows, workers = self.micro_batch_size, self.recipe.training.num_workers
        scores = evaluate(self.target, self.task, self.engine, micro_batch_size=rows, num_workers=workers)
        self.journal.validation(done, scores)
        return scores

    def _leave(self, saved: int) -> None:
        self.journal.progress.close()
        state = f"saved at step {saved}" if saved > 0 else "nothing could be saved"
        self.journal.progress.say(
            f"asked to stop: {state} in {self.folder.path}. The same command goes on from there."
        )

    def _finish(self) -> dict[str, Any]:
        scores = self._validate(self.num_steps)
        self.journal.progress.close()
        weights = self.engine.state_dict()
        names = self.unreadable.names(self.task, self.engine)
        summary = {
            "finished": True,
            "step": self.num_steps,
            "seconds": self.journal.seconds,
            "score": self.task.score,
            "validation": scores,
            "num_unreadable": len(names),
            "unreadable": names[: self.MAX_LISTED],
            "num_skipped_steps": len(self.bad_steps.told),
            "skipped_steps": self.bad_steps.told[: self.MAX_LISTED],
            "num_parameters": sum(w.numel() for w in weights.values()),
        }
        recipe = self.recipe
        description = {"model": recipe.target.name, "options": recipe.target.options, "facts": self.task.facts}
        self.folder.finish(summary, weights, description)
        self.engine.barrier()
        return summary
