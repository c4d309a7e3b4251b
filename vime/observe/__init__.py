"""What a run shows and saves: metrics.jsonl, progress line, trackers, timers, plots."""

from vime.observe.metrics import MetricsLog, read_metrics
from vime.observe.progress import Progress
from vime.observe.run_log import RunLog
from vime.observe.timers import Timers
from vime.observe.trackers import Tracker, make_trackers

__all__ = ["MetricsLog", "Progress", "RunLog", "Timers", "Tracker", "make_trackers", "read_metrics"]
