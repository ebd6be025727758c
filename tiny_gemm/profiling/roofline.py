"""What a kernel could do at best, and what keeps it from that: device figures, waves of a grid, verdicts."""

import re
from dataclasses import dataclass

LAUNCH, LATENCY, BANDWIDTH, COMPUTE, UNKNOWN = (
    "launch-bound",
    "latency-bound",
    "bandwidth-bound",
    "compute-bound",
    "not known",
)
VERDICTS = (LAUNCH, LATENCY, BANDWIDTH, COMPUTE, UNKNOWN)

FIXED_COST_US = 3.3  # launch, first bytes from memory and the last block's tail, on an H100
AT_THE_ROOF = 0.6


@dataclass(frozen=True)
class Ceiling:
    """What the maker states: memory GB/s, and dense bf16 (fp16 where there is no bf16) tensor TFLOP/s."""

    gbps: float
    tflops: float


# From the makers' datasheets, without sparsity; the first key that the device's name contains. Boost clocks that no
# power limit allows for long: a measured roof is 5 to 10 % below.
_DATASHEETS = (
    ("GH200", Ceiling(4000, 989)),
    ("H200", Ceiling(4800, 989)),
    ("H100 NVL", Ceiling(3900, 835)),
    ("H100 PCIe", Ceiling(2000, 756)),
    ("H100", Ceiling(3350, 989)),
    ("H800", Ceiling(3350, 989)),
    ("H20", Ceiling(4000, 148)),
    ("B200", Ceiling(8000, 2250)),
    ("B300", Ceiling(8000, 2250)),
    ("A100-SXM4-80GB", Ceiling(2039, 312)),
    ("A100 80GB", Ceiling(1935, 312)),
    ("A100", Ceiling(1555, 312)),
    ("A800", Ceiling(1935, 312)),
    ("A10G", Ceiling(600, 70)),
    ("A10", Ceiling(600, 125)),
    ("A30", Ceiling(933, 165)),
    ("A40", Ceiling(696, 150)),
    ("L40S", Ceiling(864, 362)),
    ("L40", Ceiling(864, 181)),
    ("L4", Ceiling(300, 121)),
    ("T4", Ceiling(320, 65)),
    ("V100", Ceiling(900, 125)),
    ("RTX PRO 6000", Ceiling(1792, 504)),
    ("RTX 6000 Ada", Ceiling(960, 364)),
    ("RTX A6000", Ceiling(768, 155)),
    ("RTX 5090", Ceiling(1792, 210)),
    ("RTX 5080", Ceiling(960, 113)),
    ("RTX 4090", Ceiling(1008, 165)),
    ("RTX 4080", Ceiling(717, 98)),
    ("RTX 4070", Ceiling(504, 58)),
    ("RTX 3090", Ceiling(936, 71)),
    ("RTX 3080", Ceiling(760, 60)),
    ("RTX 3060", Ceiling(360, 26)),
    ("MI300X", Ceiling(5300, 1307)),
    ("MI325X", Ceiling(6000, 1307)),
    ("MI250X", Ceiling(3277, 383)),
)


def datasheet(device_name: str) -> Ceiling | None:
    """The datasheet's figures for a device by its name, or None: an unknown device is not guessed at."""
    if re.search(r"laptop|max-q|mig |\bti\b|super", device_name, re.IGNORECASE):
        return None
    for key, ceiling in _DATASHEETS:
        if re.search(rf"\b{key}\b", device_name, re.IGNORECASE):
            return ceiling
    return None


