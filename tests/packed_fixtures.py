"""Writes tests/fixtures/packed_formats/: linears as the packers of hqq and compressed-tensors store them.

    pip install compressed-tensors==0.20.0 hqq==0.2.8.post1 && python tests/packed_fixtures.py

Neither package is needed to run the tests: the files are in the repository. Each holds one linear's tensors under their
own names and, as `expected`, the float32 weight that the packer's own arithmetic reads from them; its metadata says the
quantization_config and the package. test_packed_formats.py reads them.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "packed_formats"
N, K = 24, 128


def hqq(name: str, dtype: torch.dtype, **settings) -> None:
    """As HQQLinear.state_dict(), which transformers' save_pretrained writes."""
    from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config

    config = hqq_base_quant_config(**settings)
    linear = torch.nn.Linear(K, N, bias=False)
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    parts = {k: t for k, t in layer.state_dict().items() if t is not None}
    q = Quantizer.unpack[layer.meta["packing"]](layer.W_q.view(layer.meta["unpack_view_dtype"]), dtype=torch.float32)
    q = q[: N * K // q.shape[1]]  # three bits are filled up to tens of rows
    expected = ((q - layer.meta["zero"].float()) * layer.meta["scale"].float()).reshape(N, K)
    quantization = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
    write(name, "hqq", quantization, parts, expected)


def compressed_tensors(name: str, symmetric: bool, group_size: int | None) -> None:
    """As PackedQuantizationCompressor."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = K // group_size if group_size else 1
    state = {"weight": torch.randn(N, K), "weight_scale": torch.rand(N, groups) * 0.2 + 0.1}
    zeros = torch.zeros(N, groups) if symmetric else torch.randint(-8, 8, (N, groups))
    state["weight_zero_point"] = zeros.to(torch.int8)
    parts = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    quantization["config_groups"] = {"group_0": json.loads(scheme.model_dump_json())}
    write(name, "compressed-tensors", quantization, parts, expected)


def write(name: str, package: str, quantization: dict, parts: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    metadata = {"package": f"{package} {version(package)}", "quantization_config": json.dumps(quantization)}
    tensors = {part: t.detach().contiguous() for part, t in parts.items()}
    file = FIXTURES / f"{name}.safetensors"
    save_file(tensors | {"expected": expected.detach().float()}, file, metadata)
    file.chmod(0o644)


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    hqq("hqq", torch.float32, group_size=64)
    hqq("hqq-float16", torch.float16, group_size=32)
    hqq("hqq-viewed-as-bfloat16", torch.bfloat16, group_size=64, view_as_float=True)
    hqq("hqq-per-channel", torch.float16, group_size=None)
    hqq("hqq-axis-0", torch.float16, group_size=64, axis=0)
    hqq("hqq-3-bit", torch.float16, group_size=64, nbits=3)
    compressed_tensors("ct-symmetric", True, 32)
    compressed_tensors("ct-asymmetric", False, 64)
    compressed_tensors("ct-per-channel", False, None)
