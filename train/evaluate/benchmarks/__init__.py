"""The benchmarks. Each module has `TASKS`, a tuple of `train.evaluate.task.Task`; `train.evaluate.registry` lists them."""
