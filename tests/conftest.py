"""What all tests share: deterministic property tests, and programs that are compiled fast."""

import os

# Most tests compile a program to run it once: less optimisation of its machine code saves a third of their time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("fixed")
