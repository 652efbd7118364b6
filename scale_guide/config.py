"""What a run is made of: nested frozen dataclasses, read from YAML and the command line by jsonargparse.

A field's docstring is its `--help`. Science lives here and in the recipes; launch facts (processes, precision,
ZeRO stage) live in `accelerate_configs/` and `ds_configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TaskConfig:
    """What is learned, and on which data."""

    name: str = "image_classification"
    """A file of scale_guide/tasks, or package.module:callable."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task's build function, e.g. {data: digits, image_size: 32}."""


@dataclass(frozen=True)
class TargetConfig:
    """The network that is trained."""

    name: str = "deep_fcn"
    """A file of scale_guide/models, or package.module:callable such as torchvision.models:resnet18."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's build function."""
    layers: str | list[str] = "weights"
    """Which outputs can be guided: weights | blocks | released | a list of names or globs."""


@dataclass(frozen=True)
class GuideConfig:
    """The frozen network whose representations guide the target."""

    name: str = "torchvision.models:resnet18"
    """A file of scale_guide/models, or package.module:callable."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's build function."""
    layers: str | list[str] = "weights"
    """Which outputs guide: weights | blocks | released | a list of names or globs."""
    weights: str | None = None
    """Trained weights: a .safetensors file or the run folder of an earlier run. Empty: initialised only."""
    seed: int = 0
    """Seed of the initialisation; its own, so that a guide is the same in every run."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the guide: auto is fp16 on a GPU and fp32 on a CPU."""
    batch_norm: Literal["eval", "batch", "calibrate"] = "eval"
    """BatchNorm of the guide: stored statistics (eval), each batch's own (batch), or measured on the first batch
    once and then kept (calibrate)."""
    placement: Literal["replicate", "cpu"] = "replicate"
    """Where the guide lives: a copy on every device, or on the host."""


@dataclass(frozen=True)
class GuidanceConfig:
    """How the target is pulled towards the guide: sum over layer pairs of weight * (1 - similarity)."""

    weight: float = 1.0
    """Weight of the guidance loss beside the task loss; 0 trains the target alone and never builds the guide."""
    similarity: str = "cka"
    """A file of scale_guide/similarity: cka | debiased_cka."""
    pairs: Literal["even"] | list[list[str]] = "even"
    """even: the paper's even spread (Algorithm 1); or a list of [target layer, guide layer], names or globs."""
    collision: Literal["sum", "last", "mean"] = "sum"
    """Several guide layers on one target layer: sum every term (eq. 1), keep only the last (the released code), or
    average them."""
    rows: Literal["flatten", "token", "mean", "last"] = "flatten"
    """What one row is: a whole example flattened (the paper), one token or position, the mean over positions, or the
    last position."""
    layout: Literal["auto", "gather", "transpose", "covariance"] = "auto"
    """How the statistics cross the ranks; every layout gives the same number, auto takes the cheapest."""
    accumulation: Literal["exact", "per_micro_batch"] = "exact"
    """With several micro-batches a step: similarity of the whole global batch (two passes), or of each micro-batch
    by itself (one pass; another, noisier loss)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Which torch optimizer."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay rates of adam and adamw."""
    momentum: float = 0.0
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """L2 penalty (adam, sgd) or decoupled decay (adamw)."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 never clips."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """constant; cosine to zero at the last step; step: multiplied by `gamma` every `step_epochs` epochs."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    gamma: float = 0.1
    """Factor of the step schedule."""
    step_epochs: int = 30
    """Epochs between two steps of the step schedule."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how often, and in what batches."""

    batch_size: int = 256
    """Rows of one optimizer step over all processes and micro-batches: the global batch."""
    micro_batch_size: int | None = None
    """Rows per process and forward pass; empty: batch_size / processes. A launch choice, which
    results do not depend on."""
    epochs: float | None = None
    """Passes over the training data. Give this or `steps`."""
    steps: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    seed: int = 0
    """Seed of the target's initialisation, of the data order and of augmentation."""
    num_workers: int = 2
    """Data-loading worker processes per rank."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between two evaluations; 0 evaluates only at the end."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 saves only at the end and on SIGTERM."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    timeout_s: int = 1800
    """Seconds after which a process gives up waiting for the others."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    task: TaskConfig = field(default_factory=TaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named sets of dotted overrides, e.g. {unguided: {guidance.weight: 0}, guided: {}}; run one after another and
    compared at the end."""
    run_dir: str = ""
    """Folder of the run; empty: runs/<recipe>. With variants each gets a folder inside it."""
    resume: str = "auto"
    """auto: from the newest checkpoint in run_dir if there is one; never: refuse a folder that holds a run; or the
    path of a checkpoint."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers known to Accelerate, e.g. [tensorboard, wandb]."""
