r"""The embedded model from random weights, by text of seven languages. Before it, in the folder of this repository:

jaxllm tokenizer train configs/mimo-nano/text/train.{zh,en,ja,ko,fr,de,es}.jsonl.xz \
    build/nano-tokenizer --shares 5,5,3,3,3,3,3
"""
import json as _json
from pathlib import Path as _Path

_nano = _Path(__file__).parent.parent / "mimo-nano"
_share = {"zh": 0.20, "en": 0.20, "ja": 0.12, "ko": 0.12, "fr": 0.12, "de": 0.12, "es": 0.12}

output = "../../build/nano-pretrain"
config = _json.loads((_nano / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
tokenizer = "../../build/nano-tokenizer"
data = {f"../mimo-nano/text/train.{language}.jsonl.xz": share for language, share in _share.items()}
heldout = {language: f"../mimo-nano/heldout/heldout.{language}.jsonl.xz" for language in _share}

context = 512
batch = 16
steps = 9700
learning_rate = 3e-3
final_learning_rate = 1e-5
warmup = 200
decay = 4850
schedule = "linear"
weight_decay = 1.0                 # texts are read 6 to 22 times: docs/log.md
initializer_range = 0.05
dtype = "bfloat16"                 # six minutes of an H100; on CPUs float32 is faster
master = True
save_every = 500
