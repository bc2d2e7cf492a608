"""The verb of training."""
import argparse
from pathlib import Path

import jax

from jaxllm.cli.models import join_processes
from jaxllm.cli.parser import Verbs
from jaxllm.train.run import read_run, resumed


def add_train(verbs: Verbs) -> None:
    verb = verbs.add_parser("train", help="train or fine-tune by a run file",
                            description="Trains by the settings of a run file (configs/runs has some), into the folder "
                                        "that it names as output. SIGTERM stops it with a checkpoint.")
    verb.add_argument("run_file", metavar="RUN", help="the run file; with --resume also the run's output folder")
    verb.add_argument("--mesh", help="sizes of the mesh axes, as in data=8; instead of the run file's")
    verb.add_argument("--override", metavar="KEY=VALUE", nargs="+", default=[],
                      help="instead of what the run file says")
    verb.add_argument("--resume", action="store_true", help="go on from the last checkpoint, as if never stopped")
    verb.add_argument("--distributed", action="store_true", help="one of several processes, as of jaxllm generate")
    verb.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    if args.distributed:
        join_processes()
    from jaxllm.train.loop import train  # takes two seconds, which other verbs do without
    overrides = [*args.override, *([f"mesh={args.mesh}"] if args.mesh else [])]
    if args.resume:
        folder = args.run_file if Path(args.run_file).is_dir() else read_run(args.run_file).output
        run = resumed(folder, overrides)
    else:
        run = read_run(args.run_file, overrides)
    done = train(run, args.resume)
    if done.is_finished and jax.process_index() == 0:
        how = f"jaxllm export {done.folder} HUB_DIR --weights bfloat16"
        print(f"{done.folder}: {done.step} steps; {how}{' --merge-lora' if run.lora else ''} writes a hub folder" +
              (f", jaxllm export {done.folder} ADAPTER PEFT's files" if run.lora else ""))
