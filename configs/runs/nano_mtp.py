"""Three blocks of multi-token prediction for the model that nano_pretrain.py made, which stays as it is."""
from pathlib import Path as _Path

from jaxllm.train.run import read_run as _read_run

_before = _read_run(_Path(__file__).with_name("nano_pretrain.py"))

model = _before.output
output = "../../build/nano-mtp"
config = {"num_nextn_predict_layers": 3}
train = ("mtp.*",)
data = _before.data

context = 512
batch = 16
steps = 2000
learning_rate = 2e-3
warmup = 100
decay = 1300
schedule = "linear"
mtp_weight = 1.0
initializer_range = 0.05
dtype = "bfloat16"
master = True
save_every = 500
