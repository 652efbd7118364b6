"""What a recipe names -> the things themselves: task, target, guide, and the layers of both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scale_guide import lookup
from scale_guide.activations import Recorder
from scale_guide.config import GuideConfig, Recipe, TargetConfig
from scale_guide.data_order import SeededDataset
from scale_guide.distillation import Distillation, check_alike
from scale_guide.guidance import Guidance
from scale_guide.guide import Guide
from scale_guide.guide_weights import load_weights
from scale_guide.layer_map import LayerMap, trace, trace_layers
from scale_guide.objective import Similarity
from scale_guide.statistics import Plan, Storage, check_memory, make_plan
from scale_guide.tasks import Task, logits

CALIBRATION_ROWS = 256
CHECK_ROWS = 16


def build_task(recipe: Recipe) -> Task:
    """Returns the task.

    Raises:
        ValueError: an unknown task or option, or data that cannot be read.
    """
    found: Task = lookup.call(lookup.find("tasks", recipe.task.name), recipe.task.options, {}, field="task.options")
    return found


def build_network(kind: str, recipe: Recipe, task: Task) -> nn.Module:
    """Returns the network of the recipe's field `kind` (target | guide), initialised from its own seed.

    Raises:
        ValueError: an unknown model or option, or one that is no network.
    """
    if kind == "target":
        return make_network(recipe.target, task.facts, seed=recipe.training.seed, field=kind)
    return make_network(recipe.guide, task.facts, seed=recipe.guide.seed, field=kind)


def make_network(config: TargetConfig | GuideConfig, facts: Mapping[str, Any], *, seed: int, field: str) -> nn.Module:
    """Returns the network that `config` names, initialised from `seed`.

    Args:
        config: Its name and options.
        facts: What a task tells a model that asks for it by name.
        seed: Of its initialisation.
        field: The recipe's field, for messages.

    Raises:
        ValueError: an unknown model or option, or one that is no network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = lookup.call(lookup.find("models", config.name), config.options, facts, field=f"{field}.options")
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{field}.name={config.name!r} builds a {type(network).__name__}; it must build an nn.Module."
        )
    return network


