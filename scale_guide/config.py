"""What a run is made of: nested frozen dataclasses, read from YAML and the command line by jsonargparse.

A field's docstring is its `--help`. Science lives here and in the recipes; launch facts (processes, precision,
ZeRO stage) live in `accelerate_configs/` and `ds_configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

WarmupInput = Literal["data", "noise", "released_noise"]
GuideInput = Literal["data", "noise", "shuffled"]


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
    """Trained weights: the name of an earlier variant of this recipe, whose target is the guide; the run folder of a
    finished run; a .safetensors, .pt or .pth file; torchvision:NAME, such as torchvision:IMAGENET1K_V1 or
    torchvision:DEFAULT, for a guide of torchvision.models; transformers:NAME, a name on the hub or a folder written
    by save_pretrained, for a guide made of a model of transformers. Empty: initialised only."""
    input: GuideInput = "data"
    """What the guide reads in every step while the target reads the data: the same data; noise of the same shape and
    padding (standard normal numbers, or for tokens uniform ones of the vocabulary), which differs from the noise of
    a warm-up; or shuffled: the rows of its micro-batch in a random order that leaves no row in its place. Of two
    padded rows the positions count where both have a token. Controls: what is left is not of the input."""
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
    """Weight of the guidance loss beside the task loss; 0 trains the target alone, and without distillation never
    builds the guide."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight changes from step to step: constant; or falling from `weight`, which it has up to the end of the
    warm-up, to zero at the end of the run or at stop_after, along a line or half a cosine."""
    stop_after: int | None = None
    """Guide the first so many steps of the run (the warm-up counts) and then drop the guide: the target trains alone,
    as fast as without guidance. Empty: guide every step."""
    layer_weights: dict[str, float] = field(default_factory=dict)
    """Factor on the weight of each pair by its target layer, a name or a glob: {"hidden.*": 0.5, hidden.0.linear: 2}.
    A name goes before a glob, 1 is what no entry matches, and 0 leaves the layer's pairs out altogether."""
    warmup_steps: int = 0
    """The first so many steps of the run minimise the guidance loss alone: alignment before the task. Layers behind
    the last guided one get a gradient of zero there (weight decay acts on them all the same), and the learning-rate
    schedule counts these steps like any others. With stop_after equal to it the guide only makes the start."""
    warmup_input: WarmupInput = "data"
    """What both networks read in the warm-up: the data; noise: standard normal numbers, or for tokens uniform ones of
    the vocabulary; released_noise: the authors' clamp(1.1 * normal, 0, 1), or the same tokens. Noise has the shape,
    padding and weights of the batch that it stands for; BatchNorm's running statistics follow it until data comes."""
    warmup_noise_for: Literal["both", "guide"] = "both"
    """Who reads the noise of the warm-up: both networks the same, or the guide alone while the target reads data."""
    distillation: float = 0.0
    """Weight of logit distillation beside the task loss, a control: T^2 KL(guide || target) between the softmaxes of
    both networks' logits at temperature T, a mean over the scored terms like the task loss. 0: none. It goes with a
    guidance.weight of 0 or more, starts after the warm-up, ends at stop_after, and does not follow `schedule`."""
    distillation_temperature: float = 1.0
    """T of the distillation: larger ones soften both distributions."""
    reset_optimizer: bool = False
    """Forget the optimizer's moments and step count at the end of the warm-up and where guidance stops. Without it
    Adam's averages of what the warm-up left out begin at zero, and its first updates there are several times too
    large."""
    similarity: str = "cka"
    """A file of scale_guide/similarity: cka | debiased_cka | rbf_cka | rsa_cosine | rsa_euclidean | ridge |
    procrustes | mutual_knn; or the path of a file of your own, e.g. ./my_similarity.py."""
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
    kept_dtype: Literal["own", "bf16"] = "own"
    """Exact accumulation by gather or transpose keeps the rows of all micro-batches from the first pass to its end: in
    their own number format, which is exact, or in bf16, which halves fp32 rows and rounds them (relative 4e-3)."""
    kept_on: Literal["host", "device"] = "host"
    """Where these rows, and the gradients of the second pass, wait."""
    guide_rows: Literal["auto", "keep", "recompute"] = "auto"
    """Exact accumulation by covariance reads the guide's rows in both passes: keep them for the second, or run the
    guide again (then memory does not grow with the number of micro-batches). auto keeps up to 256 MB."""

    @property
    def needs_guide(self) -> bool:
        """Whether the guide has any part in the training."""
        return bool(self.weight or self.distillation)


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
    max_bad_steps: int = 5
    """Steps in a row that are skipped, on all processes alike, because a loss or gradient is not a number (NaN, inf).
    One more ends the run, with the state from before them saved. Overflows of fp16 that the loss scale mends do not
    count."""
    compile: bool = False
    """Run the target through torch.compile: slow first steps, faster ones after, the same results but for rounding.
    A launch choice; not under ZeRO-3, which would cut the compiled code at every layer."""
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
    published: dict[str, str] = field(default_factory=dict)
    """The paper's number for a variant, e.g. {unguided: 1.65 +- 0.51}; `scale-guide report` puts it beside yours."""
    name: str = ""
    """What reports call the recipe; empty: the name of its file."""
    variant: str = ""
    """Which variant this is, once one was chosen."""
    run_dir: str = ""
    """Folder of the run; empty: runs/<name>. With variants each gets a folder inside it."""
    resume: str = "auto"
    """auto: from the newest checkpoint in run_dir if there is one; never: refuse a folder that holds a run; or the
    path of a checkpoint."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers known to Accelerate, e.g. [tensorboard, wandb]."""
