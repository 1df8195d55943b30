"""``llmtrain generate``: prompts in, continuations out, as text or JSON lines.

Prompts are continued ``batch_size`` at a time; what each gives does not depend on that number, for
every continuation has a random stream of its own (prompt after prompt, sample after sample).

    llmtrain generate run=runs/demo 'prompt=Return the' max_new_tokens=64 'stop=["."]'
    llmtrain generate run=runs/chat prompts_file=questions.jsonl format=jsonl out=answers.jsonl
    torchrun --nproc-per-node 2 -m llmtrain generate run=runs/large parallel.tp=2 prompt=Hello
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from llmtrain.config.generate import GenerateConfig
from llmtrain.errors import ConfigError, DataError
from llmtrain.eval.decoding import generate
from llmtrain.eval.sampling import Sampling
from llmtrain.eval.text_stream import TextStream
from llmtrain.eval.trained import TrainedRun, opened_run
from llmtrain.run.directory import write_json
from llmtrain.tokenizer.prompts import PromptEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text to continue."""

    prompt: str
    """Its text; of a conversation, as the chat template lays it out."""
    ids: tuple[int, ...]
    """Its tokens."""
    answer_only: bool = False
    """Whether the prompt is markup that is not shown before its continuation."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else its line in the file holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a request gave."""

    request: Request
    """The request."""
    text: str
    """The new text."""
    ids: tuple[int, ...]
    """The new tokens, those of a stop string included."""
    ended: Literal["end", "stop", "length"]
    """A token that ends texts, a stop string, or the limit."""


