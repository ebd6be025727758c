"""Launcher: its key against Triton's own specialization, its short cut against Triton's own launch, and on a GPU.

Without a GPU the short cut is tried on a driver that launches nothing: Triton binds, specializes and compiles as ever,
and what the C launcher would be given is written down.
"""

import contextlib
import inspect
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from tiny_gemm import launcher, triton_gemm
from tiny_gemm.launcher import FixedLaunch, Launcher, specialize
from tiny_gemm.triton_fused_transformer import attention, decode_attention, ffn, norm


@triton.jit
def _scale_kernel(x_ptr, bias_ptr, y_ptr, n, step, factor, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    """y[i] = x[i * step] * factor (+ bias[i]), negated or not."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    y = tl.load(x_ptr + offs * step, mask=mask, other=0.0).to(tl.float32) * factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, -y if NEGATE else y, mask=mask)


CASES = {  # n, step, offset of x in elements, with a bias, dtype of x
    "aligned": (1024, 1, 0, True, torch.float32),
    "no_bias": (1024, 1, 0, False, torch.float32),
    "unaligned": (1000, 1, 1, True, torch.float32),
    "n_1": (1, 1, 0, True, torch.float32),
    "n_16": (16, 1, 0, True, torch.float32),
    "n_17": (17, 1, 0, True, torch.float32),
    "step_2": (100, 2, 0, True, torch.float32),
    "step_16": (100, 16, 4, True, torch.float32),
    "half": (100, 3, 3, False, torch.float16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case, device="cpu"):
    """(grid, tensors, scalars, expected y) for _scale_kernel."""
    n, step, offset, with_bias, dtype = case
    x = torch.arange(offset + n * step, device=device).to(dtype)[offset:]
    bias = torch.arange(n, device=device, dtype=torch.float32) if with_bias else None
    y = torch.full((n,), float("nan"), device=device)
    expected = x[::step].float() * 0.5 + (bias if with_bias else 0.0)
    return (triton.cdiv(n, 64), 1, 1), (x, bias, y), (n, step, 0.5), expected


every_way = pytest.mark.parametrize("way", ["Launcher", "FixedLaunch"])


def scale(way, grid, scalars, **options):
    """What launches _scale_kernel for tensors."""
    launcher = Launcher(_scale_kernel, BLOCK=64, NEGATE=False, **options)
    if way == "FixedLaunch":
        return FixedLaunch(launcher, grid, scalars)
    return lambda tensors: launcher(grid, tensors, scalars)


# ---------------------------------------------------------------------------------------------------------------------
# The key
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**31 - 16, -(2**31), -(2**31) - 1]
NUMBERS += [-(2**31) - 16, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 16, 2**64, 2**70, -(2**63), -(2**63) - 16]
NUMBERS += [True, False, 0.0, 1.0, 16.0, 0.5, float("inf"), float("nan")]
STORAGE = torch.zeros(64, dtype=torch.int8)
TENSORS = [None, STORAGE[:0]]
TENSORS += [STORAGE[start:].view(dtype) for dtype in (torch.int8, torch.uint8) for start in (0, 1, 8, 16, 32)]
TENSORS += [STORAGE[start:].view(dtype) for dtype in (torch.int16, torch.float16, torch.bfloat16) for start in (0, 2)]
TENSORS += [STORAGE[start:].view(dtype) for dtype in (torch.int32, torch.float32) for start in (0, 4, 16)]


def tritons_specialization(argument):
    specialize_impl = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    try:
        return specialize_impl(CUDABackend(GPUTarget("cuda", 90, 32)), argument, False, True, True)
    except OverflowError:
        return "too large to launch"


def test_numbers_of_one_key_are_one_to_triton():
    for a, b in itertools.product(NUMBERS, repeat=2):
        if specialize((), (a,))[0] == specialize((), (b,))[0]:
            assert tritons_specialization(a) == tritons_specialization(b), (a, b)


def test_tensors_of_one_key_are_one_to_triton():
    x = STORAGE
    for a, b in itertools.product(TENSORS, repeat=2):
        for left, right in (((x, a), (x, b)), ((x[1:], a), (x[1:], b)), ((x, a, b), (x, b, a))):
            if specialize(left, ())[0] == specialize(right, ())[0]:
                assert [*map(tritons_specialization, left)] == [*map(tritons_specialization, right)]


def test_the_key_is_no_finer_than_needed():
    x = STORAGE
    assert specialize((x, None), (17, 0.5))[0] == specialize((x[16:], None), (19, 0.25))[0]
    assert specialize((x[1:], x), (16, 1))[0] == specialize((x[3:], x[32:]), (4096, 1))[0]
    assert specialize((x, None, x[5:]), ())[1] == [x.data_ptr(), 0, x.data_ptr() + 5]


def test_many_numbers_are_forgotten_again():
    classes = launcher._NumberClasses()
    for n in range(2**15):
        assert classes[n] == launcher._number_class(n)
    assert len(classes) <= 2**14


# ---------------------------------------------------------------------------------------------------------------------
# The short cut, without a GPU
# ---------------------------------------------------------------------------------------------------------------------


class RecordingLauncher(nvidia.CudaLauncher):
    """Triton's launcher for NVIDIA, with a C function that only writes its arguments down."""

    calls: list[tuple] = []

    def __init__(self, src, metadata):
        self.num_ctas = 1
        self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.launch = lambda *args: RecordingLauncher.calls.append(args)


class RecordingDriver(DriverBase):
    """A chip of capability 9.0 that is not there: `device`, whose current stream is `stream`."""

    launcher_cls = RecordingLauncher

    def __init__(self):
        self.utils, self.stream, self.device, self.loaded = self, 7, 1000, 0

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        return nvidia.ty_to_cpp(ty)

    def get_benchmarker(self):
        raise NotImplementedError

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name, kernel, shared, device):
        self.loaded += 1
        return 0, self.loaded, 32, 0, 1024


