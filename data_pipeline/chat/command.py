"""``llmtrain-data chat``: conversations to a token store, packed for training.

Files are tasks: the command may be killed and given again. A finished store is left as it is.

    llmtrain-data chat input=chats.jsonl tokenizer=DIR sequence_length=4096 out=stores/chat
"""

import json
import logging
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_pipeline.chat.encode import ChatRules
from data_pipeline.chat.tasks import chat_file
from data_pipeline.commands import check_parts, text_files
from data_pipeline.config.chat import ChatConfig
from data_pipeline.config.commands import PackConfig
from data_pipeline.config.tokens import StoreConfig
from data_pipeline.execute.local import InlineExecutor, LocalExecutor
from data_pipeline.folder import note_inputs
from data_pipeline.manifest import Manifest
from data_pipeline.read.inputs import RawFile, file_inputs
from data_pipeline.report.funnel import make_row, summarise
from data_pipeline.stages import Context, Stage, exclusive
from data_pipeline.tokens.pack import pack_with
from data_pipeline.tokens.stores import StoreJob, withdraw
from data_pipeline.tokens.tokenize import HELD_OUT
from llmtrain.data.pack_blocks import pack_name
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError
from llmtrain.tokenizer.chat import find_template
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

logger = logging.getLogger(__name__)


def chat(config: ChatConfig) -> int:
    """Write the store, and say in one line of JSON what it holds."""
    out = Path(config.out)
    files = text_files(out.absolute().name, config.input)
    rules = _rules(config)
    job = StoreJob(
        tokenizer_path=config.tokenizer, tokenizer=load_tokenizer(config.tokenizer),
        config=StoreConfig(part_bytes=config.part_bytes), memory_bytes=0, pipeline_hash="",
    )  # fmt: skip
    given = {
        "special": rules.encoder(config.tokenizer).prompts.names, "id_field": config.id_field,
        "validation_share": config.validation_share,
    }  # fmt: skip
    settings = {**job.settings(), **asdict(rules), **given}
    inline = config.num_workers == 1
    with (
        exclusive(out / ".pipeline"),
        nullcontext() if inline else LocalExecutor(config.num_workers, config.time_limit_s) as pool,
    ):
        note_inputs(out / ".pipeline", files)
        context = Context(
            out=out / ".pipeline", executor=pool or InlineExecutor(), progress=sys.stderr.isatty()
        )
        stage = Stage(context, "chat", settings, file_inputs(files), out)
        manifest = stage.finished() or _write(config, job, stage, rules, files)
    found = _told(out, manifest, config.sequence_length, stage.seconds())
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _rules(config: ChatConfig) -> ChatRules:
    """Read the template now: it is part of what the store was made with."""
    if config.chat_template is None:
        tokenizer = Path(config.tokenizer)
        template = find_template(tokenizer if tokenizer.is_dir() else tokenizer.parent)
    else:
        path = Path(config.chat_template)
        if not path.is_file():
            raise DataError(f"chat_template={path} does not exist; give a file with Jinja")
        template = path.read_text(encoding="utf-8")
    return ChatRules(
        sequence_length=config.sequence_length, kind=config.kind,
        last_only=config.train_on == "last", template=template,
        arguments=dict(config.template_arguments), day=config.date,
    )  # fmt: skip


def _write(
    config: ChatConfig, job: StoreJob, stage: Stage, rules: ChatRules, files: list[RawFile]
) -> Manifest:
    common = {
        "rules": rules, "id_field": config.id_field, "share": config.validation_share,
        "tokenizer": config.tokenizer, "tokenizer_hash": job.tokenizer.hash,
        "part_bytes": config.part_bytes,
    }  # fmt: skip
    jobs = [({**common, "index": i, "file": f}, f.size) for i, f in enumerate(files)]
    withdraw(stage, (".", HELD_OUT))
    results = stage.run("parts", chat_file, jobs)
    details = {
        "answered_tokens": sum(result.details["answered_tokens"].get(".", 0) for result in results),
        "longest": max(result.details["longest"] for result in results),
    }
    return replace(job, pipeline_hash=stage.key).finish(
        stage, results, job.tokenizer.library, lambda parts: check_parts(stage.target, parts),
        details,
    )  # fmt: skip


def _told(out: Path, manifest: Manifest, sequence_length: int, seconds: float) -> dict[str, Any]:
    """Pack the stores and say what they hold."""
    logger.info("%s", summarise(make_row(str(out), manifest.counts, seconds)))
    found: dict[str, Any] = {"store": str(out)}
    for name in sorted(manifest.details["stores"]):
        folder = out / name
        if not (folder / pack_name(TokenStore.open(folder), sequence_length)).is_file():
            packed = PackConfig(store=str(folder), sequence_length=sequence_length)
            pack_with(packed, InlineExecutor())
    stores = manifest.details["stores"]
    found |= {"documents": stores["."]["documents"], "tokens": stores["."]["tokens"]}
    found["answered_tokens"] = manifest.details["answered_tokens"]
    if HELD_OUT in stores:
        found["validation_documents"] = stores[HELD_OUT]["documents"]
    return {**found, "longest": manifest.details["longest"], "dropped": manifest.counts.dropped}
