"""A run as a model of lm-evaluation-harness, without an export.

Invariant: texts become ids, long ones are cut, and answers end as in the harness's own ``hf``
backend, so that the same weights get the same results from both: a pair is encoded as one text and
split, a context that is too long loses its beginning, a text without context is scored after BOS
(EOS where there is none). Log-probabilities are taken in fp32.

    model = HarnessModel(run, config.harness)
    lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])

lm_eval is imported with this module, which ``harness`` imports when tasks are to be run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llmtrain.config.generate import HarnessConfig
from llmtrain.errors import ConfigError
from llmtrain.eval.decoding import generate
from llmtrain.eval.sampling import Sampling
from llmtrain.eval.text_stream import TextStream
from llmtrain.eval.trained import TrainedRun

Pair = tuple[Any, list[int], list[int]]
"""(texts, ids of the context, ids of what is scored)."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1}


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks: log-likelihoods of texts, and answers."""

    def __init__(
        self,
        run: TrainedRun,
        config: HarnessConfig,
        *,
        between: Callable[[], None] = lambda: None,
        moves: Callable[[], None] = lambda: None,
    ) -> None:
        """Score with the model of ``run``.

        ``between`` is called before every batch, ``moves`` for every token of an answer.
        """
        super().__init__()
        self._run, self._config = run, config
        self._between, self._moves = between, moves
        self._encoder = run.prompts()
        self._quiet: bool | None = True if run.rank > 0 else None  # None: not on a terminal
        self._device = run.device
        self.max_length = run.config.model.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self._encoder.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        bos = self._encoder.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer from others."""
        return self._encoder.tokenizer.hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return ids; a text that begins with the prefix gets no second one."""
        begun = add_special_tokens is None and has_bos_prefix(
            string, self._encoder.name_of(self.prefix_token_id)
        )
        return self._encoder.encode(string, prefix=add_special_tokens is not False and not begun)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the name of the template for the record."""
        return str(self._encoder.folder) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Lay a conversation out; without a generation prompt its last message is open."""
        text = self._encoder.chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score pairs; those that share all inputs share a forward."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            inputs = (context + continuation)[-(self.max_length + 1) :][:-1]
            sharing.setdefault(tuple(inputs), []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        ordered = sorted(sharing, key=lambda inputs: (-len(inputs), inputs))
        for batch in self._batches(ordered, "scoring"):
            hidden = self._hidden(batch)
            for row, inputs in enumerate(batch):
                for index in sharing[inputs]:
                    targets = torch.tensor(requests[index][2], device=self._device)
                    end = len(inputs)
                    scored = hidden[row : row + 1, end - len(targets) : end]
                    found[index] = self._score(scored, targets)
        return found

    @torch.no_grad()
    def _hidden(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run rows of ids, filled up on the right: a token sees only what is before it."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        tokens = tokens.to(self._device)
        positions = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)
        hidden: torch.Tensor = self._run.model(tokens, positions)
        return hidden

    @torch.no_grad()
    def _score(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, bool]:
        """Sum log-probabilities of targets [S] after hidden [1, S, D]; are all the likeliest?"""
        logits = self._run.model.logits(hidden)[0, :, : self._run.num_ids]
        greedy = bool((logits.argmax(dim=-1) == targets).all())
        wide = torch.promote_types(logits.dtype, torch.float32)
        logs = logits.log_softmax(dim=-1, dtype=wide)
        return float(logs.gather(1, targets[:, None])[:, 0].sum()), greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Score whole texts in windows of the model's length, each token once."""
        windows: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for context, scored in map(make_disjoint_window, cut):
                windows.append((None, context, scored))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += nats
        return totals

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """Continue texts until a stop string, the end of a document or the limit."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        for settings, indices in alike.items():
            wanted = normalize_gen_kwargs(json.loads(settings), self._config.max_new_tokens)
            until = handle_stop_sequences(
                wanted.pop("until", None), eos=self._encoder.name_of(self.eot_token_id)
            )
            sampling = _sampling(wanted, self._config.seed)
            prompts = {i: self._cut(requests[i].args[0], sampling) for i in indices}
            ordered = sorted(indices, key=lambda i: (-len(prompts[i]), i))
            for batch in self._batches(ordered, "answering"):
                made = self._answers([prompts[i] for i in batch], batch, until, sampling)
                for index, answer in zip(batch, made, strict=True):
                    answers[index] = answer
        return answers

    def _cut(self, text: str, sampling: Sampling) -> list[int]:
        """Encode a context; its beginning goes where it leaves no room for an answer."""
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"an answer of {sampling.max_new_tokens} tokens leaves no room for its question: "
                f"model.max_position_embeddings={self.max_length}; lower harness.max_new_tokens, "
                "or max_gen_toks of the task"
            )
        return self.tok_encode(text)[-room:]

    def _answers(
        self,
        prompts: Sequence[list[int]],
        streams: Sequence[int],
        until: list[str],
        sampling: Sampling,
    ) -> list[str]:
        texts = [TextStream(self._encoder.decode, stop=until) for _ in prompts]

        def watch(row: int, token: int) -> bool:
            self._moves()
            texts[row].push(token)
            return texts[row].stopped

        found = generate(
            self._run.model, prompts, sampling, stop_ids={self.eot_token_id},
            vocab_size=self._encoder.tokenizer.vocab_size, streams=streams, watch=watch,
        )  # fmt: skip
        return [
            str(postprocess_generated_text(self._encoder.decode(ids), until, None)) for ids in found
        ]

    def _batches(self, items: Sequence[Any], what: str) -> Iterator[Sequence[Any]]:
        size = self._config.batch_size
        starts: Iterable[int] = range(0, len(items), size)
        for start in tqdm(starts, desc=what, disable=self._quiet, leave=False):
            self._between()
            yield items[start : start + size]


def _sampling(wanted: dict[str, Any], seed: int) -> Sampling:
    """Read the generation settings of a task.

    Raises:
        ConfigError: it asks for something we cannot.
    """
    limit = int(wanted.pop("max_gen_toks"))
    if not wanted.pop("do_sample", False):
        wanted["temperature"] = 0.0
        for name in ("top_k", "top_p", "min_p"):
            wanted.pop(name, None)
    fields: Mapping[str, Any] = {name: wanted.pop(name) for name in _SAMPLING if name in wanted}
    unknown = {k: v for k, v in wanted.items() if _WITHOUT_EFFECT.get(k, object()) != v}
    if unknown:
        raise ConfigError(
            f"a task has generation_kwargs {unknown}; this model knows max_gen_toks, until, "
            f"do_sample, {', '.join(_SAMPLING)}: leave the rest out of the task"
        )
    return Sampling(max_new_tokens=limit, seed=seed, **fields)
