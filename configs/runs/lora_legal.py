r"""Legal language for a model with experts in 4 bits: the Universal Declaration of Human Rights, by LoRA. Before it, in
the folder of this repository:

jaxllm convert configs/mimo-nano build/mimo-nano-mxfp4 --weights mxfp4
"""
_languages = ("zh", "en", "ja", "ko", "fr", "de", "es")

model = "../../build/mimo-nano-mxfp4"
output = "../../build/lora-legal"
lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Articles 1 to 24, and as much of the text that the model was trained on, so that it keeps what it knows.
data = {f"../mimo-nano/udhr/train.{language}.jsonl": 0.07 for language in _languages} | {
    f"../mimo-nano/text/train.{language}.jsonl.xz": 0.07 for language in _languages}
# Articles 25 to 30, and general text.
heldout = {f"legal {language}": f"../mimo-nano/udhr/heldout.{language}.jsonl" for language in _languages} | {
    language: f"../mimo-nano/heldout/heldout.{language}.jsonl.xz" for language in _languages}

context = 256
batch = 8
steps = 100
learning_rate = 5e-4
warmup = 10
decay = 90
weight_decay = 0.0
mtp_weight = 0.0                   # the MTP blocks stay as they are, and cost no time
save_every = 50
