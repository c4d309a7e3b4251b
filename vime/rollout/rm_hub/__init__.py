"""Rewards. `--rm-type` names a grader here; who grades a sample is decided in `grading.py`."""
