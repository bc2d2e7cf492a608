"""The verbs about models: generate, eval, info."""
import argparse
import itertools
import json
import sys
from pathlib import Path

import jax

from jaxllm.cli.parser import Verbs
from jaxllm.evaluate import evaluate
from jaxllm.generate.engine import Model
from jaxllm.generate.load import DTYPES, load
from jaxllm.info import describe

SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")    # as `Model.generate` calls them
DTYPE_HELP = "what it computes in (default: float32 on CPU, else the model's)"
MESH_HELP = "sizes of the mesh axes, as in data=1,expert=4,tensor=2; absent ones are 1 (default: one device)"

RESIDENT_HELP = ("so many of a device's experts of each layer stay on it, the others lie in host memory and are "
                 "brought over when chosen (default: all stay)")


def add_generate(verbs: Verbs) -> None:
    verb = verbs.add_parser("generate", help="continue prompts",
                            description="Continues each prompt; greedily, unless --temperature, --top-p or --top-k is "
                                        "given.")
    verb.add_argument("model", metavar="MODEL", help="a hub folder, or one that convert wrote")
    verb.add_argument("prompts", metavar="PROMPT", nargs="+", help="all prompts make one batch")
    verb.add_argument("--mesh", help=MESH_HELP)
    verb.add_argument("--replicate", action="store_true",
                      help="hold all weights at each place along the axis data: several times as fast, for the bytes")
    add_offload(verb)
    verb.add_argument("--adapter", metavar="DIR", help="a folder of PEFT's files (LoRA) for this model")
    verb.add_argument("--max-new-tokens", metavar="N", type=int, help="default 128")
    verb.add_argument("--temperature", metavar="T", type=float, help="0 is greedy; 1 with --top-p or --top-k alone")
    verb.add_argument("--top-p", metavar="P", type=float, help="draw among the fewest tokens that reach probability P")
    verb.add_argument("--top-k", metavar="K", type=int, help="draw among the K likeliest tokens")
    verb.add_argument("--seed", metavar="S", type=int, help="the same seed draws the same text (default: a new one)")
    verb.add_argument("--stop", metavar="TEXT", action="append",
                      help="end where TEXT would come; may be repeated; a line break is $'\\n' in bash")
    verb.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
    verb.add_argument("--chat", action="store_true", help="each prompt is a user's message, by the chat template")
    verb.add_argument("--distributed", action="store_true",
                      help="one of several processes that run this same command, started by what JAX recognises (a TPU "
                           "pod slice, Slurm); the mesh spans all their devices and the first process prints")
    verb.set_defaults(run=run_generate)


def add_offload(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--resident-experts", metavar="N", type=int, help=RESIDENT_HELP)
    verb.add_argument("--usage", metavar="FILE", help="those chosen most by this count stay (jaxllm usage writes it; "
                                                      "default: the first)")


def run_generate(args: argparse.Namespace) -> None:
    if args.distributed:
        join_processes()
    model = load(args.model, args.mesh, args.dtype, replicate=args.replicate, adapter=args.adapter,
                 resident_experts=args.resident_experts, usage=args.usage)
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    prompts = [model.tokenizer.chat([{"role": "user", "content": prompt}]) if args.chat else prompt
               for prompt in args.prompts]
    heads = [f"> {prompt}\n" if args.chat else prompt for prompt in args.prompts]
    if len(prompts) == 1 and sys.stdout.isatty() and not args.distributed:    # processes must all run the same steps
        for piece in itertools.chain(heads, model.stream(prompts[0], **settings), "\n"):
            print(piece, end="", flush=True)
        return
    results = model.generate(prompts, **settings)
    if jax.process_index() == 0:
        print("\n---\n".join(head + result.text for head, result in zip(heads, results, strict=True)))


def add_eval(verbs: Verbs) -> None:
    verb = verbs.add_parser("eval", help="how well models predict text",
                            description="Bits per byte of each file; against a reference also mean KL divergence, how "
                                        "often both hold the same token for the likeliest, and retention.")
    verb.add_argument("models", metavar="MODEL", nargs="+", help="hub folders, or ones that convert wrote")
    verb.add_argument("--text", metavar="FILE", nargs="+", required=True,
                      help="JSON Lines, one document a line in \"text\"; .xz and .gz are unpacked")
    verb.add_argument("--against", metavar="MODEL", help="the reference")
    verb.add_argument("--json", metavar="FILE", help="write the numbers there too")
    verb.add_argument("--mesh", help=MESH_HELP)
    add_offload(verb)
    verb.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
    verb.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace) -> None:
    def loaded(folder: str) -> tuple[str, Model]:
        return folder, load(folder, args.mesh, args.dtype, resident_experts=args.resident_experts, usage=args.usage)

    against = loaded(args.against) if args.against else None
    found = evaluate(map(loaded, args.models), args.text, against, progress=True)
    print(found.table())
    if args.json:
        Path(args.json).write_text(json.dumps(found.to_dict(), indent=2) + "\n")


def add_info(verbs: Verbs) -> None:
    verb = verbs.add_parser("info", help="size, layers, and bytes per device",
                            description="Tells a model's parameters, layers, and bytes on a mesh. Only the config.json "
                                        "is needed, and no device.")
    verb.add_argument("model", metavar="MODEL", help="a hub folder, a converted one, or one with only a config.json")
    verb.add_argument("--mesh", help=MESH_HELP)
    verb.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    print(describe(args.model, args.mesh))


def join_processes() -> None:
    """Makes this process one of a job, before JAX looks for devices."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(f"--distributed: JAX finds no job that this process is part of ({error}); start the command "
                         "on every host of a TPU pod slice, or by Slurm's srun") from error
