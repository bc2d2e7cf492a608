r"""Answers to questions, in chat format, for a model with experts in 4 bits, by LoRA. Before it, in the folder of this
repository:

jaxllm convert configs/mimo-nano build/mimo-nano-mxfp4 --weights mxfp4
"""
model = "../../build/mimo-nano-mxfp4"
output = "../../build/lora-sft"
lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
format = "chat"                    # lines with messages; the assistant's turns are learned
on_broken = "skip"                 # what cannot be used is named, counted and left out
data = {"../mimo-nano/udhr/chat.jsonl": 1.0}

context = 512
batch = 4
steps = 100
learning_rate = 1e-3
warmup = 10
decay = 90
weight_decay = 0.0
mtp_weight = 0.0                   # the MTP blocks stay as they are, and cost no time
save_every = 50
