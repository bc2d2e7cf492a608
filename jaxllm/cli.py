"""The command line: `jaxllm convert`, `verify`, `export`, `generate`, `eval`, `info`.

Bad input (ValueError, OSError) is one line on stderr and exit status 2; anything else is a bug and keeps its traceback.
"""
import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from jaxllm.calibrate import collect_grams
from jaxllm.checkpoint import convert, export, verify
from jaxllm.checkpoint.convert import KEEP
from jaxllm.checkpoint.requantise import ALL, CLASSES
from jaxllm.evaluate import evaluate
from jaxllm.generate.engine import Model
from jaxllm.generate.load import DTYPES, load
from jaxllm.info import describe

SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")    # as `Model.generate` calls them
WEIGHTS = (KEEP, "bfloat16", "float32", "fp8", "mxfp4", "int4")
DTYPE_HELP = "what it computes in (default: float32 on CPU, else the model's)"
READING_HELP = "how quantised attention rows lie, where files leave that open; the error that asks for it tells which"
MESH_HELP = "sizes of the mesh axes, as in data=1,expert=4,tensor=2; absent ones are 1 (default: one device)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command (default: of sys.argv); returns the exit status."""
    try:
        args = make_parser().parse_args(arguments)
        args.run(args)
        print(end="", flush=True)
    except BrokenPipeError:             # the reader of a pipe, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if type(error).__module__.partition(".")[0] not in ("builtins", "jaxllm"):
            raise                       # a kind of ValueError that JAX or numpy has for its callers' mistakes: ours
        print("jaxllm: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """Its complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="jaxllm", description="MiMo-V2 in JAX: from a hub checkpoint to text on any device mesh.")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    verb = verbs.add_parser("convert", help="write a hub checkpoint as an Orbax one",
                            description="Writes the safetensors of a hub folder as an Orbax checkpoint, config and "
                                        "tokenizer beside it. Memory stays small whatever the size.")
    verb.add_argument("source", metavar="HUB_DIR", help="a folder with config.json, safetensors, tokenizer; or the id "
                                                        "of a repository on the hub, ORGANISATION/NAME")
    verb.add_argument("out_dir", metavar="OUT_DIR", help="a new or empty folder, or an address, gs://BUCKET/FOLDER")
    verb.add_argument("--weights", choices=WEIGHTS, default=KEEP, help="the form to store them in (default: keep, the "
                                                                       "bits as they are)")
    verb.add_argument("--classes", nargs="+", choices=(*CLASSES, ALL), default=["experts"],
                      help="which matrices to store as fp8, mxfp4 or int4 (default: experts)")
    verb.add_argument("--group", type=int, choices=(32, 128), default=32, help="of int4: how many share a scale")
    verb.add_argument("--calibrate", metavar="FILE", nargs="+",
                      help="JSON Lines of text: choose 4-bit codes by what the model's matrices meet in it")
    verb.add_argument("--resume", action="store_true", help="go on with an interrupted conversion into OUT_DIR")
    verb.add_argument("--reading", help=READING_HELP)
    verb.add_argument("--revision", metavar="R", help="of a repository: branch, tag or commit")
    verb.set_defaults(run=run_convert)

    verb = verbs.add_parser("verify", help="check a converted folder against its manifest",
                            description="Reads every byte of a converted folder and names the files that are not as "
                                        "they were written.")
    verb.add_argument("folder", metavar="DIR", help="what convert wrote")
    verb.add_argument("--source", metavar="HUB_DIR", help="check also that this is what it was made from")
    verb.set_defaults(run=run_verify)

    verb = verbs.add_parser("export", help="write a converted folder back in hub layout",
                            description="Writes config.json, safetensors shards and their index, for transformers, "
                                        "llama.cpp, vLLM.")
    verb.add_argument("folder", metavar="DIR", help="what convert wrote")
    verb.add_argument("hub_dir", metavar="HUB_DIR", help="a new or empty folder")
    verb.add_argument("--weights", choices=(KEEP, "bfloat16", "float32"), default=KEEP,
                      help="decode what is packed (default: keep, the bits as they are)")
    verb.add_argument("--layout", choices=(KEEP, "split"), default=KEEP,
                      help="split: q_proj, k_proj and v_proj instead of a fused qkv_proj")
    verb.add_argument("--reading", help=READING_HELP)
    verb.set_defaults(run=run_export)

    verb = verbs.add_parser("generate", help="continue prompts",
                            description="Continues each prompt; greedily, unless --temperature, --top-p or --top-k is "
                                        "given.")
    verb.add_argument("model", metavar="MODEL", help="a hub folder, or one that convert wrote")
    verb.add_argument("prompts", metavar="PROMPT", nargs="+", help="all prompts make one batch")
    verb.add_argument("--mesh", help=MESH_HELP)
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

    verb = verbs.add_parser("eval", help="how well models predict text",
                            description="Bits per byte of each file; against a reference also mean KL divergence, how "
                                        "often both hold the same token for the likeliest, and retention.")
    verb.add_argument("models", metavar="MODEL", nargs="+", help="hub folders, or ones that convert wrote")
    verb.add_argument("--text", metavar="FILE", nargs="+", required=True,
                      help="JSON Lines, one document a line in \"text\"; .xz and .gz are unpacked")
    verb.add_argument("--against", metavar="MODEL", help="the reference")
    verb.add_argument("--json", metavar="FILE", help="write the numbers there too")
    verb.add_argument("--mesh", help=MESH_HELP)
    verb.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
    verb.set_defaults(run=run_eval)

    verb = verbs.add_parser("info", help="size, layers, and bytes per device",
                            description="Tells a model's parameters, layers, and bytes on a mesh. Only the config.json "
                                        "is needed, and no device.")
    verb.add_argument("model", metavar="MODEL", help="a hub folder, a converted one, or one with only a config.json")
    verb.add_argument("--mesh", help=MESH_HELP)
    verb.set_defaults(run=run_info)
    return parser


