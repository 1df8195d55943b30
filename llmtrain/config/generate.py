"""What ``llmtrain generate`` and ``llmtrain eval`` take: a run, and how to sample or score."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceParallelConfig:
    """Ranks that hold one model together, each started by torchrun."""

    tp: int = 1
    """Tensor-parallel ranks: each holds a part of every matrix; all processes are one group."""

    def __post_init__(self) -> None:
        """Refuse less than one rank."""
        if problems := below(self, 1, "tp"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """One call of ``llmtrain generate``."""

    run: str
    """Run folder; its newest good checkpoint is used."""
    step: int | None = None
    """Optimizer step of the checkpoint; null means the newest good one."""
    prompt: str | tuple[str, ...] = ""
    """Text to continue, or several; empty starts a new document."""
    prompts_file: str | None = None
    """File of prompts instead: each line a text, or in ``*.jsonl`` an object with ``prompt``.

    An object with ``messages`` (each with ``role`` and ``content``) is a conversation, laid out by
    the tokenizer's chat template; other fields go to the output as they are.
    """
    chat: bool = False
    """Take each prompt as the message of a user, laid out by the tokenizer's chat template."""
    system: str | None = None
    """With ``chat``: the system message before it; null means none."""
    num_samples: int = 1
    """Continuations of each prompt."""
    max_new_tokens: int = 128
    """Tokens to add at most; a continuation also stops at the end of its document."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; null means all."""
    top_p: float | None = 0.95
    """Sample among the likeliest tokens that hold this probability; null means all."""
    min_p: float | None = None
    """Leave out tokens below this share of the likeliest one's probability; null means none."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that stand in prompt or continuation become less likely; 1 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, which is cut before the first of them."""
    stop_tokens: tuple[str | int, ...] = ()
    """Tokens that end a continuation beside the end of document: ids, or names such as <|eot|>."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 16
    """Continuations that are made at the same time."""
    stream: bool | None = None
    """Show text while it is made, one continuation after another.

    null does so for a single continuation that goes to a terminal as text.
    """
    format: Literal["text", "jsonl"] = "text"
    """Prompt and continuation as text, or an object a line with ids and why it ended."""
    out: str | None = None
    """File to write to; null means standard output."""
    save: bool = False
    """Also keep the samples in ``samples.json`` of the run folder, where the report finds them."""
    parallel: InferenceParallelConfig = field(default_factory=InferenceParallelConfig)
    """How many ranks share the model."""

    def __post_init__(self) -> None:
        """Refuse what no sampling can mean."""
        problems = below(self, 1, "num_samples", "max_new_tokens", "top_k", "batch_size")
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature} must be 0 (likeliest token) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must lie above 0 and at most at 1, or be null")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(f"min_p={self.min_p} must lie between 0 and 1, or be null")
        if self.repetition_penalty <= 0:
            problems.append(f"repetition_penalty={self.repetition_penalty} must be above 0")
        if self.prompts_file is not None and self.prompt:
            problems.append("prompt and prompts_file are both given; leave one of them out")
        if self.system is not None and not self.chat:
            problems.append("system is the message before a chat; add chat=true or leave it out")
        if self.stream and self.format == "jsonl":
            problems.append("stream=true shows text as it comes, which format=jsonl cannot")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessConfig:
    """How lm-evaluation-harness runs the tasks of ``llmtrain eval tasks=[...]``."""

    include_path: str | None = None
    """Folder of further tasks, each a YAML file as the harness reads them; null means none."""
    num_fewshot: int | None = None
    """Solved examples before each question; null means what the task says."""
    limit: int | None = None
    """Questions of each task, the first ones; null means all."""
    batch_size: int = 8
    """Rows scored or continued at the same time."""
    chat_template: bool = False
    """Lay questions out as conversations, by the tokenizer's chat template."""
    system: str | None = None
    """System message before every question; null means none."""
    max_new_tokens: int = 256
    """Tokens of an answer at most, where the task does not say."""
    log_samples: bool = False
    """Also write every question with the model's answer to ``harness_samples.jsonl``."""
    seed: int = 1234
    """Seed of the choice of few-shot examples, and of sampled answers."""

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        problems = below(self, 1, "limit", "batch_size", "max_new_tokens")
        if problems := problems + below(self, 0, "num_fewshot"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """One call of ``llmtrain eval``."""

    run: str
    """Run folder; its newest good checkpoint is used and ``eval.json`` is written there."""
    step: int | None = None
    """Optimizer step of the checkpoint; null means the newest good one."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Source name -> folder of a held-out token store; none means the run's data.validation."""
    max_documents: int | None = None
    """Held-out documents to score per source, the first ones; null means all."""
    batch_tokens: int = 4096
    """Tokens scored at a time."""
    unigram_tokens: int = 100_000_000
    """Training tokens counted per source for the unigram model, the first ones."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to run instead of held-out sources; into harness.json."""
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    """How the tasks are run."""
    parallel: InferenceParallelConfig = field(default_factory=InferenceParallelConfig)
    """How many ranks share the model."""

    def __post_init__(self) -> None:
        """Refuse counts below one, and two evaluations in one."""
        problems = below(self, 1, "max_documents", "batch_tokens", "unigram_tokens")
        if self.tasks and self.sources:
            problems.append("tasks and sources are two evaluations; give one of them")
        if problems:
            raise ConfigError(problems)
