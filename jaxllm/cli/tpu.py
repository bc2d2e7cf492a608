"""The verb about hardware that is not here: compile."""
import argparse
import json
from pathlib import Path

from jaxllm.cli.models import MESH_HELP
from jaxllm.cli.parser import Verbs
from jaxllm.config import Config
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.program import STEPS, compile_step, default_mesh, devices_of, params_of
from jaxllm.tpu.report import report_of

WEIGHTS = ("mxfp4", "fp8", "int4")


def add_compile(verbs: Verbs) -> None:
    verb = verbs.add_parser("compile", help="compile a step for TPUs that are not here",
                            description="Compiles the real step, at full size, for the real chip, with the compiler in "
                                        "libtpu, and tells its memory, the bytes that it moves beside the least "
                                        "possible, and its collectives. Reads only config.json.")
    verb.add_argument("model", metavar="MODEL", help="a folder with a config.json")
    verb.add_argument("--on", metavar="SLICE", required=True, help="as in v6e:8x8; another lists those there are")
    verb.add_argument("--mesh", help=MESH_HELP.replace("one device", "by the model and the slice"))
    verb.add_argument("--step", choices=STEPS, default="decode", help="default decode")
    verb.add_argument("--weights", choices=WEIGHTS, help="experts as packed so (default: as the model has them)")
    verb.add_argument("--batch", metavar="B", type=int, default=64, help="rows (default 64)")
    verb.add_argument("--context", metavar="S", type=int, default=32768, help="tokens of each row (default 32768)")
    verb.add_argument("--tokens", metavar="T", type=int, help="new ones of a row (default: verify 4, prefill 4096)")
    verb.add_argument("--json", metavar="FILE", help="write the numbers there")
    verb.add_argument("--png", metavar="FILE", help="and a picture of them there")
    verb.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> None:
    on, config = slice_of(args.on), Config.from_hub(args.model)
    devices = devices_of(on)
    mesh = args.mesh or default_mesh(config, on.num_devices)
    program = compile_step(config, devices, mesh, args.step, args.batch, args.context, args.tokens,
                           params_of(args.model, config, args.weights))
    report = report_of(program, Path(args.model).name, on)
    print(report.describe())
    if args.json:
        Path(args.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if args.png:
        from jaxllm.tpu.draw import draw  # matplotlib takes a second to import
        draw(report, on, args.png)
