"""`python -m qwen_jax` is `qwen-jax`."""

import sys

from qwen_jax.cli import main

sys.exit(main())
