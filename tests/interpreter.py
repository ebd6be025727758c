"""Makes Triton's interpreter (TRITON_INTERPRET=1) trustworthy for our kernels. Test-only; made for triton 3.6.

`install()` patches triton.runtime.interpreter once:

- bfloat16: the stock interpreter keeps bf16 as uint16 and then computes on the bit patterns (add, mul, compare, dot,
  reductions, int <-> bf16), silently wrong; fp32 -> bf16 truncates. Here bf16 is widened to fp32, computed, and rounded
  to nearest even.
- program order: `shuffled(seed)` runs the programs of a grid in a random order, so that another one arrives last.
- grid barriers: `threaded()` runs every program in a thread of its own, so that one that waits for its siblings makes
  progress; a failed or stuck sibling ends the launch with an error instead of a hang.

Inline assembly, libdevice and the gdc_* calls do not exist in the interpreter; kernels leave them out by a constexpr.
"""

import contextlib
import inspect
import random
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
InterpreterBuilder = interpreter.InterpreterBuilder


@dataclass
class _Schedule:
    """How the next launches walk their grid: "row_major", "shuffled" (by seed) or "threaded"."""

    mode: str = "row_major"
    seed: int = 0
    timeout_s: float = 60.0
    aborted: bool = False


_schedule = _Schedule()
_program = threading.local()
_installed = False
_LANGUAGE_USER = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what _patch_lang takes for a kernel


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Launches in this context run their programs in a random order that `seed` fixes."""
    _schedule.mode, _schedule.seed = "shuffled", seed
    try:
        yield
    finally:
        _schedule.mode = "row_major"


@contextlib.contextmanager
def threaded(timeout_s: float = 60.0) -> Iterator[None]:
    """Launches in this context run all their programs at once, one thread each; TimeoutError after `timeout_s`."""
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    _schedule.mode, _schedule.timeout_s = "threaded", timeout_s
    try:
        yield
    finally:
        sys.setswitchinterval(switch_interval)
        _schedule.mode = "row_major"


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; every NaN becomes the quiet NaN 0x7fc0."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _fp32_data(handle: TensorHandle) -> np.ndarray:
    return bf16_to_fp32(handle.data) if _is_bf16(handle) else handle.data.astype(np.float32, copy=False)


def _bf16_handle(values: np.ndarray) -> TensorHandle:
    return TensorHandle(fp32_to_bf16(values), tl.bfloat16)


def install() -> None:
    """Patches the interpreter; calling it again does nothing."""
    global _installed
    if not _installed:
        _installed = True
        _patch_bf16(InterpreterBuilder)
        _patch_reductions(interpreter.ReduceOps)
        _patch_grid(InterpreterBuilder, interpreter.GridExecutor)


def _patch_bf16(builder: type) -> None:
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    stock_binary, stock_unary, stock_dot = builder.binary_op, builder.unary_op, builder.create_dot
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def cast_impl(self, src, dst_type):
        dst = dst_type.scalar
        if _is_bf16(src) and dst != tl.bfloat16:
            return TensorHandle(bf16_to_fp32(src.data).astype(interpreter._get_np_dtype(dst)), dst)
        if dst == tl.bfloat16 and not _is_bf16(src):
            return _bf16_handle(src.data.astype(np.float32))
        return stock_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and (_is_bf16(src) or dst_type.scalar == tl.bfloat16):
            return cast_impl(self, src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if _is_bf16(lhs) and _is_bf16(rhs) and op not in bitwise:
            out = op(bf16_to_fp32(lhs.data), bf16_to_fp32(rhs.data))
            return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else _bf16_handle(out)
        return stock_binary(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        return _bf16_handle(op(bf16_to_fp32(arg.data))) if _is_bf16(arg) else stock_unary(self, arg, op)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # Half-precision products go through fp32 as on the tensor cores (and through BLAS, not numpy's fp16 loop).
        if d.data.dtype == np.float32 and (_is_bf16(a) or a.data.dtype == np.float16):
            return TensorHandle(np.matmul(_fp32_data(a), _fp32_data(b)) + d.data, d.dtype.scalar)
        return stock_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def create_fma(self, x, y, z):
        if _is_bf16(z):
            return _bf16_handle(bf16_to_fp32(x.data) * bf16_to_fp32(y.data) + bf16_to_fp32(z.data))
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    def get_bf16(self, value):
        return _bf16_handle(np.array([value], dtype=np.float32))

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_dot, builder.create_fma, builder.get_bf16 = create_dot, create_fma, get_bf16


def _patch_reductions(reduce_ops: type) -> None:
    stock_min_max, stock_sum = reduce_ops.min_max, reduce_ops.sum

    def widened(self, tensor):
        return self.to_tensor(bf16_to_fp32(tensor.handle.data), tl.float32)

    def narrowed(self, tensor):
        return self.to_tensor(fp32_to_bf16(tensor.handle.data), tl.bfloat16)

    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        values = input[0] if isinstance(input, tuple) else input
        if not _is_bf16(values.handle):
            return stock_min_max(self, input, val_reduce_op, idx_reduce_op)
        out = stock_min_max(self, widened(self, values), val_reduce_op, idx_reduce_op)
        if isinstance(out, tuple):
            return narrowed(self, out[0]), out[1]
        return narrowed(self, out) if val_reduce_op else out

    def sum(self, input):
        if not _is_bf16(input.handle):
            return stock_sum(self, input)
        return narrowed(self, stock_sum(self, widened(self, input)))

    reduce_ops.min_max, reduce_ops.sum = min_max, sum


def _patch_grid(builder: type, executor: type) -> None:
    builder.grid_idx = property(
        lambda self: getattr(_program, "index", None), lambda self, index: setattr(_program, "index", index)
    )

    def unless_aborted(method):
        def checked(self, *args, **kwargs):
            if _schedule.mode == "threaded" and _schedule.aborted:
                raise RuntimeError("another program of this launch failed or the launch timed out")
            return method(self, *args, **kwargs)

        return checked

    builder.create_atomic_rmw = unless_aborted(builder.create_atomic_rmw)
    builder.create_atomic_cas = unless_aborted(builder.create_atomic_cas)
    builder.create_load = unless_aborted(builder.create_load)

    stock_patch_lang = interpreter._patch_lang

    def __call__(self, *args_dev, **kwargs):
        parameters = inspect.getfullargspec(self.fn).args
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
        args_host, kwargs_host = self._init_args_hst(args_dev, kwargs)
        for hook in self.pre_run_hooks:
            hook(*args_host, **kwargs_host)
        scope = stock_patch_lang(_LANGUAGE_USER)
        # numpy 2.4 refuses int() of a one-element array.
        scope.set_attr(tl.core.tensor, "__index__", lambda tensor: int(np.ravel(tensor.handle.data)[0]))
        # Every device function that a kernel calls would patch triton.language once more: slow, never undone, and not
        # thread-safe. It is patched here, once a launch.
        scope.set_attr(interpreter, "_patch_lang", lambda fn: None)
        try:
            args = inspect.getcallargs(self.fn, *args_host, **kwargs_host)
            args = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in args.items()}
            grid = tuple(self.grid(args) if callable(self.grid) else self.grid)
            grid += (1,) * (3 - len(grid))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            programs = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
            if _schedule.mode == "shuffled":
                random.Random(_schedule.seed).shuffle(programs)
            (_run_threaded if _schedule.mode == "threaded" else _run_in_order)(self.fn, args, programs)
        finally:
            scope.restore()
        self._restore_args_dev(args_dev, args_host, kwargs, kwargs_host)

    executor.__call__ = __call__


def _run_in_order(fn, args: dict, programs: list[tuple[int, int, int]]) -> None:
    for index in programs:
        interpreter.interpreter_builder.set_grid_idx(*index)
        try:
            fn(**args)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error


def _run_threaded(fn, args: dict, programs: list[tuple[int, int, int]]) -> None:
    errors = []

    def run(index):
        try:
            interpreter.interpreter_builder.set_grid_idx(*index)
            fn(**args)
        except Exception as error:
            errors.append(error)
            _schedule.aborted = True

    _schedule.aborted = False
    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in programs]
    try:
        deadline = time.monotonic() + _schedule.timeout_s
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        _schedule.aborted = True
    if errors:
        raise interpreter.InterpreterError(repr(errors[0])) from errors[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"programs still waiting after {_schedule.timeout_s} s: a grid barrier never passed")
