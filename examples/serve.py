"""An OpenAI-compatible server: `transformers serve` with Tiny-GEMM's attention and INT4 weights.

    python examples/serve.py [MODEL] [--group-size N] [--port N] [every other option of transformers serve]

MODEL, the first argument, is a Hugging Face directory in 16 bits, or one that save_pretrained wrote, INT4 already;
without it SmolLM2 is written to a temporary place, whose name the server prints. Then, for example:

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "What is gravity?"}])

The server's own flags know neither: --attn-implementation takes a fixed list, --quantization only bitsandbytes. Both
are arguments of from_pretrained, which its ModelManager calls; the class below sets them there. Needs tiny-gemm[serve].
"""

import argparse
import signal
import sys
import tempfile
from importlib.util import find_spec

import smollm2
from transformers import AutoConfig
from transformers.cli.serving import model_manager

import tiny_gemm.integrations.transformers as tg  # importing it registers "tiny_gemm" with transformers


def manager(group_size: int) -> type[model_manager.ModelManager]:
    """transformers' ModelManager, which loads every model with our attention and our quantizer."""

    class Manager(model_manager.ModelManager):
        def _validate_args(self) -> None:  # knows the attentions that transformers brings
            self.attn_implementation = tg.NAME

        def get_quantization_config(self) -> tg.TinyGemmConfig | None:
            saved = getattr(AutoConfig.from_pretrained(self.force_model), "quantization_config", None)
            return None if saved else tg.TinyGemmConfig(group_size=group_size)

        def _load_model(self, *args, **kwargs):
            model = super()._load_model(*args, **kwargs)
            attention, size = model.config._attn_implementation, sum(t.nbytes for t in model.state_dict().values())
            print(
                f"{model.name_or_path}: {size / 1e6:.1f} MB of weights on {model.device}, {attention} attention",
                file=sys.stderr,
            )
            return model

    return Manager


def main() -> None:
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        sys.exit(f"needs {', '.join(missing)}: pip install 'tiny-gemm[serve]'")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    group_sizes = 32, 64, 128, -1  # it must divide every layer's inputs; SmolLM2 has 576
    parser.add_argument("--group-size", type=int, choices=group_sizes, default=64)
    arguments, others = parser.parse_known_args()
    from transformers.cli.transformers import app  # brings the server's own command line

    model_manager.ModelManager = manager(arguments.group_size)
    for number in (signal.SIGINT, signal.SIGTERM):  # raised a second time once the server has shut down
        signal.signal(number, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory() as temporary:
        if not others or others[0].startswith("--") and "--help" not in others:  # no MODEL
            smollm2.write_directory(temporary)
            others.insert(0, temporary)
        app(["serve", "--dtype", "bfloat16", *others])


if __name__ == "__main__":
    main()
