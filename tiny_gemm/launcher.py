"""Launches of Triton kernels that cost little host time.

    Launcher(kernel, **meta)(grid, tensors, scalars)    means    kernel[grid](*tensors, *scalars, **meta)

kernel[grid] binds and specializes every argument at every call, which is most of what an eager call costs. A Launcher
keeps the compiled kernel that came out for each specialization and from then on hands pointers and numbers straight to
that kernel's C launcher. Make one for each combination of constexprs and options, and keep it:

    @cache
    def _launcher(config: GemmConfig, group_size: int, facts: DeviceFacts) -> Launcher:
        return Launcher(_kernel, BLOCK_N=config.block_n, GROUP_SIZE=group_size, num_warps=4, **pdl_options(facts))

    _launcher(config, group_size, facts)((blocks_m, blocks_n, 1), (x, w, None, y), (m, n, k, x.stride(0)))

Where a shape comes again and again, as in a decode step, a FixedLaunch of it costs a quarter less: it looks at nothing
but the tensors' addresses.

With cluster=n the launch has n times the grid's first dimension of blocks, n neighbours of which are a cluster (see
triton_cluster.py), where launches_clusters(). sends: how many st.async the kernel has, which if it had another number
would wait for ever; None where that says nothing. All launches of such a kernel, with these constexprs, are of such
clusters.

What computes a grid in each call does without triton.cdiv and triton.next_power_of_2: they are functions that kernels
call too, look at each argument, and take 3 to 6 us, as long as a launch.

The kernel's parameters are pointers (tensors or None, the first a tensor), then numbers, then constexprs; the grid has
three sizes. The tensors lie on one device, which the caller has checked: it becomes the current one, and the launch
goes to its current stream.

The short cut is taken where its conditions were read in the source: Triton 3.6 and 3.7 on NVIDIA. Elsewhere, in the
interpreter, in debug and instrumentation modes, and while a launch hook is set (profilers set one), every call is the
ordinary one. A kept kernel does not notice that a global which it reads, or a compilation knob of Triton, has changed.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from tiny_gemm.device import current_device, raw_stream

_runtime, _compilation = knobs.runtime, knobs.compilation
_enter_hooks, _exit_hooks = (getattr(_runtime, f"launch_{when}_hook", None) for when in ("enter", "exit"))


class Launcher:
    """A kernel with its constexprs and options; see the module."""

    def __init__(self, kernel, *, cluster: int = 1, sends: int | None = 0, **meta):
        self.kernel, self.meta, self.cluster, self.sends = kernel, meta, cluster, sends
        self._kept: dict[tuple, tuple] = {}  # (device, key of the specialization) -> (launch, fixed arguments)
        self._constexprs = _constexpr_arguments(kernel) if knows_triton() else None  # None: no short cut

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], scalars: tuple[int | float, ...]
    ) -> None:
        device = tensors[0].get_device()  # -1 for a CPU, that is the interpreter
        if device >= 0 and device != current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, scalars)
        if not self.is_short():
            self._make_cluster(grid, tensors, scalars)
            self.kernel[grid](*tensors, *scalars, **self.meta)
            return
        key, pointers = specialize(tensors, scalars)
        kept = self._kept.get((device, key))
        if kept is not None:
            launch, fixed = kept
            launch(*grid, raw_stream(device), *fixed, *pointers, *scalars, *self._constexprs)
            return
        self._make_cluster(grid, tensors, scalars)
        compiled = self.kernel[grid](*tensors, *scalars, **self.meta)
        if isinstance(compiled, CompiledKernel) and all(type(n) in (int, float, bool) for n in scalars):
            self._kept[device, key] = _c_launcher(compiled)

    def _make_cluster(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], scalars: tuple[int | float, ...]
    ) -> None:
        """Compiles the kernel, if it is not, and has Triton launch clusters of it, in whichever way it is launched.

        To Triton num_ctas means blocks that share a program, with layouts of their own. But it is its launcher that
        makes clusters, as many as it is told with each launch, of whatever was compiled.
        """
        if self.cluster == 1:
            return
        hooks, self.kernel.pre_run_hooks = self.kernel.pre_run_hooks, []  # they are for launches
        try:
            compiled = self.kernel.warmup(*tensors, *scalars, grid=grid, **self.meta)
        finally:
            self.kernel.pre_run_hooks = hooks
        if hasattr(compiled, "result"):  # it is being compiled by another thread
            compiled = compiled.result()
        if compiled is None or compiled.packed_metadata[1] == self.cluster:  # None: a hook of Triton's forbids it
            return
        sends = compiled.asm["ptx"].count("st.async")
        if self.sends is not None and sends != self.sends:
            raise RuntimeError(f"{self.kernel.__name__}: a thread sends {sends} times, and {self.sends} are waited for")
        num_warps, _, shared_memory = compiled.packed_metadata
        compiled.packed_metadata = num_warps, self.cluster, shared_memory
        compiled.run.num_ctas = self.cluster  # by which scratch is measured

    def is_short(self) -> bool:
        """Whether a launch may take the short cut now."""
        return not (
            self._constexprs is None
            or _runtime.launch_enter_hook is not _enter_hooks
            or _runtime.launch_exit_hook is not _exit_hooks
            or _enter_hooks.calls
            or _exit_hooks.calls
            or _runtime.debug
            or _compilation.instrumentation_mode
            or self.kernel.pre_run_hooks
        )

    def kept(self, device: int, tensors: tuple[Tensor | None, ...], scalars: tuple[int | float, ...]) -> tuple | None:
        """(the C launcher, its arguments before and behind the pointers) for arguments like these, if one is kept."""
        found = self._kept.get((device, specialize(tensors, scalars)[0]))
        return None if found is None else (found[0], found[1], (*scalars, *self._constexprs))


class FixedLaunch:
    """A Launcher with its grid and numbers, for tensors of which only the addresses differ between calls: each is None
    in every call or in none, and of one dtype. That is the caller's promise; nobody looks."""

    def __init__(self, launcher: Launcher, grid: tuple[int, int, int], scalars: tuple[int | float, ...]):
        self.launcher, self.grid, self.scalars = launcher, grid, scalars
        self._kept: dict[int, tuple] = {}  # device -> what to launch where all addresses are multiples of 16

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        low_bits = 0
        for p in pointers:
            low_bits |= p
        device = tensors[0].get_device()
        kept = self._kept.get(device)
        is_here = device < 0 or device == current_device()
        if kept is not None and is_here and low_bits & 15 == 0 and self.launcher.is_short():
            launch, before, behind = kept
            launch(*self.grid, raw_stream(device), *before, *pointers, *behind)
            return
        self.launcher(self.grid, tensors, self.scalars)
        if kept is None and low_bits & 15 == 0 and self.launcher.is_short():
            found = self.launcher.kept(device, tensors, self.scalars)
            if found is not None:
                self._kept[device] = found


