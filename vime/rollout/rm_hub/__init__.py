"""The graders that --rm-type names. `vime/rollout/grading.py` chooses one for a sample."""
