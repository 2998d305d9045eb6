import pytest

pytest.register_assert_rewrite("tests.conformance", "tests.training_bench")