def specialize(tensors: tuple[Tensor | None, ...], scalars: tuple[int | float, ...]) -> tuple[tuple, list[int]]:
    """(key, pointers). For arguments of one key Triton launches one compiled kernel.

    Which one it is depends on each tensor's dtype and on whether 16 divides its address, on which of them are None, on
    each number's type and, of an integer, on what _NumberClasses asks.
    """
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    low_bits = 0
    for p in pointers:
        low_bits |= p
    key = (
        low_bits & 15 and tuple([p & 15 == 0 for p in pointers]),
        *[None if t is None else t.dtype for t in tensors],
        *map(type, scalars),
        *map(_number_class, scalars),
    )
    return key, pointers


class _NumberClasses(dict):
    """number -> all that Triton asks of an integer's value: whether it is 1 or a multiple of 16, and how wide it is."""

    def __missing__(self, n: int | float) -> int:
        if len(self) >= 2**14:
            self.clear()
        facts = n == 1, n % 16 == 0, -(2**31) <= n < 2**31, -(2**63) <= n < 2**63, 0 <= n < 2**64
        self[n] = bits = sum(fact << i for i, fact in enumerate(facts))
        return bits


_number_class = _NumberClasses().__getitem__


def knows_triton() -> bool:
    """Whether the short cut was written for this Triton."""
    known = triton.__version__.startswith(("3.6.", "3.7.")) and torch.version.hip is None
    return known and type(_enter_hooks) is type(_exit_hooks) is knobs.HookChain


@cache
def launches_clusters() -> bool:
    """Whether a Launcher can: what it tells Triton's launcher was read in the source of this Triton."""
    return triton.__version__.startswith("3.6.") and torch.version.hip is None


def _constexpr_arguments(kernel) -> tuple[None, ...] | None:
    """What a C launcher is given for the constexprs, which it skips; None where the kernel is not compiled just in time
    or has other parameters behind them."""
    if not isinstance(kernel, JITFunction):  # also of Gluon
        return None
    total, count = len(kernel.params), len(kernel.constexprs)
    return (None,) * count if kernel.constexprs == list(range(total - count, total)) else None


def _c_launcher(compiled: CompiledKernel) -> tuple:
    """(launch, its arguments between the stream and the kernel's own), without launch metadata and hooks."""
    run = compiled.run
    needs_scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if triton.__version__.startswith("3.6.") and not needs_scratch:  # what CudaLauncher.__call__ would do
        flags = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, (compiled.function, *flags, None, None, compiled.packed_metadata, None, None, None)
    return run, (compiled.function, compiled.packed_metadata, None, None, None)