@pytest.fixture
def chip(monkeypatch):
    """The driver that launches nothing, as Triton's active one; made for Triton 3.6."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip("another Triton gives its C launcher other arguments")
    chip = RecordingDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", chip)
    monkeypatch.setattr(launcher, "raw_stream", lambda device: chip.stream)
    monkeypatch.setattr(RecordingLauncher, "calls", [])
    for device in (1000, 1001):
        _scale_kernel.device_caches.pop(device, None)  # kernels of an earlier test
    return chip


@pytest.fixture
def ordinary_launches(monkeypatch):
    """A list that grows with every launch by JITFunction.run."""
    launches, run = [], JITFunction.run

    def counted(self, *args, **kwargs):
        launches.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return launches


def plain(arguments):
    """Arguments of a C launcher with tensors as addresses, and without launch metadata, hooks and constexprs."""
    grid_to_flags, scratch, metadata, own = arguments[:7], arguments[7:9], arguments[9], arguments[13:]
    own = [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in own]
    return grid_to_flags, scratch, metadata, own[:6]


@pytest.mark.aot
@pytest.mark.parametrize(
    "options", [{}, {"launch_pdl": True}, {"launch_cooperative_grid": True, "num_warps": 8}], ids=str
)
@every_case
@every_way
def test_the_short_cut_launches_what_triton_does(chip, ordinary_launches, way, case, options):
    grid, tensors, scalars, _ = make(case)
    launch = scale(way, grid, scalars, **options)
    launch(tensors)
    launch(tensors)
    if way == "FixedLaunch":
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
        assert list(launch._kept) == [-1] * aligned
    if way == "FixedLaunch" and aligned:
        launch.launcher = SimpleNamespace(is_short=lambda: True)  # all that is left to ask
        launch(tensors)
        assert RecordingLauncher.calls.pop() == RecordingLauncher.calls[-1]
    first, second = map(plain, RecordingLauncher.calls)
    assert first == second
    assert first[0][:4] == (*grid, chip.stream) and first[2][0] == options.get("num_warps", 4)
    assert RecordingLauncher.calls[1][10:13] == (None, None, None), "no metadata, no hooks"
    assert len(ordinary_launches) == 1


@pytest.mark.aot
def test_every_specialization_has_its_kernel(chip, ordinary_launches):
    launch, wanted = Launcher(_scale_kernel, BLOCK=64, NEGATE=False), []
    for case in [*CASES.values()] * 3:
        grid, tensors, scalars, _ = make(case)
        launch(grid, tensors, scalars)
        wanted.append(tuple(map(tritons_specialization, (*tensors, *scalars))))
    kernels = dict(zip(wanted, (call[4] for call in RecordingLauncher.calls), strict=True))
    assert [kernels[w] for w in wanted] == [call[4] for call in RecordingLauncher.calls]
    assert len(set(kernels.values())) == len(kernels) == chip.loaded == len(ordinary_launches)


@pytest.mark.aot
def test_a_fixed_launch_looks_at_every_address(chip, ordinary_launches):
    grid, (x, bias, y), scalars, _ = make(CASES["aligned"])
    moved = [torch.zeros(t.numel() + 1)[1:] for t in (x, bias, y)]
    launch = scale("FixedLaunch", grid, scalars)
    for _ in range(2):
        for tensors in ((x, bias, y), (moved[0], bias, y), (x, moved[1], y), (x, bias, moved[2])):
            launch(tensors)
    kernels = [call[4] for call in RecordingLauncher.calls]
    assert kernels[:4] == kernels[4:] and len(set(kernels)) == 4 == len(ordinary_launches)
    assert plain(RecordingLauncher.calls[-1])[3][:3] == [t.data_ptr() for t in (x, bias, moved[2])]


@pytest.mark.aot
def test_constexprs_streams_and_grids_are_told_apart(chip, ordinary_launches):
    grid, tensors, scalars, _ = make(CASES["aligned"])
    launchers = [Launcher(_scale_kernel, BLOCK=64, NEGATE=negate) for negate in (False, True)]
    for launch in launchers * 2:
        launch(grid, tensors, scalars)
    assert [call[4] for call in RecordingLauncher.calls] == [1, 2, 1, 2] and len(ordinary_launches) == 2
    chip.stream = 8
    launchers[0]((5, 6, 7), tensors, scalars)
    assert RecordingLauncher.calls[-1][:5] == (5, 6, 7, 8, 1) and len(ordinary_launches) == 2


@pytest.mark.aot
@pytest.mark.parametrize("is_watched_first", [False, True])
@every_way
def test_clusters_are_launched_whichever_way_is_taken(chip, monkeypatch, way, is_watched_first):
    """The short cut and, while somebody watches, Triton's own way: clusters of four each time."""
    grid, tensors, scalars, _ = make(CASES["aligned"])
    launch, hooked = scale(way, grid, scalars, cluster=4), []
    for is_watched in (is_watched_first, not is_watched_first, False, False):
        hook = lambda *args, **kwargs: hooked.append(args)  # noqa: E731
        monkeypatch.setattr(_scale_kernel, "pre_run_hooks", [hook] * is_watched)
        launch(tensors)
    assert [call[:3] for call in RecordingLauncher.calls] == [grid] * 4 and len(hooked) == 1
    assert [call[9] for call in RecordingLauncher.calls] == [(4, 4, 0)] * 4, "warps, blocks of a cluster, shared memory"


