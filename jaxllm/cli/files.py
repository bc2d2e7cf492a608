"""The verbs about files: convert, verify, export."""
import argparse

import jax

from jaxllm.calibrate import collect_grams
from jaxllm.checkpoint import convert, export, verify
from jaxllm.checkpoint.convert import KEEP
from jaxllm.checkpoint.requantise import ALL, CLASSES
from jaxllm.cli.parser import Verbs
from jaxllm.generate.load import load

WEIGHTS = (KEEP, "bfloat16", "float32", "fp8", "mxfp4", "int4")
READING_HELP = "how quantised attention rows lie, where files leave that open; the error that asks for it tells which"


def add_convert(verbs: Verbs) -> None:
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


def add_verify(verbs: Verbs) -> None:
    verb = verbs.add_parser("verify", help="check a converted folder against its manifest",
                            description="Reads every byte of a converted folder and names the files that are not as "
                                        "they were written.")
    verb.add_argument("folder", metavar="DIR", help="what convert wrote")
    verb.add_argument("--source", metavar="HUB_DIR", help="check also that this is what it was made from")
    verb.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> None:
    found = verify(args.folder, args.source)
    print(f"{args.folder}: {found.num_files} files, {found.nbytes:,} bytes, as they were written")


def add_export(verbs: Verbs) -> None:
    verb = verbs.add_parser("export", help="write a converted folder, or what a run trained, in hub layout",
                            description="Writes config.json, safetensors shards and their index, for transformers, "
                                        "llama.cpp, vLLM.")
    verb.add_argument("folder", metavar="DIR", help="what convert wrote, or the output of a run")
    verb.add_argument("hub_dir", metavar="HUB_DIR", help="a new or empty folder")
    verb.add_argument("--weights", choices=(KEEP, "bfloat16", "float32"), default=KEEP,
                      help="decode what is packed (default: keep, the bits as they are)")
    verb.add_argument("--layout", choices=(KEEP, "split"), default=KEEP,
                      help="split: q_proj, k_proj and v_proj instead of a fused qkv_proj")
    verb.add_argument("--merge-lora", metavar="ADAPTER", nargs="?", const=True, default=False,
                      help="write the weights with what a LoRA run trained, or with the adapter in a folder of PEFT's "
                           "files (default: of a LoRA run the adapter alone, in PEFT's files)")
    verb.add_argument("--reading", help=READING_HELP)
    verb.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> None:
    done = export(args.folder, args.hub_dir, weights=args.weights, layout=args.layout, reading=args.reading,
                  merge_lora=args.merge_lora)
    print(f"{done.folder}: {done.num_tensors} tensors, {done.nbytes:,} bytes in {done.seconds:.1f} s")
