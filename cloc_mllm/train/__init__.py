"""Training. All stages share one loop, `train()` in loop.py; each brings its own `step_fn`."""