@pytest.mark.aot
def test_clusters_that_would_wait_for_ever_are_not_launched(chip):
    grid, tensors, scalars, _ = make(CASES["aligned"])
    with pytest.raises(RuntimeError, match="_scale_kernel: a thread sends 0 times, and 3 are waited for"):
        scale("Launcher", grid, scalars, cluster=4, sends=3)(tensors)
    assert not RecordingLauncher.calls


class On:
    """A tensor that says that it is on a device."""

    def __init__(self, device, tensor):
        self.get_device, self.dtype, self.data_ptr = lambda: device, tensor.dtype, tensor.data_ptr


@pytest.mark.aot
@every_way
def test_each_device_has_its_kernel_and_becomes_the_current_one(chip, ordinary_launches, monkeypatch, way):
    @contextlib.contextmanager
    def guard(device):
        before, chip.device = chip.device, device
        yield
        chip.device = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(launcher, "current_device", chip.get_current_device)
    grid, (x, bias, y), scalars, _ = make(CASES["aligned"])
    launch = scale(way, grid, scalars)
    for device in (1000, 1001, 1000, 1001):
        launch((On(device, x), bias, y))
    assert [call[4] for call in RecordingLauncher.calls] == [1, 2, 1, 2] and len(ordinary_launches) == 2
    assert chip.device == 1000


