"""Length and batch of a run, optimizer, learning-rate schedule, checkpoints, monitoring."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from llmtrain.config.fields import FATAL, below, not_positive, outside
from llmtrain.config.generate import HarnessConfig
from llmtrain.config.objective import DpoConfig, Objective
from llmtrain.config.ramp import BatchStage, LengthStage, StepSchedule
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long, how wide, from which seed."""

    num_tokens: int
    """Length of the run in training tokens; the last step is the first to reach it."""
    sequence_length: int = field(default=2048, metadata=FATAL)
    """Tokens S in one row of the batch, the longest of the run."""
    global_batch_tokens: int = field(default=524288, metadata=FATAL)
    """Tokens in one optimizer step over all ranks; a multiple of sequence_length."""
    batch_ramp: tuple[BatchStage, ...] = field(default=(), metadata=FATAL)
    """Other batches until given tokens, in order; global_batch_tokens holds from then on."""
    length_ramp: tuple[LengthStage, ...] = field(default=(), metadata=FATAL)
    """Shorter rows until given tokens, in order; sequence_length holds from then on."""
    micro_batch_size: int = 1
    """Rows of sequence_length one rank runs at a time; of shorter rows as many more."""
    seed: int = field(default=0, metadata=FATAL)
    """Run seed; every random stream derives from it."""
    objective: Objective = field(default="next_token", metadata=FATAL)
    """next_token, or dpo: preferences, on stores of pairs (arXiv:2305.18290)."""
    dpo: DpoConfig | None = field(default=None, metadata=FATAL)
    """Settings of objective=dpo; null means its defaults."""
    z_loss_weight: float = 0.0
    """Weight of the squared log of the softmax denominator in the loss (arXiv:2204.02311, 5)."""
    stop_at_step: int | None = None
    """Save and stop after this step of the schedule; null runs to the end."""
    max_time_s: float | None = None
    """Seconds after a start at which it has saved and stopped, as if asked to; null sets none.

    In a job of Slurm the end of the job is such a limit, too.
    """

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        names = ("num_tokens", "sequence_length", "global_batch_tokens", "micro_batch_size")
        problems = below(self, 1, *names, "stop_at_step") + below(self, 0, "seed", "z_loss_weight")
        problems += not_positive(self, "max_time_s")
        if self.dpo is not None and self.objective != "dpo":
            problems.append(
                f"dpo is set and objective={self.objective} has no use for it; use objective=dpo "
                "or dpo=null"
            )
        problems += _unordered("batch_ramp", self.batch_ramp)
        problems += _unordered("length_ramp", self.length_ramp)
        if problems:
            raise ConfigError(problems)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps.num_steps(self.num_tokens)

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step over all ranks, after the ramps."""
        return self.global_batch_tokens // self.sequence_length

    @property
    def steps(self) -> StepSchedule:
        """What every step takes; the batches are whole rows (see run.py)."""
        return StepSchedule(
            self.sequence_length, self.global_batch_tokens, self.batch_ramp, self.length_ramp
        )


def _unordered(name: str, ramp: tuple[BatchStage, ...] | tuple[LengthStage, ...]) -> list[str]:
    """A problem for each stage of a ramp that does not end after the one before it."""
    ends = [stage.until_tokens for stage in ramp]
    return [
        f"{name}[{i + 1}].until_tokens={later} must be above that of the stage before, {earlier}"
        for i, (earlier, later) in enumerate(pairwise(ends))
        if later <= earlier
    ]


_ONLY_FOR = {
    "eps": ("adamw", "muon"),
    "momentum": ("muon",),
    "newton_schulz_steps": ("muon",),
    "muon_dtype": ("muon",),
}
"""Fields of the optimizer that some kinds have no use for, with the kinds that have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The update rule and the clip before it."""

    kind: Literal["adamw", "muon", "lion"] = field(default="adamw", metadata=FATAL)
    """AdamW (arXiv:1711.05101), Muon (arXiv:2502.16982) or Lion (arXiv:2302.06675).

    Muon is for the matrices of the blocks; embedding, head, norms and biases go by AdamW.
    """
    lr: float = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    beta1: float = 0.9
    """Decay of the first moment; lion: share of the moment in the direction of an update."""
    beta2: float = 0.95
    """Decay of the second moment; lion: of its only moment."""
    eps: float | None = None
    """adamw, muon: added to the root of the second moment; null means 1e-8."""
    momentum: float | None = None
    """muon: decay of the matrices' momentum; null means 0.95."""
    newton_schulz_steps: int | None = None
    """muon: iterations that make a momentum orthogonal; null means 5."""
    muon_dtype: Literal["fp32", "bf16"] | None = None
    """muon: type of these iterations; null is fp32. fp64 runs take fp64 for fp32.

    bf16 is faster on GPUs, but the update then depends on the layout by bf16's rounding.
    """
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """adamw: type in which the moments are kept; what is written to bf16 is rounded stochastically.

    fp64 runs keep them in fp64.
    """
    weight_decay: float = 0.1
    """Decoupled decay, on matrices only (not on norms, biases)."""
    grad_clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. inf is off."""
    in_backward: bool = False
    """Update each parameter as soon as its gradient is there, which is then freed.

    Needs grad_clip_norm=inf and one micro-batch a step; each parameter's update is refused alone.
    """

    def __post_init__(self) -> None:
        """Refuse rates and moments out of range, and fields that the kind would ignore."""
        problems = not_positive(self, "lr", "eps") + below(self, 0, "weight_decay")
        problems += below(self, 1, "newton_schulz_steps")
        problems += [
            f"{name}={value} must be at least 0 and below 1"
            for name in ("beta1", "beta2", "momentum")
            if (value := getattr(self, name)) is not None and not 0 <= value < 1
        ]
        if self.grad_clip_norm <= 0:
            problems.append(f"grad_clip_norm={self.grad_clip_norm} must be above 0; inf is off")
        problems += [
            f"{name}={getattr(self, name)} has no meaning for kind={self.kind}; "
            f"use kind={' or '.join(kinds)}, or {name}=null"
            for name, kinds in _ONLY_FOR.items()
            if self.kind not in kinds and getattr(self, name) is not None
        ]
        if self.state_dtype == "bf16" and self.kind != "adamw":
            problems.append(
                f"state_dtype=bf16 found with kind={self.kind}: only AdamW keeps its moments in "
                "bf16; use state_dtype=fp32 or kind=adamw"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate as a function of tokens seen: warm-up, then a curve down to a floor."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Curve after warm-up; ``wsd`` stays at the peak and falls over the last decay_tokens."""
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0 to the peak."""
    decay_tokens: int | None = None
    """wsd: tokens of the final linear fall; null means a tenth of the run."""
    final_lr_ratio: float | None = None
    """Rate at the end of the run as a share of the peak; null means 0.1."""

    def __post_init__(self) -> None:
        """Refuse negative lengths, and an end that the curve would ignore."""
        problems = below(self, 0, "warmup_tokens") + below(self, 1, "decay_tokens")
        if self.final_lr_ratio is not None:
            problems += outside(self, 0, 1, "final_lr_ratio")
        if self.final_lr_ratio not in (None, 1.0) and self.kind == "constant":
            problems.append(
                f"final_lr_ratio={self.final_lr_ratio} has no meaning for kind=constant; "
                "use another kind or final_lr_ratio=null"
            )
        if self.decay_tokens is not None and self.kind != "wsd":
            problems.append(
                f"decay_tokens={self.decay_tokens} has no meaning for kind={self.kind}; "
                "use kind=wsd or decay_tokens=null"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, how, how much to keep, where else."""

    every_steps: int = 500
    """Steps between checkpoints; the last step of a run is always saved."""
    grace_s: float = 30.0
    """Seconds between a request to stop and the end by force; a step and a save have to fit.

    torchrun and Slurm's KillWait give 30. `llmtrain launch` sets it where it is not set: to
    launch.signal_s under Slurm, to launch.grace_s under Kubernetes.
    """
    asynchronous: bool = True
    """Copy the state to host memory and write it behind the training; false writes it at once.

    The memory, on each rank as much as it writes, is taken once and kept.
    """
    keep_last: int = 3
    """Newest checkpoints to keep; older ones are deleted after a save."""
    keep_every_steps: int | None = None
    """Keep those of the steps that this divides for good; null is off."""
    keep_best: int = 0
    """Keep as many with the lowest best_metric besides."""
    best_metric: str = "validation_loss"
    """Mean held-out loss of all sources, or validation_loss/NAME for that of one."""
    mirror: str | None = None
    """Address of a folder that gets a copy of every checkpoint, as s3://bucket/runs/demo.

    Any file system of fsspec; a run goes on from it where it is ahead of the local disk. Every run
    needs its own, as file:///other/disk/${name}. Null is off.
    """
    memory_every_steps: int | None = None
    """Steps between copies of the state in the memory of the nodes, each on two of them; null: off.

    A start after a fault goes on from them where they are newer than what is on disk.
    """
    memory_dir: str = "/dev/shm"
    """Folder in memory on every node that takes these copies."""
    start_from: str | None = field(default=None, metadata=FATAL)
    """Run or checkpoint folder whose weights a new run starts from; null means fresh weights."""

    def __post_init__(self) -> None:
        """Refuse counts below 1, and what no evaluation measures."""
        problems = below(
            self, 1, "every_steps", "keep_last", "keep_every_steps", "memory_every_steps"
        )
        problems += below(self, 0, "keep_best") + not_positive(self, "grace_s")
        kind, slash, name = self.best_metric.partition("/")
        if kind != "validation_loss" or (slash and not name):
            problems.append(
                f"best_metric={self.best_metric} is not known; use validation_loss or "
                "validation_loss/NAME with a name of data.validation"
            )
        if self.mirror is not None and "://" not in self.mirror:
            problems.append(f"mirror={self.mirror} is no address; write file:///DIR or s3://...")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out loss and tasks during training."""

    every_steps: int | None = None
    """Steps between evaluations over data.validation, and after the last step; null is off."""
    windows_per_source: int = 64
    """Windows of sequence_length tokens scored per source, spread evenly, always the same ones."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to run on the way; into RUN/harness/step-*.json."""
    tasks_every_steps: int | None = None
    """Steps between runs of the tasks, which also run after the last step; null is off."""
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    """How the tasks are run."""

    def __post_init__(self) -> None:
        """Refuse counts below 1, tasks that never run and runs of no task."""
        problems = below(self, 1, "every_steps", "windows_per_source", "tasks_every_steps")
        if bool(self.tasks) != (self.tasks_every_steps is not None):
            problems.append(
                f"evaluation.tasks={list(self.tasks)} found with evaluation.tasks_every_steps="
                f"{self.tasks_every_steps}; set both, or none of them"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """What is logged, how often and where to."""

    log_every_steps: int = 10
    """Steps between log lines; the host waits for the device only then."""
    progress_bar: bool = True
    """Show a bar when the console is a terminal."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases mode; ``auto`` is online when logged in, else offline."""
    wandb_project: str = "llmtrain"
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group; null is the sweep the run is a trial of, else none."""
    tensorboard: bool = False
    """Write event files for TensorBoard to RUN/tensorboard."""
    layer_norms: bool = True
    """Report the norms of gradient and weights of every layer, at logging steps."""
    attention_logits_every_steps: int | None = None
    """Steps between rows with the largest attention logit of every layer; null is off.

    Each costs one more forward pass of the batch.
    """
    hang_s: float | None = 300.0
    """Seconds a rank may stand still before the rank at fault is named; null is off.

    A start, the first step of a shape, an evaluation batch and a save may take 0.9 of
    engine.timeout_s where that is more; below it collectives end by themselves.
    """
    hang_action: Literal["end", "report"] = "end"
    """After a hang: end the ranks, for the launcher to start them again; or only say so.

    One process alone, for which nobody waits, is only reported.
    """
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU; null takes the known peak of the GPU, else no MFU."""
    memory_history: bool = False
    """Record CUDA allocations; out of memory, they are written to RUN/memory-rankN.pickle."""
    document_loss_every_steps: int | None = None
    """Steps between files of the loss of every document in the batch; null writes none.

    They are RUN/document_loss/step-*.jsonl; `llmtrain trace losses=true` shows the worst first.
    """
    document_loss_steps: tuple[int, ...] = ()
    """Steps with such a file besides, counted from 1."""
    profile_steps: tuple[int, int] | None = None
    """First and last step, counted from 1, that torch's profiler records; null records none.

    RUN/traces/rank*.json.gz open in Perfetto (https://ui.perfetto.dev).
    """

    def __post_init__(self) -> None:
        """Refuse intervals and steps below 1 and a peak that is no number."""
        problems = below(
            self, 1, "log_every_steps", "document_loss_every_steps", "attention_logits_every_steps"
        )
        problems += not_positive(self, "peak_tflops", "hang_s")
        problems += [
            f"document_loss_steps.{i}={step} must be at least 1, the first step"
            for i, step in enumerate(self.document_loss_steps)
            if step < 1
        ]
        first, last = self.profile_steps or (1, 1)
        if not 1 <= first <= last:
            problems.append(
                f"profile_steps=[{first},{last}] must be a first step of at least 1 and a last "
                "step that does not come before it"
            )
        if problems:
            raise ConfigError(problems)
