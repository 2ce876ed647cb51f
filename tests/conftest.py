"""What all tests share: deterministic property tests."""

import hypothesis

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("fixed")
