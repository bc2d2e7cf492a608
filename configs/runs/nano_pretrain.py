r"""The embedded model from random weights, by text of seven languages. Before it, in the folder of this repository:

jaxllm tokenizer train configs/mimo-nano/text/train.{zh,en,ja,ko,fr,de,es}.jsonl.xz \
    build/nano-tokenizer --shares 5,5,3,3,3,3,3
"""
import json as _json
from pathlib import Path as _Path

_nano = _Path(__file__).parent.parent / "mimo-nano"
_share = {"zh": 0.20, "en": 0.20, "ja": 0.12, "ko": 0.12, "fr": 0.12, "de": 0.12, "es": 0.12}

output = "../../build/nano-pretrain"
config = _json.loads((_nano / "config.json").read_text())
tokenizer = "../../build/nano-tokenizer"
data = {f"../mimo-nano/text/train.{language}.jsonl.xz": share for language, share in _share.items()}
heldout = {language: f"../mimo-nano/heldout/heldout.{language}.jsonl.xz" for language in _share}

context = 512
batch = 8
steps = 9000
learning_rate = 3e-3
final_learning_rate = 1e-5
warmup = 200
decay = 3000
bias_update = 2e-3
schedule = "linear"
save_every = 250
