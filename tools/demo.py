"""Text in seven languages from a small model on 8 emulated CPU devices, with speed and bytes per device.

    python tools/demo.py [MODEL]      # default: configs/mimo-nano; `make demo` converts that first
"""
import time

START = time.perf_counter()      # here, since imports are part of what a user waits for

import argparse  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jaxllm  # noqa: E402  (the flags above must be set before JAX starts)
from jaxllm.generate.load import parameters  # noqa: E402
from jaxllm.info import device_bytes  # noqa: E402

NANO = Path(__file__).parent.parent / "configs" / "mimo-nano"
MESH = "data=2,expert=2,tensor=2"
PROMPTS = ("要保存文档,", "The menu", "メニューの", "문서를 저장", "Le menu", "Der Drucker", "El menú")
NEW_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=NANO, help="a hub folder, or a converted one")
    path = parser.parse_args().model

    model = jaxllm.load(path, mesh=MESH, replicate=True)
    print(f"{path} on 8 emulated CPU devices ({MESH}), computing in {model.dtype}\n")
    seconds_to_first = show_stream(model, PROMPTS[0])
    results = model.generate(PROMPTS[1:], max_new_tokens=NEW_TOKENS)
    for prompt, result in zip(PROMPTS[1:], results, strict=True):
        print(f"{prompt}{result.text}\n")

    print("\n".join(device_bytes(parameters(model.transformer))))
    start = time.perf_counter()      # once more, now that everything is compiled
    results = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    speed = sum(len(result.tokens) for result in results) / (time.perf_counter() - start)
    print(f"\nstart to first token  {seconds_to_first:.1f} s (with compiling, the first time)"
          f"\nspeed                 {speed:.0f} tokens/s for {len(PROMPTS)} texts at once, the 8 devices sharing "
          f"{os.cpu_count()} cores")


def show_stream(model: jaxllm.Model, prompt: str) -> float:
    """Prints the text as it comes; returns the seconds from the start of this program to its first piece."""
    first = 0.0
    print(prompt, end="", flush=True)
    for piece in model.stream(prompt, max_new_tokens=NEW_TOKENS):
        first = first or time.perf_counter() - START
        print(piece, end="", flush=True)
    print("\n")
    return first


if __name__ == "__main__":
    main()
