"""The ``llmtrain-data`` command line: composes a configuration and runs one command.

Nothing but the configuration is imported before it is known to be right, so ``--help`` and wrong
input answer at once. Exit status: 0 done, 2 wrong input (one message), 1 a fault.

    llmtrain-data run pipeline=demo input.web=crawl/*.warc.gz out=corpus num_workers=2
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

from data_pipeline.config.chat import ChatConfig
from data_pipeline.config.commands import (
    BucketsConfig,
    ClassifierConfig,
    MixturePlanConfig,
    PackConfig,
    ReopenConfig,
    SampleConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
    VerifyConfig,
)
from data_pipeline.config.report import EstimateConfig, ExplainConfig, ReportConfig
from data_pipeline.config.run import RunConfig
from data_pipeline.refusal import refusal
from llmtrain import logs
from llmtrain.config.arguments import Arguments, parse, verbatim
from llmtrain.config.load import load, options, to_yaml
from llmtrain.config.run import RunConfig as TrainConfig
from llmtrain.errors import ConfigError

OPTIONS = """\
options of every command:
  key=value           set a field: out=corpus pipeline.split.validation_share=0.01
  --cfg job           print the configuration that would be used, and stop
  --config-dir DIR    more pipelines from DIR/pipeline/NAME.yaml
  --help, -h          this text, or that of one command
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; its root is ``conf/data_NAME.yaml``, its function ``MODULE.NAME``."""

    help: str
    """One line."""
    schema: type[Any]
    """Dataclass of its configuration."""
    example: str
    """Arguments that show it at work."""
    module: str = "data_pipeline.commands"
    """Where its function is."""
    plans_training: bool = False
    """Whether overrides that are no fields of ``schema`` are those of ``llmtrain train``."""


COMMANDS = {
    "run": Command(
        help="raw crawl to token stores, resumable at every shard",
        schema=RunConfig,
        example="pipeline=c4_fast 'input.web=crawl/*.warc.gz' out=corpus num_workers=8",
    ),
    "estimate": Command(
        help="funnel, time and disk of a run, from a sample of its input",
        schema=EstimateConfig,
        example="pipeline=fineweb 'input.web=crawl/*.warc.gz' num_workers=8",
    ),
    "report": Command(
        help="one HTML page and data_card.json of what a run did",
        schema=ReportConfig,
        example="out=corpus",
    ),
    "explain": Command(
        help="where a document went, and what every rule measured in it",
        schema=ExplainConfig,
        example="out=corpus url=https://example.org/page    (or doc=ID; or run --explain URL)",
    ),
    "reopen": Command(
        help="the raw records behind documents of a store, proven and extracted again",
        schema=ReopenConfig,
        example="requests=requests.jsonl raw=/archive/crawl    (llmtrain trace verify=true asks)",
    ),
    "sample": Command(
        help="make a crawl from the documentation on this machine",
        schema=SampleConfig,
        example="out=demo/crawl",
    ),
    "classifier": Command(
        help="train the quality stage's classifier on wanted and unwanted texts",
        schema=ClassifierConfig,
        example="positive=good.jsonl.zst 'negative=crawl/*.jsonl.zst' out=quality.bin",
    ),
    "tokenizer": Command(
        help="train a tokenizer on clean text",
        schema=TrainTokenizerConfig,
        example="'input=data/*.jsonl.zst' vocab_size=32000 out=tokenizer",
    ),
    "tokenize": Command(
        help="clean text to a token store",
        schema=TokenizeConfig,
        example="'input=data/*.jsonl.zst' text_field=text tokenizer=tokenizer out=stores/mine",
    ),
    "chat": Command(
        help="conversations or preference pairs to a token store whose answers are learned",
        schema=ChatConfig,
        example="input=chats.jsonl tokenizer=tokenizer sequence_length=4096 out=stores/chat",
        module="data_pipeline.chat.command",
    ),
    "verify": Command(
        help="check every byte of a token store against its manifest",
        schema=VerifyConfig,
        example="store=stores/mine",
    ),
    "pack": Command(
        help="count the windows of a token store for data.packing=best_fit",
        schema=PackConfig,
        example="store=stores/mine sequence_length=4096",
    ),
    "mixture": Command(
        help="shares, tokens and epochs of every source over a training run to come",
        schema=MixturePlanConfig,
        example="data.sources.web=stores/web training.num_tokens=1e9 plot=plan.html  (or run=DIR)",
        module="data_pipeline.report.mixture",
        plans_training=True,
    ),
    "buckets": Command(
        help="cut a token store into stores by a score of its documents",
        schema=BucketsConfig,
        example="store=stores/mine out=stores/mine-by-length by=length buckets=4",
    ),
}
"""Commands by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = _spelled_out(list(sys.argv[1:] if argv is None else argv))
    return logs.run_command(lambda: _dispatch(parse(words, COMMANDS)))


def _spelled_out(words: list[str]) -> list[str]:
    """Turn ``run ... --explain URL`` into ``explain``; quote addresses and ids for the parser."""
    options = [i for i, word in enumerate(words) if word.partition("=")[0] == "--explain"]
    if options and words[0] == "run":
        at = options[0]
        _, equals, url = words[at].partition("=")
        url = url if equals else "".join(words[at + 1 : at + 2])
        words = ["explain", f"url={url}", *(word for word in words if word.startswith("out="))]
    return verbatim(words, ("url", "doc")) if words[:1] == ["explain"] else words


def _dispatch(arguments: Arguments) -> int:
    if arguments.help or arguments.command is None:
        sys.stdout.write(help_text(arguments.command))
        return 0 if arguments.help else 2
    command = COMMANDS[arguments.command]
    config = _composed(command, arguments)
    if arguments.show:
        sys.stdout.write(to_yaml(config))
        return 0
    logs.setup(None)
    try:
        commands = import_module(command.module)
        status: int = getattr(commands, arguments.command)(config)
    except (ImportError, OSError) as error:
        raise refusal(error) or error from None
    return status


def _composed(command: Command, arguments: Arguments) -> Any:
    """The configuration as the command line has it."""
    root, words = f"data_{arguments.command}", arguments.overrides
    if not command.plans_training:
        return load(root, words, command.schema, arguments.config_dirs)
    names = {field.name for field in fields(command.schema)} - {"train"}
    own = [word for word in words if word.partition("=")[0] in names]
    rest = [word for word in words if word not in own]
    config = load(root, own, command.schema, arguments.config_dirs)
    if config.run is None:
        train = load("train", rest, TrainConfig, arguments.config_dirs)
        return replace(config, train=train)
    if rest:
        raise ConfigError(f"run={config.run} brings its own configuration; leave out {rest[0]}")
    return config


def help_text(name: str | None) -> str:
    """Help of the whole, or of one command."""
    if name is None:
        lines = [f"  {n:<11}{c.help}" for n, c in COMMANDS.items()]
        return (
            "usage: llmtrain-data COMMAND [key=value ...] [options]\n\n"
            "commands:\n" + "\n".join(lines) + f"\n\n{OPTIONS}\n"
            "llmtrain-data COMMAND --help shows an example.\n"
        )
    command = COMMANDS[name]
    pipelines = f"pipeline=NAME, one of: {', '.join(options('pipeline'))}\n\n"
    return (
        f"usage: llmtrain-data {name} [key=value ...] [options]\n\n{command.help}\n\n"
        f"example:\n  llmtrain-data {name} {command.example}\n\n"
        f"{pipelines if name in ('run', 'estimate') else ''}{OPTIONS}\n"
        f"llmtrain-data {name} --cfg job shows every field and its value; docs/data.md explains.\n"
    )
