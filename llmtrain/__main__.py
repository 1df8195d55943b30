"""``python -m llmtrain``: the command line, also for torchrun and deepspeed."""

from llmtrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
