"""Builds torch profiler traces with known answers. Test-only."""

import gzip
import json
from pathlib import Path

H200 = {
    "id": 0, "name": "NVIDIA H200", "numSms": 132, "warpSize": 32, "maxThreadsPerMultiprocessor": 2048,
    "regsPerMultiprocessor": 65536, "sharedMemPerMultiprocessor": 233472,
}  # fmt: skip


class TraceBuilder:
    """Events one after the other; times in microseconds. Every kernel gets a launch of its own, at `launched`."""

    def __init__(self, device: dict | None = H200, **metadata):
        self.events, self.device, self.metadata, self.ids = [], device, metadata, 0

    def kernel(
        self, name, start, dur, *, grid=(1, 1, 1), block=(128, 1, 1), stream=7, launched=None, op=None,
        correlation=None, **args,
    ) -> int:  # fmt: skip
        """op: (name, dims, types) of the torch op that launches it. Returns the correlation id."""
        self.ids += 1
        external = 0
        if op is not None:
            external = 100_000 + self.ids
            self.op(op[0], launched if launched is not None else start, 1.0, dims=op[1], types=op[2], external=external)
        if correlation is None:
            correlation = self.ids
            if launched is not None:
                self.launch(correlation, launched)
        self._add(
            "kernel", name, start, dur, 0, stream, stream=stream, device=0, correlation=correlation, grid=list(grid),
            block=list(block), **{"External id": external, "registers per thread": 32, "shared memory": 0, **args},
        )  # fmt: skip
        return correlation

    def launch(self, correlation, start, name="cudaLaunchKernel"):
        self._add("cuda_runtime", name, start, 1.0, 1, 1, correlation=correlation)

    def memcpy(self, name, start, dur, n_bytes, *, stream=7):
        self.ids += 1
        args = {"bytes": n_bytes, "memory bandwidth (GB/s)": "N/A"}
        self._add("gpu_memcpy", name, start, dur, 0, stream, device=0, stream=stream, correlation=self.ids, **args)

    def op(self, name, start, dur, *, dims=(), types=(), external=0, thread=1, strides=None):
        args = {"External id": external, "Input Dims": list(dims), "Input type": list(types)}
        if strides is not None:
            args["Input Strides"] = strides
        self._add("cpu_op", name, start, dur, 1, thread, **args)

    def step(self, number, start, dur, category="user_annotation"):
        self._add(category, f"ProfilerStep#{number}", start, dur, 1, 1)

    def _add(self, category, name, start, dur, pid, tid, **args):
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": dur, "args": args}
        )

    def text(self, indent=1) -> str:
        top = {"schemaVersion": 1, "deviceProperties": [self.device] if self.device else []}
        if self.metadata:
            top["tiny_gemm"] = self.metadata
        return json.dumps({**top, "traceEvents": self.events, "traceName": "x"}, indent=indent)

    def write(self, path: Path) -> Path:
        data = self.text().encode()
        path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
        return path
