"""New weights into running engines: what the trainer exports x how the bytes travel."""

from vime.weight_sync.sender import SyncReport, WeightSender, make_sender

__all__ = ["SyncReport", "WeightSender", "make_sender"]