def outline(kind: str, recipe: Recipe, task: Task) -> nn.Module:
    """Returns the network of `build_network` on meta tensors: shapes without values, and nothing allocated.

    Raises:
        ValueError: as `build_network`.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network that brings its weights copies them to meta tensors, loudly
        return build_network(kind, recipe, task)


def build_guide(recipe: Recipe, task: Task, device: torch.device) -> Guide:
    """Returns the frozen guide, with its trained weights if the recipe names any.

    Raises:
        ValueError: an unknown model or option, or weights that do not fit.
    """
    network = build_network("guide", recipe, task)
    if recipe.guide.weights is not None:
        load_weights(network, recipe.guide.weights, recipe.guide.name)
    guide = Guide(
        network,
        dtype=recipe.guide.dtype,
        batch_norm=recipe.guide.batch_norm,
        device=torch.device("cpu") if recipe.guide.placement == "cpu" else device,
    )
    if recipe.guide.batch_norm == "calibrate":
        guide.calibrate(first_inputs(recipe, task, CALIBRATION_ROWS))
    return guide


def check_guide(guide: Guide, recipe: Recipe, task: Task, layers: LayerMap) -> None:
    """Runs the guide once on the first samples, the same on every rank, before anything is trained.

    Raises:
        ValueError: a mapped layer, or with distillation the output, gives inf or NaN, as an untrained ResNet-101 does
            in fp16.
    """
    names = list(dict.fromkeys(pair.guide for pair in layers.pairs))
    modules = [name.partition("#")[0] for name in names]
    recorder = Recorder(guide.model, modules, keep=names, overwritten=layers.overwritten[1])
    with recorder.record():
        output = guide(first_inputs(recipe, task, CHECK_ROWS))
    recorder.close()
    found = {name: activation.output for name, activation in recorder.take().items()}
    bad = guide.check_finite(found | ({"output": logits(output)} if recipe.guidance.distillation else {}))
    if bad is not None:
        raise guide.overflow(bad)


def plan_guidance(
    recipe: Recipe, layers: LayerMap, task: Task, *, num_processes: int, num_micro_batches: int = 1
) -> Plan:
    """Returns the layouts that the guidance of a recipe uses, from shapes alone.

    Raises:
        ValueError: a layout that the similarity or padded rows do not allow, or Gram matrices that do not fit.
    """
    guidance, widths = recipe.guidance, layers.widths
    num_rows = layers.rows_per_example * recipe.training.batch_size
    if guidance.accumulation != "exact":
        num_rows //= num_micro_batches
    forms = Similarity(guidance.similarity).forms
    if guidance.rows == "flatten" and guidance.layout != "covariance" and layers.has_sequences:
        forms = forms - ({"feature"} if "mask" in task.collate([task.train[0]]) else set())
    plan = make_plan(layers.pairs, widths, num_rows, num_processes, forms, guidance.layout)
    check_memory(plan, _memory())
    return plan


def build_guidance(
    recipe: Recipe,
    layers: LayerMap,
    target: nn.Module,
    guide: Guide,
    *,
    plan: Plan | None = None,
    num_micro_batches: int = 1,
) -> Guidance:
    """Returns the guidance of a recipe, hooked onto the bare target, which the engine has wrapped by now."""
    config = recipe.guidance
    return Guidance(
        target,
        guide,
        pairs=layers.pairs,
        target_layers=recipe.target.layers,
        guide_layers=recipe.guide.layers,
        overwritten=layers.overwritten,
        similarity=config.similarity,
        weight=config.weight,
        rows=config.rows,
        layout=config.layout,
        plan=plan,
        num_micro_batches=num_micro_batches if config.accumulation == "exact" else 1,
        storage=Storage(torch.bfloat16 if config.kept_dtype == "bf16" else None, on_host=config.kept_on == "host"),
        guide_rows=config.guide_rows,
    )


def build_distillation(recipe: Recipe, guide: Guide | None) -> Distillation | None:
    """Returns the distillation of a recipe; None without one or without a guide."""
    config = recipe.guidance
    if guide is None or not config.distillation:
        return None
    return Distillation(guide, config.distillation, config.distillation_temperature)


def check_outputs(recipe: Recipe, task: Task) -> None:
    """Runs the target, and the guide if the recipe distils, once on meta tensors.

    Raises:
        ValueError: the target's logits do not fit the task, or the guide's not the target's.
    """
    batch = task.collate([task.train[0]] * 2)
    scored = task.scored(batch)
    target = _meta_output("target", recipe, task, batch["input"])
    values = getattr(target, "logits", target)
    num_classes = task.facts.get("num_classes", task.facts.get("vocab_size"))
    shape = tuple(values.shape) if isinstance(values, torch.Tensor) else ()
    if num_classes is not None and (shape[:-1] != tuple(scored.shape) or shape[-1] < num_classes):
        raise ValueError(
            f"target.name={recipe.target.name!r} gives logits {shape} for two samples, but the task scores "
            f"{tuple(scored.shape)} terms of {num_classes} classes. Set the number of classes under target.options, "
            "or choose a target for this task."
        )
    if recipe.guidance.distillation:
        check_alike(target, _meta_output("guide", recipe, task, batch["input"]), scored)


def _meta_output(kind: str, recipe: Recipe, task: Task, inputs: torch.Tensor) -> Any:
    with torch.device("meta"), torch.no_grad():
        return outline(kind, recipe, task).eval()(inputs.to("meta"))


def _memory() -> int:
    """Returns the bytes of memory in which this process computes: its GPU's, or the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def first_inputs(recipe: Recipe, task: Task, num_rows: int) -> torch.Tensor:
    """Returns the inputs of the first training samples [at most num_rows, ...]: the same on every rank."""
    samples = SeededDataset(task.train, recipe.training.seed)
    rows = min(num_rows, recipe.training.batch_size, len(task.train))
    return task.collate([samples[0, i] for i in range(rows)])["input"]


def trace_recipe(recipe: Recipe, task: Task, *, num_examples: int = 2) -> LayerMap:
    """Returns the layers of both networks and their pairs, traced on meta tensors: nothing is computed or allocated.

    Raises:
        ValueError: unknown layers, no pairs, or unequal rows. With guidance.weight 0 no pairs are made.
    """
    inputs = task.collate([task.train[0]] * num_examples)["input"].to("meta")
    guided = bool(recipe.guidance.weight)
    with torch.device("meta"):
        target = outline("target", recipe, task)
        if not guided:
            return LayerMap(tuple(trace_layers(target, inputs, recipe.target.layers, recipe.guidance.rows)), (), ())
        return trace(
            target,
            outline("guide", recipe, task),
            inputs,
            target_layers=recipe.target.layers,
            guide_layers=recipe.guide.layers,
            pairs=recipe.guidance.pairs,
            collision=recipe.guidance.collision,
            layer_weights=recipe.guidance.layer_weights,
            rows=recipe.guidance.rows,
        )
