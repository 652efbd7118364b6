"""What changes from step to step, as a function of the step alone: a resumed run needs no other memory of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale_guide.config import GuidanceConfig, Recipe, WarmupInput


@dataclass(frozen=True)
class Schedule:
    """The schedules of a run of `num_steps` steps, numbered 0 .. num_steps - 1.

    Raises:
        ValueError: a weight or schedule of the guidance that cannot work, or is longer than the run.
    """

    recipe: Recipe
    num_steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        _check_guidance(self.recipe.guidance, self.num_steps)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        config = self.recipe.optimizer
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.schedule == "cosine":
            done = (step - config.warmup_steps) / max(1, self.num_steps - config.warmup_steps)
            return config.lr * 0.5 * (1 + math.cos(math.pi * done))
        if config.schedule == "step":
            return config.lr * float(config.gamma ** (step // (config.step_epochs * self.steps_per_epoch)))
        return config.lr

    def values(self, step: int) -> dict[str, float]:
        """Returns what a logged line says of a step's place and rates."""
        weight = {"guidance_weight": self.guidance_weight(step)} if self.recipe.guidance.weight else {}
        return {"epoch": (step + 1) / self.steps_per_epoch, "learning_rate": self.learning_rate(step)} | weight

    def guidance_weight(self, step: int) -> float:
        """Returns the weight of the guidance loss in a step; 0 once guidance has stopped.

        A falling weight is whole in the first step after the warm-up, and 0 would be that of the first step without
        guidance: no guided step is computed for nothing.
        """
        config = self.recipe.guidance
        if self.guidance_is_over(step):
            return 0.0
        if config.schedule == "constant" or step < config.warmup_steps:
            return config.weight
        end = self.num_steps if config.stop_after is None else config.stop_after
        done = (step - config.warmup_steps) / (end - config.warmup_steps)
        return config.weight * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def guidance_is_over(self, step: int) -> bool:
        """Returns whether a step trains the target alone because guidance.stop_after has passed."""
        stop = self.recipe.guidance.stop_after
        return stop is not None and step >= stop

    def warmup(self, step: int) -> WarmupInput | None:
        """Returns what a step of the warm-up, which minimises the guidance loss alone, reads; None after it."""
        config = self.recipe.guidance
        return config.warmup_input if step < config.warmup_steps else None

    def starts_anew(self, step: int) -> bool:
        """Returns whether the optimizer forgets its moments before a step."""
        config = self.recipe.guidance
        return config.reset_optimizer and step > 0 and step in (config.warmup_steps, config.stop_after)


def _check_guidance(config: GuidanceConfig, num_steps: int) -> None:
    weight, warmup, stop = config.weight, config.warmup_steps, config.stop_after
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"guidance.weight={weight} must be a finite number, 0 or more. Give one, 0 for no guidance.")
    _check_distillation(config)
    if warmup < 0:
        raise ValueError(f"guidance.warmup_steps={warmup} must be 0 or more. Give 0 for no warm-up.")
    if stop is not None and stop < 1:
        raise ValueError(
            f"guidance.stop_after={stop} must be at least 1 step. Leave it empty to guide every step, or give "
            "guidance.weight 0 for none."
        )
    if warmup and not weight:
        raise ValueError(
            f"guidance.warmup_steps={warmup} has nothing to minimise with guidance.weight=0. Give a weight above 0 "
            f"(and guidance.stop_after {warmup} to train alone after the warm-up), or guidance.warmup_steps 0."
        )
    if warmup >= num_steps:
        raise ValueError(
            f"guidance.warmup_steps={warmup} must be less than the {num_steps} steps of the run. Train longer, or "
            "warm up for fewer steps."
        )
    if stop is not None and warmup > stop:
        raise ValueError(
            f"guidance.warmup_steps={warmup} must not be more than guidance.stop_after={stop}, which counts the "
            "warm-up. Make stop_after larger, or equal to guide in the warm-up alone."
        )
    if weight:
        _check_options_in_use(config)


def _check_distillation(config: GuidanceConfig) -> None:
    weight, temperature = config.distillation, config.distillation_temperature
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"guidance.distillation={weight} must be a finite number, 0 or more. Give 0 for none.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"guidance.distillation_temperature={temperature} must be a finite number above 0. Give 1 to compare the "
            "networks' own probabilities."
        )


def _check_options_in_use(config: GuidanceConfig) -> None:
    if config.warmup_noise_for != "both" and config.warmup_input == "data":
        raise ValueError(
            f"guidance.warmup_noise_for={config.warmup_noise_for!r} has no effect with guidance.warmup_input='data'. "
            "Give warmup_input noise or released_noise, or warmup_noise_for both."
        )
    if config.warmup_input != "data" and not config.warmup_steps:
        raise ValueError(
            f"guidance.warmup_input={config.warmup_input!r} has no effect with guidance.warmup_steps=0. Give the "
            "number of steps, or warmup_input data."
        )
    if config.reset_optimizer and not config.warmup_steps and config.stop_after is None:
        raise ValueError(
            "guidance.reset_optimizer=true resets at the end of the warm-up or of guidance, and there is neither. Set "
            "guidance.warmup_steps or guidance.stop_after, or reset_optimizer false."
        )


def describe(config: GuidanceConfig) -> str:
    """Returns when the target is guided, in words, to follow "guided by ..."; "" for every step at the same weight."""
    parts = []
    if config.warmup_steps:
        who = "" if config.warmup_noise_for == "both" else " (the guide's alone)"
        source = "" if config.warmup_input == "data" else f" on noise{who}"
        parts.append(f"{config.warmup_steps} steps of guidance alone{source} first")
    if config.schedule != "constant":
        parts.append(f"weight falling ({config.schedule}) from {config.weight:g} to 0")
    if config.stop_after is not None:
        parts.append(f"no guide after step {config.stop_after}")
    return "".join(f", {part}" for part in parts)
