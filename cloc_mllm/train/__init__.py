"""One training loop for both stages: `train()` in loop.py; a stage adds a `step_fn`."""
