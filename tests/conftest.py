"""What all tests share: the markers, the tolerances, and outputs that are poisoned before an op runs.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process either interprets kernels or compiles them:

    TRITON_INTERPRET=1 pytest -m interp      kernels in Triton's interpreter (mended by interpreter.py), no GPU needed
    pytest -m "not interp and not gpu"       everything else that needs no GPU; compiles kernels too (aot)
    pytest -m gpu                            kernels on a CUDA device
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# An element may be off by this times (its own size + the root mean square around it): see assert_close.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

MARKERS = {
    "interp": "runs kernels in Triton's interpreter; needs TRITON_INTERPRET=1",
    "aot": "compiles kernels for GPUs that need not be there; needs TRITON_INTERPRET unset",
    "gpu": "runs kernels on a CUDA device",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if os.environ.get("PYTEST_XDIST_WORKER"):  # else each of the processes takes all cores
        torch.set_num_threads(1)
    if INTERPRETED:
        import interpreter

        interpreter.install()


def pytest_collection_modifyitems(items):
    reasons = {}
    if INTERPRETED:
        reasons["aot"] = "kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET"
        reasons["gpu"] = "kernels are interpreted in this process: unset TRITON_INTERPRET"
    else:
        reasons["interp"] = "needs Triton's interpreter: TRITON_INTERPRET=1 pytest -m interp"
        if not torch.cuda.is_available():
            reasons["gpu"] = "needs a CUDA device"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poisoned():
    """torch.empty gives NaN (floats) and the largest value (integers), so that what an op leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel in Gluon is for Hopper")


def assert_close(actual: torch.Tensor, oracle: torch.Tensor, *, dtype: torch.dtype | None = None, factor: float = 1.0):
    """Compares `actual` with a float64 `oracle` under TOLERANCES[dtype], by default that of `actual`'s own dtype.

    The root mean square is that of the whole or of the element's row (last dimension), whichever is larger: the first
    rows of causal attention average few values and are much larger than the others.
    `factor` widens the tolerance where a computation rounds more than once on its way; say why at the call.
    """
    assert oracle.dtype == torch.float64, "the oracle is computed in float64"
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)} where {tuple(oracle.shape)} was expected"
    tolerance = factor * TOLERANCES[dtype or actual.dtype]
    actual, oracle = actual.detach().cpu().double(), oracle.detach().cpu()
    assert torch.isfinite(actual).all(), f"{(~torch.isfinite(actual)).sum()} of {actual.numel()} values are not finite"
    error = (actual - oracle).abs()
    square = oracle.square()
    around = square.mean().maximum(square.mean(-1, keepdim=True)).sqrt() if oracle.numel() else 0.0
    excess = error - tolerance * (oracle.abs() + around)
    if actual.numel() and excess.max() > 0:
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        pytest.fail(
            f"{(excess > 0).sum()} of {actual.numel()} values off by more than {tolerance:.1e}; "
            f"worst at {at}: {actual[at]:.6g} where {oracle[at]:.6g} was expected"
        )
