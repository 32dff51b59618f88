"""The one training loop, its checkpoints, its sweeps and its trackers."""
