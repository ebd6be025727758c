"""Tiny-GEMM in Hugging Face transformers (5 or newer): `import tiny_gemm.integrations.transformers` registers both of

- attn_implementation="tiny_gemm": attention through ops.fused_attention;
- quantization_config=TinyGemmConfig(): nn.Linear becomes Int4Linear while the checkpoint is loaded, and what
  save_pretrained writes loads again with the same bits. Import this module before from_pretrained reads such a
  checkpoint.

    import tiny_gemm.integrations.transformers as tg
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, attn_implementation="tiny_gemm", quantization_config=tg.TinyGemmConfig()
    )
"""

import torch
from torch import Tensor, nn

from tiny_gemm import ops
from tiny_gemm.modules import Int4Linear, find_linears
from tiny_gemm.quantize_utils import FORMAT_VERSION, GROUP_SIZES, quantize

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.core_model_loading import ConversionOps
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as e:
    raise ImportError(
        "tiny_gemm.integrations.transformers needs transformers 5 or newer: pip install 'tiny-gemm[hf]'"
    ) from e

NAME = "tiny_gemm"


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def tiny_gemm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What a model's attention layers call. query [B, Hq, Lq, D]; key, value [B, Hkv, Lk, D] -> [B, Lq, Hq, D].

    Without a mask this is ops.fused_attention. That is prefill and decode with a dynamic cache and prefill into an
    empty static one, as long as no token is padding. With a mask (padding, sliding window, decode against a static
    cache, whose unwritten positions are masked) it is torch's scaled_dot_product_attention with that mask, as under
    attn_implementation="sdpa": fused_attention has no mask argument. Whether there is a mask is transformers' decision:
    while a graph is traced it builds one more often, because it cannot look for padding then.

    Raises ValueError for what neither computes (dropout, soft capping, attention sinks, a position bias, attention
    weights as an output), and, without a mask, for a head size or a query that requires grad, which fused_attention
    refuses.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    unsupported += ["dropout"] * bool(dropout) + ["output_attentions"] * bool(kwargs.get("output_attentions"))
    if unsupported:
        raise ValueError(
            f"attn_implementation={NAME!r} does not support {', '.join(unsupported)}; use attn_implementation='eager'"
        )
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if length == 1:  # the newest token sees all
        causal = False
    if causal and key.shape[2] > length:
        # No mask, yet more keys than queries: an empty static cache, where only the first positions are written.
        key, value = key[:, :, :length], value[:, :, :length]
    out = ops.fused_attention(query, key, value, causal=causal, scale=scaling)
    return out.transpose(1, 2), None  # contiguous: the op lays its output out so


AttentionInterface.register(NAME, tiny_gemm_attention)
# sdpa's mask is None exactly where a plain causal mask would do, and is not built then.
AttentionMaskInterface.register(NAME, sdpa_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer
# ---------------------------------------------------------------------------------------------------------------------


@register_quantization_config(NAME)
class TinyGemmConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes; it is saved in the model's config.json.

    group_size: 32, 64, 128, or -1 for one group a row; every quantized layer's in_features must be a multiple of it.
    symmetric: no zero points. modules_to_not_convert: names of modules that keep their weights (as quantize_model_'s
    `skip`), besides the output head and tied weights, which always do.
    """

    def __init__(
        self,
        group_size: int = 128,
        symmetric: bool = True,
        modules_to_not_convert: list[str] | None = None,
        *,
        quant_method: str = NAME,
        format_version: str = FORMAT_VERSION,
    ) -> None:
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={group_size} must be one of {GROUP_SIZES} (-1: per-channel)")
        if quant_method != NAME:
            raise ValueError(f"quant_method={quant_method!r} must be {NAME!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(f"format_version {format_version!r}, this reads {FORMAT_VERSION!r}: quantize again")
        self.quant_method = quant_method
        self.format_version = format_version
        self.group_size = group_size
        self.symmetric = symmetric
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        if "bits" in config_dict:  # which `tiny-gemm quantize` writes and this class does not know
            raise ValueError(
                "a directory that `tiny-gemm quantize` wrote is read by tiny_gemm.checkpoint.load; for transformers, "
                "quantize with TinyGemmConfig and save_pretrained"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


@register_quantizer(NAME)
class TinyGemmQuantizer(HfQuantizer):
    """Replaces nn.Linear by Int4Linear in the empty model; on the fly, weights are then quantized one by one as they
    are read, so that the whole model never is in memory in full precision."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        for name, linear in find_linears(model, skip, config.group_size).items():
            dtype = linear.weight.dtype
            layer = Int4Linear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                group_size=config.group_size,
                symmetric=config.symmetric,
                device="meta",
                dtype=dtype,
            )
            if not self.pre_quantized:  # the loader reads only what the model has a place for
                weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device="meta")
                layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            model.set_submodule(name, layer)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        owner, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(owner), Int4Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module._parameters.pop("weight", None)
        if torch.cuda.is_available():  # kernels read weights early: all must be in memory (see Int4Weight)
            torch.cuda.synchronize()
        return model

    def is_serializable(self, safe_serialization=None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """weight [N, K] of an Int4Linear -> its packed, scales and, if any, zeros."""

    def __init__(self, config: TinyGemmConfig) -> None:
        self.config = config

    def convert(self, input_dict, *, full_layer_name: str, missing_keys: set[str] | None = None, **kwargs):
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        owner, _, _ = full_layer_name.rpartition(".")
        int4 = quantize(weight, self.config.group_size, symmetric=self.config.symmetric)
        parts = {"packed": int4.packed, "scales": int4.scales} | ({} if int4.symmetric else {"zeros": int4.zeros})
        if missing_keys is not None:  # else the loader reports the weight, which it had the layer keep a place for
            missing_keys.discard(full_layer_name)
        return {f"{owner}.{part}": t for part, t in parts.items()}
