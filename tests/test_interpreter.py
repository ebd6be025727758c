"""What the kernel tests rely on in Triton's interpreter, and get only after interpreter.install()."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interp


@triton.jit
def _bf16_kernel(x_ptr, y_ptr, product_ptr, sum_ptr, top_ptr, less_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i * N + j)
    y = tl.load(y_ptr + i * N + j)
    tl.store(product_ptr + i * N + j, tl.dot(x, y).to(tl.bfloat16))
    tl.store(sum_ptr + i * N + j, x * y + 1.0)
    tl.store(top_ptr + tl.arange(0, N), tl.max(x, 1))
    tl.store(less_ptr + i * N + j, x < y)


def test_bfloat16_is_computed_in_fp32_and_rounded_to_nearest():
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    product, total, top, less = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x[0]), torch.empty_like(x)
    less = less.to(torch.bool)
    _bf16_kernel[(1,)](x, y, product, total, top, less, N=32)
    torch.testing.assert_close(product, (x.double() @ y.double()).bfloat16())
    assert torch.equal(total, x * y + 1)
    assert torch.equal(top, x.amax(1))
    assert torch.equal(less, x < y)


@triton.jit
def _arrival_kernel(order_ptr, counter_ptr):
    tl.store(order_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def test_shuffled_programs_arrive_in_another_order():
    orders = []
    for seed in range(4):
        order, counter = torch.empty(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with interpreter.shuffled(seed):
            _arrival_kernel[(8,)](order, counter)
        assert sorted(order.tolist()) == list(range(8))
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) > 1


@triton.jit
def _barrier_kernel(seen_ptr, counter_ptr, expected):
    tl.atomic_add(counter_ptr, 1)
    while tl.atomic_add(counter_ptr, 0) < expected:
        pass
    tl.store(seen_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 0))


def test_threaded_programs_pass_a_grid_barrier():
    seen, counter = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreter.threaded():
        _barrier_kernel[(6,)](seen, counter, 6)
    assert (seen == 6).all()


def test_a_barrier_that_nobody_can_pass_ends_in_an_error():
    seen, counter = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreter.threaded(timeout_s=1), pytest.raises(TimeoutError, match="never passed"):
        _barrier_kernel[(2,)](seen, counter, 3)
