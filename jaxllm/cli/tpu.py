"""The verbs about hardware that is not here: plan, compile."""
import argparse
import json
from pathlib import Path

from jaxllm.axes import make_abstract_mesh
from jaxllm.cli.models import MESH_HELP
from jaxllm.cli.parser import Verbs
from jaxllm.config import Config
from jaxllm.model import check_mesh
from jaxllm.tpu.chips import Slice, slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.plan import Plan, plan, plans, smallest
from jaxllm.tpu.program import compile_step, devices_of, params_of
from jaxllm.tpu.report import Report, report_of
from jaxllm.tpu.steps import STEPS, Work, work_of
from jaxllm.train.memory import show

WEIGHTS = ("mxfp4", "fp8", "int4")
RUNNERS_UP = 4


def add_plan(verbs: Verbs) -> None:
    verb = verbs.add_parser("plan", help="whether a model fits a slice, and how fast it could be there",
                            description="Tells the bytes of each device by kind, the best mesh and the runners-up, and "
                                        "the time of a step at 100% of the rates in the data sheets, which no program "
                                        "reaches. Reads only config.json, and needs no device and no compiler.")
    add_step(verb, "as in v6e:8x8, h100:8, gpu:8x24GB, or all; an unknown one lists those there are")
    verb.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> None:
    held = held_of(args)
    work = work_of(held.config, args.step, args.batch, args.context, args.tokens)
    if args.on == "all":
        found = smallest(held, work)
        if not found:
            raise ValueError(f"{args.model}: no slice of the table holds it with {args.batch} rows of {args.context}")
        print("\n".join(x.row() for x in found))
    else:
        found = on_slice(held, slice_of(args.on), args.mesh, work)
        print("\n".join(x.row() for x in found[:1 + RUNNERS_UP]))
        print(found[0].describe())
    write(args, [x.to_dict() for x in found], found[0])


def on_slice(held: Held, on: Slice, mesh: str | None, work: Work) -> list[Plan]:
    """Plans that fit, the best first. ValueError says by how much it does not, and what is the smallest that does."""
    found = [on_mesh(held, on, mesh, work)] if mesh else plans(held, on, work)
    if not found:
        raise ValueError(f"{held.name}: no mesh over the {on.num_devices} devices of {on.name} splits the model and "
                         f"{work.batch} rows evenly")
    if fitting := [x for x in found if x.fits]:
        return fitting
    best, usable = found[0], on.chip.usable_hbm.value
    larger = smallest(held, work)
    same = [x for x in larger if x.on.chip == on.chip] or larger
    raise ValueError(f"{held.name} with {work.batch} rows of {work.context} does not fit {on.name}: a device would "
                     f"hold {show(best.peak)} of {show(usable)}, {show(best.peak - usable)} too much; "
                     + (f"the smallest that fits is {same[0].on.name}" if same else "no slice of the table holds it"))


def on_mesh(held: Held, on: Slice, mesh: str, work: Work) -> Plan:
    abstract = make_abstract_mesh(mesh)
    check_mesh(held.config, abstract)
    if abstract.size != on.num_devices:
        raise ValueError(f"the mesh has {abstract.size} devices, but {on.name} has {on.num_devices}: all take part")
    if work.batch % abstract.shape["data"]:
        raise ValueError(f"batch = {work.batch} cannot be split over mesh axis data = {abstract.shape['data']}")
    return plan(held, on, abstract, work)


def add_compile(verbs: Verbs) -> None:
    verb = verbs.add_parser("compile", help="compile a step for TPUs that are not here",
                            description="Compiles the real step, at full size, for the real chip, with the compiler in "
                                        "libtpu, and tells its memory, the bytes that it moves beside the least "
                                        "possible, and its collectives. Reads only config.json.")
    add_step(verb, "a TPU slice, as in v6e:8x8; another lists those there are")
    verb.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> None:
    on, config = slice_of(args.on), Config.from_hub(args.model)
    work = work_of(config, args.step, args.batch, args.context, args.tokens)
    devices = devices_of(on)
    mesh = args.mesh or on_slice(held_of(args), on, None, work)[0].mesh
    program = compile_step(config, devices, mesh, work, params_of(args.model, config, args.weights))
    report = report_of(program, Path(args.model).name, on)
    print(report.describe())
    write(args, report.to_dict(), report)


def add_step(verb: argparse.ArgumentParser, on: str) -> None:
    """The arguments of both verbs: what step of what model, and where."""
    verb.add_argument("model", metavar="MODEL", help="a folder with a config.json")
    verb.add_argument("--on", metavar="SLICE", required=True, help=on)
    verb.add_argument("--mesh", help=MESH_HELP.replace("one device", "the fastest by plan"))
    verb.add_argument("--step", choices=STEPS, default="decode", help="default decode")
    verb.add_argument("--weights", choices=WEIGHTS, help="experts as packed so (default: as the model has them)")
    verb.add_argument("--batch", metavar="B", type=int, default=64, help="rows (default 64)")
    verb.add_argument("--context", metavar="S", type=int, default=32768, help="tokens of each row (default 32768)")
    verb.add_argument("--tokens", metavar="T", type=int, help="new ones of a row (default: verify 4, prefill 4096)")
    verb.add_argument("--json", metavar="FILE", help="write the numbers there")
    verb.add_argument("--png", metavar="FILE", help="and a picture of them there")


def held_of(args: argparse.Namespace) -> Held:
    config = Config.from_hub(args.model)
    return Held(Path(args.model).name, config, params_of(args.model, config, args.weights))


def write(args: argparse.Namespace, numbers: object, found: Plan | Report) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
    if args.png:
        from jaxllm.tpu.draw import draw  # matplotlib takes a second to import
        draw(found, args.png)
