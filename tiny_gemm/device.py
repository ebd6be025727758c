"""Facts about the device a tensor lives on, asked once and cached; nothing happens at import."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceFacts:
    """What pick_config functions decide by. shared_memory_bytes: the most one block may use."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory_bytes: int
    is_nvidia: bool

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch: a kernel may start while the one before it still runs."""
        return self.is_nvidia and self.capability >= (9, 0)


# What kernels see in Triton's interpreter: a tiny chip, so that small tests have several waves of blocks.
INTERPRETED = DeviceFacts("interpreter", (8, 0), 4, shared_memory_bytes=99 * 1024, is_nvidia=False)


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a CUDA or ROCm device; a CPU device means Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETED
    return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_facts(index: int) -> DeviceFacts:
    p = torch.cuda.get_device_properties(index)
    is_nvidia = torch.version.hip is None
    return DeviceFacts(
        name=p.name,
        capability=(p.major, p.minor),
        sm_count=p.multi_processor_count,
        shared_memory_bytes=p.shared_memory_per_block_optin if is_nvidia else 64 * 1024,
        is_nvidia=is_nvidia,
    )


def device_guard(t: Tensor):
    """Makes t's GPU the current one while a kernel is launched; costs nothing on a machine with one GPU or on CPU."""
    if t.device.type == "cpu" or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


def processor(device: torch.device) -> str:
    """What a figure was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"CPU, {n} thread{'s' if n > 1 else ''}"


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together, each element once; for the costs that kernels declare."""
    return sum(t.nbytes for t in tensors if t is not None)


_COUNTERS: dict[tuple[str, torch.device, int], Tensor] = {}
_RETIRED: list[Tensor] = []  # buffers that grew too small: kernels of another thread may still be using them
_CAPTURED: dict[tuple[str, torch.device], tuple[Tensor, int]] = {}  # the pool for CUDA graphs, and what is given out
_CAPTURED_COUNTERS = 2**20
_COUNTERS_ALIGN = 32  # int32 in a cache line of 128 bytes


def counters(device: torch.device, n: int, kind: str = "arrivals") -> Tensor:
    """At least n int32 in device memory that start as zeros and are kept for ever, for kernels of one `kind`.

    A kernel that counts arrivals leaves them at zero (the last block to arrive resets its own), so no launch has to
    clear them. Every stream has its own, so that kernels on two streams do not count each other's blocks. In a CUDA
    graph every launch has its own, from a pool that is set up by the op's first ordinary call (the usual warm-up) and
    begins anew after a million counters.
    """
    if device.type == "cpu":
        return _stream_counters(kind, device, 0, n)
    if torch.cuda.is_current_stream_capturing():
        if (kind, device) not in _CAPTURED:
            raise RuntimeError("run the op once before capturing it in a CUDA graph: it sets up its counters then")
        pool, used = _CAPTURED[kind, device]
        start = used if used + n <= _CAPTURED_COUNTERS else 0
        _CAPTURED[kind, device] = pool, start + -(-n // _COUNTERS_ALIGN) * _COUNTERS_ALIGN
        return pool[start:]
    if (kind, device) not in _CAPTURED:
        _CAPTURED[kind, device] = torch.zeros(_CAPTURED_COUNTERS, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream(device).synchronize()  # once; a replay waits for no stream of ours
    return _stream_counters(kind, device, torch.cuda.current_stream(device).cuda_stream, n)


def _stream_counters(kind: str, device: torch.device, stream: int, n: int) -> Tensor:
    buffer = _COUNTERS.get((kind, device, stream))
    if buffer is None or buffer.numel() < n:
        if buffer is not None:
            _RETIRED.append(buffer)
        buffer = _COUNTERS[kind, device, stream] = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
    return buffer
