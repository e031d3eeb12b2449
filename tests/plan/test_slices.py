"""Several of a TPU's slices in a plan: devices, what leaves a slice, its mesh."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxinfra.plan import cost, program, step, targets

ROOT = pathlib.Path(__file__).parents[2]
HZ, LINK = 1e3, 100.0
# As libtpu 0.0.52 writes it: what a slice sends to others, and gets from them.
SEND = """HloModule jit_step, is_scheduled=true

ENTRY %main (g: f32[100]) -> f32[100] {
  %g = f32[100]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[100]{0}, u32[]{:S(2)}, token[]) send(%g, %after), channel_id=2, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}
  %recv = (f32[100]{0}, u32[]{:S(2)}, token[]) recv(%after), channel_id=1
  %send-done = token[] send-done(%send), channel_id=2
  %recv-done = (f32[100]{0}, token[]) recv-done(%recv), channel_id=1
  ROOT %out = f32[100]{0} get-tuple-element(%recv-done), index=0
}
"""


@pytest.mark.parametrize(
    ("kind", "target", "sent"),
    [
        ("ALL_REDUCE", '"{1,2,3,4}x{0:7}"', 2 * 400 * 3 / 4),
        ("ALL_GATHER", '"{1,2,3,4}x{0:7}"', 400 * 3),
        ("REDUCE_SCATTER", '"{1,2}x{0:7}"', 400 / 2),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", 400),
    ],
)
def test_what_leaves_a_slice_takes_the_network(kind, target, sent):
    text = SEND.replace("KIND", kind).replace("TARGET", target)
    found = cost.play(
        program.parse(text),
        clock=cost.cycles_at(HZ),
        link_bytes_per_sec=LINK,
        network_bytes_per_sec=LINK / 8,
        axes={"data": 1, "fsdp": 8},
    )
    name = kind.lower().replace("_", "-")
    assert found.sent == {(name, "slices", "async"): sent}
    assert found.waited == {(name, "slices", "async"): pytest.approx(8 * sent / LINK)}


def test_what_a_device_sends_to_itself_takes_no_link():
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (g: f32[100]) -> f32[100] {
  %g = f32[100]{0} parameter(0)
  ROOT %to = f32[100]{0} collective-permute(%g), channel_id=1, \
source_target_pairs={{0,0},{1,1}}
}
"""
    found = cost.play(
        program.parse(text),
        clock=cost.cycles_at(HZ),
        link_bytes_per_sec=LINK,
        axes={"fsdp": 2},
    )
    assert found.waiting_secs == 0


def test_a_target_is_as_many_slices_as_the_mesh_has():
    two = targets.of_slices(targets.parse("v5p:2x2x2"), 2)
    assert (two.num_devices, two.name) == (16, "v5p:2x2x2")
    # Its name says how many nodes there are.
    assert targets.of_slices(targets.parse("h100:2x8"), 2).num_devices == 16


@pytest.mark.parametrize(
    ("sizes", "within"),
    [
        ({"data": 4, "fsdp": 2, "pipeline": 1}, {"data": 2, "fsdp": 2, "pipeline": 1}),
        ({"data": 1, "fsdp": 2, "pipeline": 2}, {"data": 1, "fsdp": 2, "pipeline": 1}),
    ],
)
def test_the_program_of_a_slice_numbers_its_own_devices(sizes, within):
    assert step.in_a_slice(sizes, 2) == within
    assert step.in_a_slice(sizes, 1) == sizes


@pytest.mark.slow
def test_a_step_is_compiled_for_several_slices():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    small = {"width": 128, "ffn_width": 256, "repeats": 2, "vocab_size": 512}
    argv = [f"--model.{key}={value}" for key, value in small.items()]
    argv += ["--train.length=256", "--train.batch_size=16", "--precision=bfloat16"]
    mesh = ["--mesh.slices=2", "--mesh.data=2", "--mesh.fsdp=4"]
    plan = [sys.executable, "scripts/plan.py", "--target", "v5e:2x2", "--json"]
    done = subprocess.run(
        [*plan, *argv, *mesh],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["devices"] == 8
    over = {wire["axes"]: wire["kind"] for wire in found["wire"]}
    assert over.keys() == {"fsdp", "slices"}