def continue_requests(
    run: TrainedRun,
    encoder: PromptEncoder,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    streams: Sequence[int] | None = None,
    show: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """Continue requests together, in their order; ``show`` gets (request, new text) as it comes."""
    texts = [TextStream(encoder.decode, request.ids, stop) for request in requests]

    def watch(row: int, token: int) -> bool:
        fresh = texts[row].push(token)
        if fresh and show is not None:
            show(row, fresh)
        return texts[row].stopped

    found = generate(
        run.model, [request.ids for request in requests], sampling, watch=watch, streams=streams,
        stop_ids={encoder.tokenizer.eos_id, *stop_ids}, vocab_size=encoder.tokenizer.vocab_size,
    )  # fmt: skip
    made = []
    for row, (request, text, ids) in enumerate(zip(requests, texts, found, strict=True)):
        rest = text.finish()
        if rest and show is not None:
            show(row, rest)
        short = len(ids) < sampling.max_new_tokens
        ended: Literal["end", "stop", "length"] = (
            "stop" if text.stopped else "end" if short else "length"
        )
        made.append(Continuation(request=request, text=text.text, ids=tuple(ids), ended=ended))
    return made


def read_requests(config: GenerateConfig, encoder: PromptEncoder) -> list[Request]:
    """Make a request of every prompt of the command line or of its file.

    Raises:
        DataError: a line of the file is no prompt, or there is no chat template to use.
    """
    if config.prompts_file is not None:
        rows = _rows(Path(config.prompts_file))
    else:
        prompts = (config.prompt,) if isinstance(config.prompt, str) else config.prompt
        rows = [{"prompt": prompt} for prompt in prompts]
    return [_request(row, config, encoder) for row in rows]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of prompts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts_file={path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        return [{"prompt": line} for line in lines if line]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        known = isinstance(row, dict) and (
            isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list)
        )
        if not known:
            raise DataError(
                f'{path}:{number} is no prompt; expected {{"prompt": TEXT}} or '
                '{"messages": [{"role": "user", "content": TEXT}, ...]}'
            )
        rows.append(row)
    return rows


def _request(row: Mapping[str, Any], config: GenerateConfig, encoder: PromptEncoder) -> Request:
    fields = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
    messages = row.get("messages")
    if messages is None and config.chat:
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages is None:
        text = str(row["prompt"])
        ids = encoder.encode(text) or [encoder.tokenizer.eos_id]
        return Request(prompt=text, ids=tuple(ids), fields=fields)
    if config.system is not None:
        messages = [{"role": "system", "content": config.system}, *messages]
    text = encoder.chat(messages)
    ids = encoder.encode(text, prefix=False)
    return Request(prompt=text, ids=tuple(ids), answer_only=True, fields=fields)


def stop_token_ids(names: Sequence[str | int], encoder: PromptEncoder) -> list[int]:
    """Return the ids of stop tokens given by id or name.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    ids = []
    for name in names:
        token = name if isinstance(name, int) else encoder.special.get(name, -1)
        if not 0 <= token < encoder.tokenizer.vocab_size:
            raise ConfigError(
                f"stop_tokens has {name!r}, which is no token of its own; use an id below "
                f"{encoder.tokenizer.vocab_size} or one of {', '.join(encoder.special) or 'none'}, "
                "or stop for a text"
            )
        ids.append(token)
    return ids


def _check_length(requests: Sequence[Request], config: GenerateConfig, run: TrainedRun) -> None:
    longest = max((len(request.ids) for request in requests), default=0) + config.max_new_tokens
    if longest > run.config.model.max_position_embeddings:
        raise ConfigError(
            f"prompt and max_new_tokens={config.max_new_tokens} make {longest} tokens, the model "
            f"is meant for {run.config.model.max_position_embeddings}; shorten the prompt or lower "
            "max_new_tokens"
        )


class _Writer:
    """Writes continuations, or the text of one while it is made."""

    def __init__(self, out: TextIO, config: GenerateConfig, streaming: bool) -> None:
        self._out = out
        self._jsonl = config.format == "jsonl"
        self._streaming = streaming
        self._count = 0

    def begin(self, request: Request) -> None:
        """Show the prompt of what follows."""
        if self._streaming:
            self._text(("\n" if self._count else "") + _head(request))

    def show(self, row: int, text: str) -> None:
        """Show more text."""
        self._text(text)

    def end(self, made: Continuation, sample: int) -> None:
        """Show a continuation, or the end of one that was shown."""
        if self._streaming:
            self._text("\n")
        elif self._jsonl:
            row = {
                **made.request.fields, "prompt": made.request.prompt, "sample": sample,
                "completion": made.text, "ids": made.ids, "ended": made.ended,
            }  # fmt: skip
            self._text(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            self._text(("\n" if self._count else "") + _head(made.request) + made.text + "\n")
        self._count += 1

    def _text(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _head(request: Request) -> str:
    return "" if request.answer_only else request.prompt


@contextmanager
def _output(config: GenerateConfig, rank: int) -> Iterator[TextIO | None]:
    """Where rank 0 writes; None on the others."""
    if rank > 0:
        yield None
    elif config.out is None:
        yield sys.stdout
    else:
        try:
            file = Path(config.out).open("w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"out={config.out} cannot be written: {error}") from None
        with file:
            yield file


def main(config: GenerateConfig) -> int:
    """Write each prompt and its continuations.

    Without a prompt the text starts from EOS, the end of the document before.
    """
    with (
        opened_run(config.run, config.step, config.parallel.tp) as run,
        _output(config, run.rank) as out,
    ):
        made = _continue_all(config, run, out)
        if config.save and run.rank == 0:
            sampling = asdict(_sampling(config))
            kept = [{"prompt": one.request.prompt, "completion": one.text, **sampling}
                    for one in made]  # fmt: skip
            write_json(run.directory.path / "samples.json", {"step": run.step, "samples": kept})
    return 0


def _sampling(config: GenerateConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )  # fmt: skip


def _continue_all(
    config: GenerateConfig, run: TrainedRun, out: TextIO | None
) -> list[Continuation]:
    """Continue every request ``num_samples`` times and write what comes, in order."""
    encoder = run.prompts()
    requests = read_requests(config, encoder)
    _check_length(requests, config, run)
    stop_ids = stop_token_ids(config.stop_tokens, encoder)
    jobs = [(request, n) for request in requests for n in range(config.num_samples)]
    single = len(jobs) == 1 and config.format == "text" and config.out is None
    streaming = sys.stdout.isatty() and single if config.stream is None else config.stream
    writer = None if out is None else _Writer(out, config, streaming)
    size = 1 if streaming else config.batch_size
    made: list[Continuation] = []
    for start in range(0, len(jobs), size):
        part = jobs[start : start + size]
        if writer is not None:
            writer.begin(part[0][0])
        found = continue_requests(
            run, encoder, [request for request, _ in part], _sampling(config),
            stop=config.stop, stop_ids=stop_ids, streams=range(start, start + len(part)),
            show=writer.show if writer is not None and streaming else None,
        )  # fmt: skip
        for (_, sample), one in zip(part, found, strict=True):
            if writer is not None:
                writer.end(one, sample)
        made += found
    return made
