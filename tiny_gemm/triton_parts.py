"""What kernels of different files share: dependent launch, prefetches, arrivals, shared memory, activations, sums over
warps."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tiny_gemm.device import DeviceFacts, tensor_bytes


def int4_gemm_cost(grid, kernel, args) -> dict:
    """Bytes that one launch reads and writes, each once, and its flops, for a launch hook (see profiling)."""
    scratch = ("partial_ptr", "counter_ptr")
    tensors = (t for name, t in args.items() if name.endswith("_ptr") and name not in scratch)
    products = 1 if args.get("gate_ptr") is None else 2
    return {"bytes": tensor_bytes(*tensors), "flops16": 2 * products * args["M"] * args["N"] * args["K"]}


def pdl_options(facts: DeviceFacts) -> dict:
    """Launch options of a kernel that calls wait_for_previous(PDL)."""
    return {"PDL": True, "launch_pdl": True} if facts.has_pdl else {"PDL": False}


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """With programmatic dependent launch: waits until the kernel before this one has ended and its results are here.

    Until then a kernel may write nothing, and read only weights, which no kernel of a step writes (who writes to a
    weight on the GPU must synchronize before the next product: see Int4Weight). It lets the next kernel start only
    after its own wait: earlier, kernels would pile up on the SMs and all get slower.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_l2(ptr, num_bytes):
    """Asks L2 for num_bytes (a multiple of 16) at ptr; one thread of the block does. From sm_90 on."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 tid;
        mov.u32 tid, %tid.x;
        setp.eq.u32 first, tid, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptr, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def arrive(counter_ptr, parts=1):
    """Counts the block's arrival with `parts` of the work, and says how many came before.

    All of the block's stores come before it, which releases them; the last block's arrival acquires all of them. That
    block must read past L1 (".cg"), which may hold lines from before.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, parts, sem="acq_rel", scope="gpu")


@triton.constexpr_function
def _buffer_asm(words: int) -> str:
    return f"{{ .shared .align 16 .b32 buffer[{words}]; mov.u32 $0, buffer; }}"


@triton.jit
def shared_buffer(WORDS: tl.constexpr):
    """The address of WORDS words of shared memory beside what Triton plans. (Each call takes more of it.)"""
    return tl.inline_asm_elementwise(_buffer_asm(WORDS), "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_shared(address):
    """fp32 from shared memory. Pure as far as Triton knows: `address` depends on the barrier before."""
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [address], tl.float32, is_pure=True, pack=1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh(u) = 2 sigmoid(2 u) - 1
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return x * tl.sigmoid(x)


@triton.jit
def add_warps(x, WARPS: tl.constexpr):
    """[WARPS, R, C] -> [R, C]: the sum, by one exchange through shared memory (tl.sum takes two longer ones)."""
    R: tl.constexpr = x.shape[1]
    C: tl.constexpr = x.shape[2]
    x = x.permute(1, 2, 0)
    if WARPS == 1:
        return x.reshape(R, C)
    elif WARPS == 2:
        a, b = tl.split(x)
        return a + b
    elif WARPS == 4:
        a, b = tl.split(x.reshape(R, C, 2, 2))
        a, b = tl.split(a + b)
        return a + b
    elif WARPS == 8:
        a, b = tl.split(x.reshape(R, C, 2, 2, 2))
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
        return a + b
    else:
        tl.static_assert(WARPS == 16)
        a, b = tl.split(x.reshape(R, C, 2, 2, 2, 2))
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
        return a + b
