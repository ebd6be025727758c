"""Facts about the device a tensor lives on, asked once and cached; nothing happens at import."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceFacts:
    """What pick_config functions decide by. shared_memory_bytes: the most one block may use. l2_bytes: size of L2."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory_bytes: int
    l2_bytes: int
    is_nvidia: bool

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch exists from sm_90 on."""
        return self.is_nvidia and self.capability >= (9, 0)


# What kernels see in Triton's interpreter: a tiny chip, so that small tests have several waves of blocks.
INTERPRETED = DeviceFacts("interpreter", (8, 0), 4, shared_memory_bytes=99 * 1024, l2_bytes=2**20, is_nvidia=False)


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
        l2_bytes=p.L2_cache_size,
        is_nvidia=is_nvidia,
    )


def device_guard(t: Tensor):
    """Makes t's GPU the current one while a kernel is launched; costs nothing on a machine with one GPU or on CPU."""
    if t.device.type == "cpu" or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


_COUNTERS: dict[tuple[str, torch.device, int], Tensor] = {}
_RETIRED: list[Tensor] = []  # buffers that grew too small; CUDA graphs may still hold their addresses
_CAPTURE = -1  # stands for the stream of every capture


def counters(device: torch.device, n: int, kind: str = "arrivals") -> Tensor:
    """At least n int32 in device memory that start as zeros and are kept for ever, for the current stream and `kind`.

    A kernel that counts arrivals leaves them at zero (the last block to arrive resets its own), so no launch has to
    clear them. Each stream has its own, so that kernels on two streams do not count each other's blocks. CUDA graphs
    share one set, which an ordinary call has to set up before (the usual warm-up): two graphs that hold such kernels
    must not be replayed at the same time.
    """
    if device.type == "cpu":
        return _reserve_counters(kind, device, 0, n)
    if torch.cuda.is_current_stream_capturing():
        buffer = _COUNTERS.get((kind, device, _CAPTURE))
        if buffer is None or buffer.numel() < n:
            raise RuntimeError("run the op once before capturing it in a CUDA graph: it sets up its counters then")
        return buffer
    _reserve_counters(kind, device, _CAPTURE, n)
    return _reserve_counters(kind, device, torch.cuda.current_stream(device).cuda_stream, n)


def _reserve_counters(kind: str, device: torch.device, stream: int, n: int) -> Tensor:
    buffer = _COUNTERS.get((kind, device, stream))
    if buffer is None or buffer.numel() < n:
        if buffer is not None:
            _RETIRED.append(buffer)
        buffer = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once; a capture's stream waits for nothing else
        _COUNTERS[(kind, device, stream)] = buffer
    return buffer
