"""What all tests share: a deterministic seed, a fixed hypothesis profile, one warning silenced."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    # torch deprecates the quantized tensors that ours are compared with.
    for what in ("torch.quantize_per_tensor", "torch.ao.quantization"):
        config.addinivalue_line("filterwarnings", f"ignore:{what}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
