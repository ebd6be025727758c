"""Profiles steps and judges kernels: torch.profiler traces, roofline verdicts, TensorBoard, figures.

record.py takes a trace, trace.py reads one, costs.py knows torch's ops, roofline.py devices and verdicts, report.py
makes the report, output.py and figures.py write it.
"""

from tiny_gemm.profiling.record import measure_roof, profile, profile_decode
from tiny_gemm.profiling.report import Report, analyse
from tiny_gemm.profiling.trace import TraceError, read_trace, trim

__all__ = [
    "Report",
    "TraceError",
    "analyse",
    "measure_roof",
    "profile",
    "profile_decode",
    "read_trace",
    "trim",
]
