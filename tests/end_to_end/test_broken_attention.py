"""A run whose attention backend ignores document masks is refused before its first step."""

from pathlib import Path

import torch

from llmtrain.ops.attention import varlen
from llmtrain.ops.attention.documents import DOCUMENTS
from llmtrain.ops.attention.kernel import Call, Kernel
from tests.end_to_end.commands import TINY, make_store, run_words
from tests.world import fork_rank


def _blind_to_documents(call: Call) -> Call:
    """Ask for everything as one document."""
    ends = torch.tensor([0, int(call.cu_q[-1])], dtype=torch.int32)
    return Call(
        cu_q=ends, cu_k=ends, max_q=int(ends[1]), max_k=int(ends[1]),
        causal=call.causal, window=call.window, softcap=call.softcap,
    )  # fmt: skip


def run_broken(place: object, words: list[str], log: str) -> int:
    """Run a command in a process whose kernel sees across documents."""
    varlen.KERNELS["documents"] = Kernel(
        lambda q, k, v, call: DOCUMENTS.forward(q, k, v, _blind_to_documents(call)),
        lambda *a: DOCUMENTS.backward(*a[:-1], _blind_to_documents(a[-1])),
    )
    return run_words(place, words, log, {})


def test_train_refuses_a_backend_that_ignores_the_mask(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    store = make_store(tmp_path / "store", seed=1)
    words = ["train", *TINY, "name=broken", f"runs_dir={tmp_path}", f"data.sources.a={store}"]
    rank = fork_rank()
    rank.pipe.send((run_broken, 0, 1, "", (words, str(log))))
    assert rank.pipe.poll(120)
    failed, status = rank.pipe.recv()
    rank.pipe.close()
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert (failed, status) == (False, 2), log.read_text()
    assert len(said) == 1
    assert "attention backend documents sees other documents" in said[0]
    assert "set engine.attention=sdpa or reference" in said[0]
    assert not (tmp_path / "broken" / "metrics.jsonl").exists()
