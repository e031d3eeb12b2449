"""What single collectives send, and over which axes of the mesh."""

import pytest

from jaxinfra.plan import program, wires


def wire(text, mesh):
    """Of the root of the program's entry, `m`."""
    read = program.parse(text)
    [line] = [line for line in read["m"] if line.is_root]
    return wires.of(line, "m", mesh, program=read)


@pytest.mark.parametrize(
    ("attribute", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("replica_groups=[2,4]<=[8]", "fsdp+tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=[1,8]<=[8]", "data+fsdp+tensor"),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", "fsdp"),
        (
            "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
            "fsdp",
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            "data",
        ),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", "tensor"),
        ("replica_groups={}", "?"),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(attribute, axes):
    text = "ENTRY %m (x: f32[8]) -> f32[8] {\n  ROOT %r = f32[8]{0} all-reduce(%x)"
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert wire(f"{text}, {attribute}, to_apply=%a\n}}\n", mesh).axes == axes


@pytest.mark.parametrize(
    ("op", "out", "sent"),
    [
        ("all-gather", "f32[16]", 64 * 3 / 4),
        ("all-gather-start", "(f32[4], f32[16])", 64 * 3 / 4),
        ("all-reduce-start", "f32[16]", 64 * 2 * 3 / 4),
        ("reduce-scatter-start", "(f32[16], f32[4])", 16 * 3),
        ("all-reduce", "f32[16]", 64 * 2 * 3 / 4),
        ("reduce-scatter", "f32[4]", 16 * 3),
        ("all-to-all", "f32[16]", 64 * 3 / 4),
        ("collective-permute", "f32[16]", 64),
    ],
)
def test_a_collective_sends_what_its_ring_does(op, out, sent):
    text = (
        f"ENTRY %m (x: f32[16]) -> {out} {{\n"
        f"  ROOT %r = {out} {op}(%x), replica_groups=[1,4]<=[4]\n}}\n"
    )
    kind = op.removesuffix("-start")
    assert wire(text, None) == wires.Wire(kind, "?", sent)


@pytest.mark.parametrize(
    ("pairs", "load"),
    [
        ("{0,1},{1,2},{2,3},{3,0}", 1),
        ("{0,3},{1,2},{2,1},{3,0}", 1),  # on a ring of 4 the ends are neighbours
        ("{0,2},{1,3},{2,0},{3,1}", 2),
        ("{0,5},{1,4},{4,1},{5,0}", 2),  # of 6 in a ring, 1 to 4 is 3 links
    ],
)
def test_a_permutation_sends_what_its_busiest_link_carries(pairs, load):
    text = (
        "ENTRY %m (x: f32[16]) -> f32[16] {\n  ROOT %r = f32[16] "
        f"collective-permute(%x), source_target_pairs={{{pairs}}}\n}}\n"
    )
    size = 6 if "5" in pairs else 4
    for mesh, name in (({"a": size}, "a"), ({"b": 1, "a": size}, "a")):
        assert wire(text, mesh) == wires.Wire("collective-permute", name, 64 * load)


ROWS, ROOM = "bf16[64,8]{1,0}", "bf16[256,8]{1,0}"


@pytest.mark.parametrize(("given", "made"), [(ROWS, ROOM), (ROOM, ROWS)])
@pytest.mark.parametrize("form", ["sync", "tpu", "gpu"])
def test_an_even_exchange_of_rows_sends_the_rows_and_not_the_room(form, given, made):
    """64 rows to 4 devices, or back, where there is room for all: 3 of 4 rows go."""
    counts = ", ".join(["s32[4]{0}"] * 4)
    flags = {"tpu": ", u32[]{:S(2)}, u32[]{:S(2)}", "gpu": "", "sync": ""}[form]
    out = made if form == "sync" else f"(({given}, {made}, {counts}), {made}{flags})"
    op = "ragged-all-to-all" if form == "sync" else "ragged-all-to-all-start"
    text = f"""ENTRY %m (x: bf16[64,8], r: bf16[256,8], n: s32[4]) -> bf16[256,8] {{
  %x = {given} parameter(0)
  %r = {made} parameter(1)
  %n = s32[4]{{0}} parameter(2)
  ROOT %a = {out} {op}(%x, %r, %n, %n, %n, /*index=5*/%n), replica_groups=[1,4]<=[4]
}}
"""
    sent = 64 * 8 * 2 * 3 / 4
    assert wire(text, None) == wires.Wire("ragged-all-to-all", "?", sent)
