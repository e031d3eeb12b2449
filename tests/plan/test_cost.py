"""Programs whose cost can be told by hand."""

import pytest
from plan import programs

from jaxinfra.plan import cost, program

HZ, LINK = 1e3, 100.0  # a cycle is a millisecond, the link carries 100 bytes a second
MESH = {"data": 2, "fsdp": 2}
CYCLES = cost.cycles_at(HZ)


def play(text=programs.LOOP, **kind):
    settings = {"clock": CYCLES, "link_bytes_per_sec": LINK, "axes": MESH} | kind
    return cost.play(program.parse(text), **settings)


def test_a_program_is_read_into_computations_of_instructions():
    read = program.parse(programs.LOOP)
    assert read.entry == "main.1"
    dot = read.by_name("body.1")["dot.1"]
    assert (dot.op, dot.operands, dot.cycles) == ("convolution", ["x", "w"], 1000.0)
    assert dot.scope == "jit(step)/jvp()/while/body/ffn/dot_general"
    assert read.shapes_of("body.1", "w")[0] == program.Shape("bf16", (4, 16))
    kernel = read.by_name("main.1")["splash_mqa_fwd.3"]
    assert kernel.is_root, "an attribute that breaks a line is one instruction still"
    assert kernel.scope == "jit(step)/attention/pallas_call"


def test_a_loop_turns_as_often_as_its_bound_says():
    read = program.parse(programs.LOOP)
    loop = read.by_name("main.1")["while.1"]
    assert program.trip_count(read, loop) == 3
    by_two = programs.LOOP.replace("%one = s32[]{:T(128)} constant(1)",
                                   "%one = s32[]{:T(128)} constant(2)")  # fmt: skip
    read = program.parse(by_two.replace("constant(3)", "constant(8)"))
    assert program.trip_count(read, loop) == 4


def test_compute_is_cycles_times_turns_and_the_dearest_branch():
    found = play()
    assert found.compute_secs == pytest.approx(3 * 1.0 + 0.5)
    assert found.matmul_flops == 3 * 2 * 8 * 4 * 16
    assert found.kernels == {"splash_mqa_fwd": 1}
    assert found.unknown_loops == 0
    assert found.scopes == pytest.approx(
        {"jit(step)/jvp()/while/body/ffn/dot_general": 3.0, "jit(step)/update/neg": 0.5}
    )


def test_branches_weigh_as_often_as_they_are_taken():
    def compute_secs(scope, *parts):
        return play(shares={scope: cost.Share(parts, parts)}).compute_secs

    assert compute_secs("/slot", 0.75, 0.25) == pytest.approx(3.125)
    assert compute_secs("/slot", 1.0, 0.0) == pytest.approx(3.0)
    assert compute_secs("/elsewhere", 1.0, 0.0) == pytest.approx(3.5)
    assert compute_secs("jit", 1.0, 0.0) == pytest.approx(3.5), "not directly in it"


def test_what_devices_do_by_turns_takes_the_time_of_all_and_the_work_of_one():
    """The branch has a matmul, a kernel and an all-reduce; some device takes it in
    three turns of four, the mean device in one."""
    branch = """  %dot.2 = bf16[8,8]{1,0} convolution(%d, %d), dim_labels=bf_io->bf
  %kernel.1 = bf16[8,4]{1,0} custom-call(%d), custom_call_target="tpu_custom_call"
  %ar.2 = f32[100]{0} all-reduce(%d), channel_id=9, replica_groups={{0,1},{2,3}}, \
to_apply=%add.1
  ROOT %neg ="""
    text = programs.LOOP.replace("  ROOT %neg =", branch)
    found = play(text, shares={"/slot": cost.Share((0.25, 0.75), (0.75, 0.25))})
    once = 2 * 8 * 4 * 8
    assert found.matmul_flops == pytest.approx(play().matmul_flops + once / 4)
    assert found.sent[("all-reduce", "fsdp", "sync")] == pytest.approx(400 / 4)
    assert found.kernels["kernel"] == pytest.approx(1 / 4)
    assert found.paid_kernels["kernel"] == pytest.approx(3 / 4)
    assert found.compute_secs == pytest.approx(3 * 1.0 + 0.5 * 3 / 4)
    assert found.waiting_secs == pytest.approx(3 * 4.0 + 4.0 * 3 / 4)


