"""Reading compiled programs: hand-written ones, whose bytes are counted by hand, and one that a CPU compiled."""
import jax
import jax.numpy as jnp
import pytest

from jaxllm.tpu.hlo import parse
from jaxllm.tpu.program import owners_of
from jaxllm.tpu.report import described
from jaxllm.tpu.traffic import Collective, Large, Traffic, group_size

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_slice (p0: u8[8,64,128], p1: s32[]) -> u8[64,128] {
  %p0 = u8[8,64,128]{2,1,0} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = u8[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %squeezed = u8[64,128]{1,0} bitcast(%slice)
}

%fused_update (q0: bf16[4,256], q1: bf16[1,256], q2: s32[]) -> bf16[4,256] {
  %q0 = bf16[4,256]{1,0} parameter(0)
  %q1 = bf16[1,256]{1,0} parameter(1)
  %q2 = s32[]{:T(128)} parameter(2)
  ROOT %updated = bf16[4,256]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

%all-reduce-scatter.1 (r0: f32[8,32]) -> f32[2,32] {
  %r0 = f32[8,32]{1,0:S(1)} parameter(0)
  %whole = f32[8,32]{1,0} all-reduce(%r0), replica_groups={{0,1,2,3}}, to_apply=%fused_slice
  %first = s32[]{:T(128)} constant(0)
  ROOT %kept = f32[2,32]{1,0:S(1)} dynamic-slice(%whole, %first, %first), dynamic_slice_sizes={2,32}
}

%body (state: (s32[], u8[8,64,128], f32[16])) -> (s32[], u8[8,64,128], f32[16]) {
  %state = (s32[]{:T(128)}, u8[8,64,128]{2,1,0}, f32[16]{0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %stack = u8[8,64,128]{2,1,0} get-tuple-element(%state), index=1
  %sum = f32[16]{0} get-tuple-element(%state), index=2
  %one = u8[64,128]{1,0:T(8,128)(4,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %more = f32[16]{0} all-reduce(%sum), replica_groups=[2,4]<=[8], to_apply=%fused_slice
  ROOT %next = (s32[]{:T(128)}, u8[8,64,128]{2,1,0}, f32[16]{0}) tuple(%i, %stack, %more)
}

%condition (state.1: (s32[], u8[8,64,128], f32[16])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, u8[8,64,128]{2,1,0}, f32[16]{0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (w: u8[8,64,128], c: bf16[4,256], x: bf16[1,256], i0: s32[]) -> (bf16[4,256], bf16[4,256]) {
  %w = u8[8,64,128]{2,1,0} parameter(0)
  %c = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[1,256]{1,0} parameter(2)
  %i0 = s32[]{:T(128)} parameter(3)
  %zeros = f32[16]{0} broadcast(%i0), dimensions={}
  %init = (s32[]{:T(128)}, u8[8,64,128]{2,1,0}, f32[16]{0}) tuple(%i0, %w, %zeros)
  %loop = (s32[]{:T(128)}, u8[8,64,128]{2,1,0}, f32[16]{0}) while(%init), condition=%condition, body=%body
  %scores = f32[8,32]{1,0:S(1)} broadcast(%i0), dimensions={}
  %scattered = f32[2,32]{1,0:S(1)} fusion(%scores), kind=kCustom, calls=%all-reduce-scatter.1
  %near = (bf16[1,256]{1,0:S(1)}, bf16[1,256]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near-done = bf16[1,256]{1,0:S(1)} copy-done(%near)
  %written = bf16[4,256]{1,0:T(8,128)(2,1)} fusion(%c, %near-done, %i0), kind=kLoop, calls=%fused_update
  %turned = bf16[4,256]{0,1:T(8,128)(2,1)} copy(%written), metadata={op_name="jit(step)/turned"}
  %kernel = bf16[4,256]{1,0} custom-call(%c), custom_call_target="tpu_custom_call", backend_config=\
{"custom_call_config":{"cost_estimate":{"flops":"8","transcendentals":"0","bytes_accessed":"3000"}}}
  %gathered = bf16[8,256]{1,0} all-gather(%turned), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %out = (bf16[4,256]{1,0}, bf16[4,256]{1,0}) tuple(%written, %turned)
}
"""
OWNERS = "weights", "cache", "activations", "activations"       # of main's parameters


@pytest.fixture(scope="module")
def traffic():
    return Traffic(parse(PROGRAM), OWNERS)


def test_bytes_by_class(traffic):
    """Weights: five slices of 8 KiB. Cache: the update of 512 bytes, what the kernel says, and what is gathered of it.
    Copies: 2048 read and written. Activations: zeros, five all-reduces of 64 bytes in and out, x, the scalars, and the
    all-gather's result."""
    scalars, zeros, reduced, x = 3 * 4, 64, 5 * 2 * 64, 512
    assert traffic.by_class() == {"weights": 5 * 64 * 128, "cache": 512 + 3000 + 2048,
                                  "copies": 2 * 2048, "activations": scalars + zeros + reduced + x + 4096}


def test_parameters_in_a_tuple(traffic):
    """As a program has them that takes more than 2,000."""
    head, entry = PROGRAM.split("ENTRY ")
    shapes = ["u8[8,64,128]{2,1,0}", "bf16[4,256]{1,0:T(8,128)(2,1)}", "bf16[1,256]{1,0}", "s32[]{:T(128)}"]
    for number, shape in enumerate(shapes):
        entry = entry.replace(f"{shape} parameter({number})", f"{shape} get-tuple-element(%all), index={number}")
    entry = entry.replace("{\n", f"{{\n  %all = ({', '.join(shapes)}) parameter(0)\n", 1)
    assert Traffic(parse(f"{head}ENTRY {entry}"), OWNERS).by_class() == traffic.by_class()


def test_what_was_gathered_is_whose_it_was(traffic):
    reading = "  %summed = bf16[256]{0:S(1)} reduce(%gathered, %i0), dimensions={0}, to_apply=%add\n  ROOT %out"
    found = Traffic(parse(PROGRAM.replace("  ROOT %out", reading)), OWNERS).by_class()
    assert found["cache"] == traffic.by_class()["cache"] + 4096


def test_unused_arguments_are_no_parameters():
    compiled = jax.jit(lambda a, b, c: {"x": a["x"] + c, "y": a["y"]}).lower(
        {"v": 1.0, "x": jnp.ones(3), "y": 2}, jnp.ones(3), jnp.ones(3)).compile()
    assert owners_of(compiled, "abc") == ["a", "a", "c"]


def test_collectives(traffic):
    """A ring of n sends (n - 1) / n of the whole, an all-reduce twice that."""
    assert traffic.collectives() == [Collective("all-reduce", 5, 5 * 2 * 64 * 3 // 4),
                                     Collective("all-gather", 1, 4096 // 2),
                                     Collective("reduce-scatter", 1, 8 * 32 * 4 * 3 // 4)]


def test_ragged_exchanges():
    """Of as many rows as there are room for on both sides, those that are sent to others, or an expected part."""
    program = PROGRAM.replace("  %gathered =", """  %rows = bf16[4,256]{1,0} ragged-all-to-all(%x, %c, %i0, %i0, %i0), \
replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}
  %gathered =""")
    for share, nbytes in ((1.0, 512 * 3 // 4), (0.5, 512 * 3 // 8)):
        found = Traffic(parse(program), OWNERS, share).collectives()
        assert Collective("ragged-all-to-all", 1, nbytes) in found


@pytest.mark.parametrize(("groups", "size"), [
    ("[2,4]<=[8]", 4), ("{{0,1,2},{3,4,5}}", 3), ("mesh['a'=8,'b'=1,'c'=2] {'a','c'}", 16),
    ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=8], device_ids=([8,8]T(1,0)) {'axis_0'}", 8)])
def test_groups(groups, size):
    text = f"  %sum = f32[] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    (found,) = parse("ENTRY %main () -> f32[] {\n" + text + "\n}\n").computations["main"].values()
    assert group_size(found) == size


def test_large_buffers_are_named(traffic):
    found = {x.name: x for x in traffic.large(2048)}
    assert found.keys() == {"turned", "gathered", "kernel"}      # what is written is so in place
    copy = found["turned"]
    assert (copy.opcode, copy.owner, copy.nbytes, copy.op_name) == ("copy", "cache", 2048, "jit(step)/turned")


def test_layers_that_are_alike_share_a_line():
    def made(name, nbytes, layer):
        return Large(name, "fusion", nbytes, f"jit(step)/transpose(jvp(layer_{layer}))/mul", "weights")
    assert described([made("a", 2000, 0), made("b", 1000, 0), made("c", 1000, 1), made("d", 1000, 12)]) == [
        "fusion a: 2 kB of weights (jit(step)/transpose(jvp(layer_0))/mul)",
        "fusion b and 2 more, each: 1 kB of weights (jit(step)/transpose(jvp(layer_*))/mul)"]


def test_a_real_program():
    """Loops that XLA's CPU compiler made of ours: seven times the rows of a stack."""
    def step(model, x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ model[i]), x)
    model, x = jnp.ones((7, 256, 256)), jnp.ones((4, 256))
    compiled = jax.jit(step).lower(model, x).compile()
    module = parse(compiled.as_text())
    assert 7 in {module.trips(module.loop(loop)[1]) for body in module.computations.values()
                 for loop in body.values() if loop.opcode == "while"}
    moved = Traffic(module, owners_of(compiled, ("weights", "activations"))).by_class()
    assert 7 * 256 * 256 * 4 <= moved["weights"] + moved["copies"] + moved["activations"] <= 4 * 7 * 256 * 256 * 4


def test_an_instruction_of_several_lines(traffic):
    """A kernel's metadata may have lines of its own, with brackets in the first column; what follows is still read."""
    target = 'custom_call_target="tpu_custom_call"'
    metadata = ', frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 1024}"\n}}'
    changed = Traffic(parse(PROGRAM.replace(target, target + metadata)), traffic.owners)
    assert changed.by_class() == traffic.by_class() and changed.collectives() == traffic.collectives()