@pytest.mark.aot
@every_way
def test_whoever_watches_sees_every_launch(chip, ordinary_launches, monkeypatch, way):
    grid, tensors, scalars, _ = make(CASES["aligned"])
    launch = scale(way, grid, scalars)
    launch(tensors)
    runtime = triton.knobs.runtime

    def is_ordinary():
        before = len(ordinary_launches)
        launch(tensors)
        return len(ordinary_launches) == before + 1

    hook = lambda metadata: None  # noqa: E731
    assert not is_ordinary()
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        assert is_ordinary()
        chain.remove(hook)
        assert not is_ordinary()
    for place, name, value in (
        (runtime, "launch_enter_hook", triton.knobs.HookChain()),
        (runtime, "launch_exit_hook", None),
        (runtime, "debug", True),
        (_scale_kernel, "pre_run_hooks", [lambda *args, **kwargs: None]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert is_ordinary(), name
        assert not is_ordinary(), name


@pytest.mark.aot
@pytest.mark.parametrize("version", ["3.5.1", "3.9.0", "4.0"])
@every_way
def test_an_unknown_triton_launches_the_ordinary_way(chip, ordinary_launches, monkeypatch, version, way):
    monkeypatch.setattr(triton, "__version__", version)
    grid, tensors, scalars, _ = make(CASES["aligned"])
    launch = scale(way, grid, scalars)
    launch(tensors)
    launch(tensors)
    assert len(ordinary_launches) == 2


@pytest.mark.aot
def test_a_kernel_that_needs_scratch_is_launched_by_tritons_launcher(chip, monkeypatch):
    grid, tensors, scalars, _ = make(CASES["aligned"])
    compiled = _scale_kernel[grid](*tensors, *scalars, BLOCK=64, NEGATE=False)
    assert launcher._c_launcher(compiled)[0] is compiled.run.launch
    monkeypatch.setattr(compiled.run, "global_scratch_size", 128)
    assert launcher._c_launcher(compiled)[0] is compiled.run


def test_this_triton_is_known():
    """What the short cut relies on, read from Triton itself: where this fails, it must be written anew."""
    assert launcher.knows_triton() or not triton.__version__.startswith(("3.6.", "3.7."))
    if not launcher.knows_triton():
        pytest.skip(f"Triton {triton.__version__}: every launch is an ordinary one")
    call = list(inspect.signature(nvidia.CudaLauncher.__call__).parameters)
    assert call[1:6] == ["gridX", "gridY", "gridZ", "stream", "function"]
    source = inspect.getsource(JITFunction.run)
    assert (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata" in source
    )
    assert "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())" in source
    if triton.__version__.startswith("3.6."):  # grid, stream, function, cooperative, PDL; scratch, metadata and hooks
        assert nvidia._BASE_ARGS_FORMAT == "iiiKKppOOOOOO"


KERNELS = [
    value
    for module in (triton_gemm, ffn, norm, attention, decode_attention)
    for name, value in vars(module).items()
    if name.endswith("_kernel") and value.fn.__module__ == module.__name__
]


@pytest.mark.aot
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_our_kernels_can_take_the_short_cut(kernel):
    assert launcher._constexpr_arguments(kernel) == (None,) * len(kernel.constexprs)


@pytest.mark.interp
@every_case
def test_same_results_in_the_interpreter(case):
    grid, tensors, scalars, expected = make(case)
    for negate in (False, True, False):
        Launcher(_scale_kernel, BLOCK=64, NEGATE=negate, num_warps=2)(grid, tensors, scalars)
        assert torch.equal(tensors[2], -expected if negate else expected)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_same_results_on_a_gpu():
    """Each case three times, in turns with the others, through one Launcher."""
    launch = Launcher(_scale_kernel, BLOCK=64, NEGATE=False, num_warps=2)
    for case in [*CASES.values()] * 3:
        grid, tensors, scalars, expected = make(case, "cuda")
        launch(grid, tensors, scalars)
        assert torch.equal(tensors[2], expected), case


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.hip is not None, reason="the short cut is for NVIDIA")
@pytest.mark.parametrize("case", ["aligned", "unaligned"])
@every_way
def test_the_second_call_takes_the_short_cut(ordinary_launches, way, case):
    grid, _, scalars, _ = make(CASES[case])
    launch = scale(way, grid, scalars)
    for _ in range(3):
        _, tensors, _, expected = make(CASES[case], "cuda")
        launch(tensors)
        assert torch.equal(tensors[2], expected)
    assert len(ordinary_launches) == 1


@pytest.mark.gpu
@every_way
def test_captured_in_a_cuda_graph(way):
    grid, tensors, scalars, expected = make(CASES["aligned"], "cuda")
    launch = scale(way, grid, scalars)
    launch(tensors)
    tensors[2].fill_(7.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(tensors)
    torch.cuda.synchronize()
    assert (tensors[2] == 7.0).all(), "a captured launch does not run"
    graph.replay()
    assert torch.equal(tensors[2], expected)


@pytest.mark.gpu
@every_way
def test_on_the_current_stream(way):
    grid, tensors, scalars, expected = make(CASES["aligned"], "cuda")
    launch = scale(way, grid, scalars)
    launch(tensors)
    tensors[2].fill_(7.0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        launch(tensors)
    early = tensors[2].clone()  # on the default stream, which waits for nobody
    side.synchronize()
    assert (early == 7.0).all() and torch.equal(tensors[2], expected)


@pytest.mark.gpu
@every_way
def test_a_hook_that_is_set_in_between_sees_its_launches(way):
    grid, _, scalars, _ = make(CASES["aligned"])
    launch, seen = scale(way, grid, scalars), []
    hooks = triton.knobs.runtime.launch_enter_hook
    note = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    for hooked in (False, False, True, True, False):
        (hooks.add if hooked else hooks.remove)(note)
        try:
            _, tensors, _, expected = make(CASES["aligned"], "cuda")
            launch(tensors)
        finally:
            hooks.remove(note)
        assert torch.equal(tensors[2], expected)
    assert seen == ["_scale_kernel"] * 2


@pytest.mark.gpu
def test_threads_with_streams_of_their_own():
    launch, errors = Launcher(_scale_kernel, BLOCK=64, NEGATE=False, num_warps=2), []
    for case in CASES.values():  # compiled here: whether Triton compiles in many threads is not the question
        launch(*make(case, "cuda")[:3])

    def work(case):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    grid, tensors, scalars, expected = make(case, "cuda")
                    launch(grid, tensors, scalars)
                    assert torch.equal(tensors[2], expected), case
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in CASES.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_becomes_the_current_one():
    launch = Launcher(_scale_kernel, BLOCK=64, NEGATE=False, num_warps=2)
    for device in ("cuda:1", "cuda:0", "cuda:1", "cuda:0"):
        grid, tensors, scalars, expected = make(CASES["aligned"], device)
        launch(grid, tensors, scalars)
        assert torch.equal(tensors[2], expected)
    assert torch.cuda.current_device() == 0