def test_only_what_nothing_hides_is_waited_for():
    """The gather of 128 / 2 bytes takes 0.64 s, under the 1 s of the matmul; the
    all-reduce of 2 x 400 / 2 bytes takes 4 s, and nothing runs beside it."""
    found = play()
    assert found.sent == pytest.approx(
        {
            ("all-gather", "fsdp", "async"): 3 * 64,
            ("all-reduce", "data", "sync"): 3 * 400,
        }
    )
    assert found.waited == pytest.approx({("all-reduce", "data", "sync"): 3 * 4.0})
    slow = play(link_bytes_per_sec=LINK / 2)
    assert slow.waited[("all-gather", "fsdp", "async")] == pytest.approx(3 * 0.28)
    assert slow.secs == pytest.approx(slow.compute_secs + slow.waiting_secs)


def test_what_goes_from_node_to_node_takes_the_slower_network():
    """Each of 2 nodes holds fsdp 2: both of its devices share what leaves it, where
    they are in one group. The all-reduce over data is of one device a node."""
    slow = {"node": 2, "network_bytes_per_sec": LINK / 8}
    found = play(**slow)
    # 400 bytes at an eighth of the link's rate, 8 times the 4 s of one network.
    assert found.waited[("all-reduce", "data", "sync")] == pytest.approx(3 * 32.0)
    # Within a node, as before.
    assert ("all-gather", "fsdp", "async") not in found.waited
    over_all = programs.LOOP.replace("{{0,2},{1,3}}", "{{0,1,2,3}}")
    shared = play(over_all, **slow)
    # 2 x 400 x 3 / 4 bytes, of which each device of a node sends half.
    assert shared.waited[("all-reduce", "data+fsdp", "sync")] == pytest.approx(3 * 24.0)


def test_copies_to_the_host_have_a_way_of_their_own():
    """Two turns: 64 bytes go beside a matmul of 1 s, 64 come where nobody computes."""
    played = cost.play(
        program.parse(programs.HOST),
        clock=cost.cycles_at(1000.0),
        link_bytes_per_sec=1e-9,
        host_bytes_per_sec=32.0,
    )
    assert played.sent == {
        ("copy", "host", "async"): 2 * 64.0,
        ("copy", "host", "sync"): 2 * 64.0,
    }
    assert played.compute_secs == pytest.approx(2 * 1.0)
    # Of the 2 s of the first the matmul hides one; all of the second is waited for.
    assert played.waited == {
        ("copy", "host", "async"): pytest.approx(2 * 1.0),
        ("copy", "host", "sync"): pytest.approx(2 * 2.0),
    }
    assert sum(played.waited.values()) == pytest.approx(played.waiting_secs)
    unknown = cost.play(
        program.parse(programs.HOST), clock=cost.cycles_at(1e3), link_bytes_per_sec=1.0
    )
    assert unknown.waiting_secs == 0


def test_a_loop_that_cannot_be_read_is_counted():
    text = programs.LOOP.replace("%bound = s32[]{:T(128)} constant(3)",
                                 "%bound = s32[]{:T(128)} negate(%j)")  # fmt: skip
    found = play(text)
    assert found.unknown_loops == 1
    assert found.compute_secs == pytest.approx(1.5)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        program.parse("hello\n")


def test_a_roofline_takes_the_longer_of_matmul_and_memory():
    bytes_moved = 2 * (8 * 4 + 4 * 16 + 8 * 16)
    flops = 2 * 8 * 4 * 16
    clock = cost.roofline(peak_flops=flops, bytes_per_sec=bytes_moved / 0.25)
    read = program.parse(programs.LOOP)
    dot = read.by_name("body.1")["dot.1"]
    assert clock(read, "body.1", dot) == pytest.approx(1.0)
    clock = cost.roofline(peak_flops=flops * 8, bytes_per_sec=bytes_moved / 0.25)
    assert clock(read, "body.1", dot) == pytest.approx(0.25)
    assert clock(read, "main.1", read.by_name("main.1")["x.1"]) == 0.0
    clock = cost.roofline(flops, bytes_moved * 1e6, peak_8bit=2 * flops)
    assert clock(read, "body.1", dot) == pytest.approx(1.0)
    in_8_bits = program.parse(programs.LOOP.replace("bf16[", "f8e4m3fn["))
    dot = in_8_bits.by_name("body.1")["dot.1"]
    assert clock(in_8_bits, "body.1", dot) == pytest.approx(0.5)
