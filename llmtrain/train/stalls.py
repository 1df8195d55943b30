"""Seconds the loop stands still for saves, and an event for each that failed.

checkpoints = TimedSaves(checkpoints, events)    # what the loop saves with
checkpoints.fields()                             # {"checkpoint_s": 1.8}, since the last call
"""

from llmtrain.hang.heartbeat import Heartbeat, Phase
from llmtrain.run.progress import Progress
from llmtrain.train.events import Events
from llmtrain.train.loop import Saver
from llmtrain.train.metrics import Row


class TimedSaves:
    """A saver that says how long the loop waited for another."""

    def __init__(self, saver: Saver, events: Events, beat: Heartbeat) -> None:
        """Watch ``saver``; ``beat`` is told when the loop stands still for it."""
        self._saver = saver
        self._events = events
        self._beat = beat
        self._reported_s = saver.stalled_s
        self._saved = True

    @property
    def stalled_s(self) -> float:
        """See ``Saver``."""
        return self._saver.stalled_s

    def due(self, progress: Progress) -> bool:
        """See ``Saver``."""
        return self._saver.due(progress)

    def save(self, progress: Progress) -> bool:
        """See ``Saver``."""
        self._beat.at(Phase.SAVE)
        saved = self._told(self._saver.save(progress))
        self._beat.at(Phase.OBSERVE)
        return saved

    def wait(self) -> bool:
        """See ``Saver``."""
        self._beat.at(Phase.SAVE)
        return self._told(self._saver.wait())

    def _told(self, saved: bool) -> bool:
        """Of failures that follow each other the first is an event."""
        if not saved and self._saved:
            self._events.write("save_failed", "a checkpoint was not written; the log says why")
        self._saved = saved
        return saved

    def fields(self) -> Row:
        """Seconds since the last call, as a field of a row."""
        before, self._reported_s = self._reported_s, self.stalled_s
        return {"checkpoint_s": self._reported_s - before}