def run_convert(args: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")       # opening a pod slice's TPU from one host would wait for the others
    grams = None
    if args.calibrate:
        if args.weights not in ("mxfp4", "int4"):
            raise ValueError(f"--calibrate is for --weights mxfp4 or int4, not for {args.weights}")
        grams = collect_grams(load(args.source, reading=args.reading), args.calibrate)
    done = convert(args.source, args.out_dir, weights=args.weights, classes=args.classes, group=args.group, grams=grams,
                   resume=args.resume, reading=args.reading, revision=args.revision)
    mtp = f", {done.num_mtp} MTP blocks among them" if done.num_mtp else ""
    print(f"{done.folder}: {done.num_arrays} arrays{mtp}, {done.nbytes:,} bytes in {done.seconds:.1f} s")


def run_verify(args: argparse.Namespace) -> None:
    found = verify(args.folder, args.source)
    print(f"{args.folder}: {found.num_files} files, {found.nbytes:,} bytes, as they were written")


def run_export(args: argparse.Namespace) -> None:
    done = export(args.folder, args.hub_dir, weights=args.weights, layout=args.layout, reading=args.reading)
    print(f"{done.folder}: {done.num_tensors} tensors, {done.nbytes:,} bytes in {done.seconds:.1f} s")


def run_eval(args: argparse.Namespace) -> None:
    def loaded(folder: str) -> tuple[str, Model]:
        return folder, load(folder, args.mesh, args.dtype)

    against = loaded(args.against) if args.against else None
    found = evaluate(map(loaded, args.models), args.text, against, progress=True)
    print(found.table())
    if args.json:
        Path(args.json).write_text(json.dumps(found.to_dict(), indent=2) + "\n")


def run_info(args: argparse.Namespace) -> None:
    print(describe(args.model, args.mesh))


def run_generate(args: argparse.Namespace) -> None:
    if args.distributed:
        join_processes()
    model = load(args.model, args.mesh, args.dtype)
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


def join_processes() -> None:
    """Makes this process one of a job, before JAX looks for devices."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(f"--distributed: JAX finds no job that this process is part of ({error}); start the command "
                         "on every host of a TPU pod slice, or by Slurm's srun") from error
