"""The parts of benchmark_fused_transformer.py.

presets.py     models with real dimensions, random weights
timing.py      the machine's roof, copies that exceed L2, CUDA graphs, interleaved timing
cases.py       what a case and an arm are; how one is checked, refused, timed
gemm.py attention.py ffn.py norm.py decode.py     the suites: their cases, and the peers of each
results.py     the JSON: environment, saving, comparing two runs
report.py      tables
plots.py       figures, from the JSON alone
agreement.py   the peers' times beside those of other scripts: the table of docs/benchmarks.md
"""
