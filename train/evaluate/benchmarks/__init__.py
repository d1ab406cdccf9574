"""The benchmarks. Each module has `TASKS`, a tuple of `train.evaluate.task.Task`. The registry names the modules."""