def resident_blocks(device: dict, threads: int, registers: int, shared_memory: int) -> int | None:
    """Blocks that one SM can hold at once, from the trace's deviceProperties; None where those do not say enough.

    threads a block, registers a thread, shared_memory a block in bytes. NVIDIA allots registers to warps in units of
    256 and keeps 1 KiB of shared memory a block (from sm_80 on).
    """
    warp = device.get("warpSize") or 32
    most_threads = device.get("maxThreadsPerMultiprocessor")
    all_registers = device.get("regsPerMultiprocessor")
    all_shared = device.get("sharedMemPerMultiprocessor")
    if not (most_threads and threads):
        return None
    warps = -(-threads // warp)
    limits = [32, most_threads // (warps * warp)]
    if all_registers and registers:
        limits.append(all_registers // (warps * -(-registers * warp // 256) * 256))
    if all_shared and shared_memory:
        limits.append(all_shared // (shared_memory + 1024))
    return max(1, min(limits))


@dataclass(frozen=True)
class Verdict:
    """What limits a kernel, why this is said, and what to do about it."""

    kind: str
    reason: str
    advice: str


def verdict(
    *,
    duration_us: float,
    gap_us: float,
    blocks: int | None = None,
    sm_count: int | None = None,
    roof_fraction: float | None = None,
    intensity: float | None = None,
    ridge: float | None = None,
    peak_fraction: float | None = None,
    overlapped: bool = False,
) -> Verdict:
    """What limits a kernel that takes duration_us after gap_us of an idle device. None: not known, never guessed.
    overlapped: it begins while the kernel before it runs, and duration_us counts from that one's end.

    In this order:
    1. gap > duration: launch-bound. More of its wall time goes by before it than in it: a faster kernel gains less than
       half.
    2. intensity (flops a byte) over the device's ridge and 60 % of its peak flops: compute-bound.
    3. 60 % of the memory roof: bandwidth-bound. Kernels that stream reach 85 to 95 %, small ones lose the rest to their
       fixed cost; below 60 % that cost, or too few bytes in flight, is the larger part.
    4. shorter than 5 us, 1.5 times the fixed cost of any kernel: latency-bound, and no better grid would change that.
    5. fewer blocks than SMs: latency-bound, the grid does not fill the chip.
    6. shorter than 10 us, three times the fixed cost: latency-bound, there is too little work in it.
    7. otherwise, where its bytes are known: latency-bound, the grid fills the chip but too few bytes are in flight.
       Where they are not: not known.
    """
    if gap_us > duration_us:
        return Verdict(
            LAUNCH,
            f"{gap_us:.1f} us idle before {duration_us:.1f} us of work",
            "launch less and earlier: a CUDA graph, torch.compile(mode='reduce-overhead'), fewer and fused kernels",
        )
    if intensity is not None and ridge is not None and intensity > ridge and (peak_fraction or 0) >= AT_THE_ROOF:
        return Verdict(
            COMPUTE, f"{peak_fraction:.0%} of the tensor cores' peak", "lower precision, or do less: it is well used"
        )
    if roof_fraction is not None and roof_fraction >= AT_THE_ROOF:
        where = f"{roof_fraction:.0%} of the memory roof" + (", so partly from L2" if roof_fraction > 1 else "")
        return Verdict(BANDWIDTH, where, "read fewer bytes: weights or KV cache in fewer bits, or a larger batch")
    reached = "" if roof_fraction is None else f", {roof_fraction:.0%} of the memory roof"
    short = Verdict(
        LATENCY,
        f"{duration_us:.1f} us, where any kernel costs about {FIXED_COST_US}{reached}",
        "fuse it with its neighbours, or overlap it with them (programmatic dependent launch)",
    )
    if overlapped:
        short = Verdict(
            LATENCY,
            f"{duration_us:.1f} us after the end of the kernel that it overlaps{reached}",
            "fuse it with its neighbours: it overlaps them already",
        )
    if duration_us < 1.5 * FIXED_COST_US:
        return short
    if blocks is not None and sm_count is not None and 0 < blocks < sm_count:
        return Verdict(
            LATENCY,
            f"{blocks} block{'s' if blocks > 1 else ''} on {sm_count} SMs{reached}",
            "fill the chip: split K or the sequence over more blocks; or fuse it with its neighbours",
        )
    if duration_us < 3 * FIXED_COST_US:
        return short
    if roof_fraction is None:
        return Verdict(UNKNOWN, "its bytes are not known", "record with record_shapes=True, or declare its cost")
    if intensity is not None and ridge is not None and intensity > ridge:
        return Verdict(
            LATENCY, f"only {peak_fraction or 0:.0%} of peak flops", "larger tiles, more warps, tensor cores"
        )
    return Verdict(
        LATENCY,
        f"{roof_fraction:.0%} of the roof: the grid fills the chip, but too few bytes are in flight",
        "more loads in flight: wider loads, a deeper pipeline, more warps or blocks an SM",
    )
