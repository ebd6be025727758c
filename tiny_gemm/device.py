"""Facts about the device a tensor lives on, asked once and cached; nothing happens at import."""

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
    cluster_room: tuple[int, ...] = ()  # for clusters of 1, 2, ... blocks, where it was asked: see clusters_of

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch: a kernel may start while the one before it still runs."""
        return self.is_nvidia and self.capability >= (9, 0)

    def clusters_of(self, blocks: int) -> int:
        """How many clusters of so many blocks, each of which fills an SM, find room at once; at most so many."""
        return self.cluster_room[blocks - 1] if self.cluster_room else self.sm_count // blocks

    @property
    def has_clusters(self) -> bool:
        """Blocks that write into each other's shared memory, as triton_cluster.py has them do: tried on Hopper only."""
        return self.is_nvidia and self.capability == (9, 0)


# Clusters, whose blocks must find room together, find so much of what a chip has for blocks; more come in two waves.
# Found on an H200, 2026-11-30 (docs/notes).
CLUSTERS_FILL = 0.78

CLUSTER_BLOCKS = 8  # a cluster has at most, on any chip that has them

# What kernels see in Triton's interpreter: a tiny chip, so that small tests have several waves of blocks.
INTERPRETED = DeviceFacts("interpreter", (8, 0), 4, shared_memory_bytes=99 * 1024, is_nvidia=False)


_FACTS: dict[torch.device, DeviceFacts] = {}


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a CUDA or ROCm device; a CPU device means Triton's interpreter."""
    facts = _FACTS.get(device)  # a device's own attributes take longer to read
    if facts is None:
        if device.type == "cpu":
            return INTERPRETED
        if device.index is None:
            return device_facts(torch.device(device.type, torch.cuda.current_device()))
        facts = _FACTS[device] = _ask(device)
    return facts


def _ask(device: torch.device) -> DeviceFacts:
    p = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    return DeviceFacts(
        name=p.name,
        capability=(p.major, p.minor),
        sm_count=p.multi_processor_count,
        shared_memory_bytes=p.shared_memory_per_block_optin if is_nvidia else 64 * 1024,
        is_nvidia=is_nvidia,
    )


# What torch.cuda.current_device() and current_stream(index).cuda_stream give, in less host time: the one asks each time
# whether CUDA is set up (it is, where there is a tensor on it), the other makes an object.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)


def processor(device: torch.device) -> str:
    """What a figure was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"CPU, {n} thread{'s' if n > 1 else ''}"


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together, each element once; for the costs that kernels declare."""
    return sum(t.nbytes for t in tensors if t is not None)


_COUNTERS: dict[tuple[str, tuple[int, int]], Tensor] = {}
_RETIRED: list[Tensor] = []  # buffers that grew too small: kernels of another thread may still be using them
_CAPTURED: dict[tuple[str, torch.device], tuple[Tensor, int]] = {}  # the pool for CUDA graphs, and what is given out
_CAPTURED_COUNTERS = 2**20
_COUNTERS_ALIGN = 32  # int32 in a cache line of 128 bytes
_SCRATCH: dict[tuple[int, int], Tensor] = {}
_SCRATCH_KEPT = 2**20  # float32, 4 MiB


def counters(device: torch.device, n: int, kind: str = "arrivals") -> Tensor:
    """At least n int32 in device memory that start as zeros and are kept for ever, for kernels of one `kind`.

    A kernel that counts arrivals leaves them at zero (the last block to arrive resets its own), so no launch has to
    clear them. Every stream has its own, so that kernels on two streams do not count each other's blocks. In a CUDA
    graph every launch has its own, from a pool that is set up by the op's first ordinary call (the usual warm-up) and
    begins anew after a million counters.
    """
    stream = _current_stream(device)
    if stream is None:
        if (kind, device) not in _CAPTURED:
            raise RuntimeError("run the op once before capturing it in a CUDA graph: it sets up its counters then")
        pool, used = _CAPTURED[kind, device]
        start = used if used + n <= _CAPTURED_COUNTERS else 0
        _CAPTURED[kind, device] = pool, start + -(-n // _COUNTERS_ALIGN) * _COUNTERS_ALIGN
        return pool[start:]
    buffer = _COUNTERS.get((kind, stream))
    if buffer is not None and buffer.numel() >= n:
        return buffer
    if device.type != "cpu" and (kind, device) not in _CAPTURED:
        _CAPTURED[kind, device] = torch.zeros(_CAPTURED_COUNTERS, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream(device).synchronize()  # once; a replay waits for no stream of ours
    if buffer is not None:
        _RETIRED.append(buffer)
    buffer = _COUNTERS[kind, stream] = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
    return buffer


def set_up_counters(device: torch.device, kind: str = "arrivals") -> None:
    """So that a later launch which counts may be captured, where this one does not count but is an ordinary call."""
    if (kind, device) not in _CAPTURED and _current_stream(device) is not None:
        counters(device, 1, kind)


def scratch(x: Tensor, n: int) -> Tensor:
    """At least n float32 where x is, for what the blocks of one launch tell each other; it comes with any content.

    An allocation takes as much host time as a launch, so every stream keeps one for its kernels, which follow each
    other. A CUDA graph, which may be replayed on another stream, gets its own, and so does a launch that needs much.
    """
    stream = None if n > _SCRATCH_KEPT or x.is_cpu else _current_stream(x.device)
    if stream is None:
        return x.new_empty(n, dtype=torch.float32)
    buffer = _SCRATCH.get(stream)
    if buffer is None:
        buffer = _SCRATCH[stream] = x.new_empty(_SCRATCH_KEPT, dtype=torch.float32)
    return buffer


def _current_stream(device: torch.device) -> tuple[int, int] | None:
    """(device, stream) to keep something for; None while the stream is being captured in a CUDA graph."""
    index = _index(device)
    if index < 0:
        return index, 0
    if index != current_device():  # of which it is asked whether its stream is captured
        with torch.cuda.device(index):
            return _current_stream(device)
    return None if torch.cuda.is_current_stream_capturing() else (index, raw_stream(index))


@cache
def _index(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device.index
