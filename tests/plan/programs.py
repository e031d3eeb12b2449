"""Small programs in the words of XLA's TPU compiler, cut down from compiled ones."""

# A loop of three turns: a gather that runs beside one matmul, then one that nobody
# hides; before it a branch, after it an attention kernel.
LOOP = """HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[8,4], bf16[4,16])) -> (s32[], bf16[8,4], bf16[4,16]) {
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0}, /*index=2*/bf16[4,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %w = bf16[4,16]{1,0} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %ag-start = (bf16[2,16]{1,0}, bf16[4,16]{1,0}) all-gather-start(%w), channel_id=7, \
replica_groups=[2,2]<=[4], dimensions={0}
  %dot.1 = bf16[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, \
metadata={op_name="jit(step)/jvp()/while/body/ffn/dot_general"}, \
backend_config={"estimated_cycles":"1000"}
  %ag-done = bf16[4,16]{1,0} all-gather-done(%ag-start)
  %ar.1 = f32[100]{0} all-reduce(%x), channel_id=8, replica_groups={{0,2},{1,3}}, \
to_apply=%add.1
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[8,4]{1,0}, bf16[4,16]{1,0}) tuple(%next, %x, %ag-done)
}

%condition.1 (q: (s32[], bf16[8,4], bf16[4,16])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,4]{1,0}, bf16[4,16]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%cheap.1 (c: bf16[8,4]) -> bf16[8,4] {
  ROOT %c = bf16[8,4]{1,0} parameter(0)
}

%dear.1 (d: bf16[8,4]) -> bf16[8,4] {
  %d = bf16[8,4]{1,0} parameter(0)
  ROOT %neg = bf16[8,4]{1,0} negate(%d), metadata={op_name="jit(step)/update/neg"}, \
backend_config={"estimated_cycles":"500"}
}

ENTRY %main.1 (x: bf16[8,4], w: bf16[4,16], k: s32[]) -> bf16[8,4] {
  %x.1 = bf16[8,4]{1,0} parameter(0)
  %w.1 = bf16[4,16]{1,0} parameter(1)
  %k.1 = s32[]{:T(128)} parameter(2)
  %branch = bf16[8,4]{1,0} conditional(%k.1, %x.1, %x.1), \
branch_computations={%cheap.1, %dear.1}, metadata={op_name="jit(step)/slot/cond"}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,4]{1,0}, bf16[4,16]{1,0}) tuple(%zero, %branch, %w.1)
  %while.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}, bf16[4,16]{1,0}) while(%start), \
condition=%condition.1, body=%body.1
  %out = bf16[8,4]{1,0} get-tuple-element(%while.1), index=1
  ROOT %splash_mqa_fwd.3 = bf16[8,4]{1,0} custom-call(%out), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 512
}}, metadata={op_name="jit(step)/attention/pallas_call"}
}
"""

# A loop's stack from which a fusion takes a slice, into which one puts a slice, and
# which one reads whole.
SLICES = """HloModule slices, is_scheduled=true

%take (p0: f32[100,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = f32[100,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %out = f32[4,8]{1,0} bitcast(%slice)
}

%put_in (q0: f32[100,4,8], q1: f32[4,8], q2: s32[]) -> f32[100,4,8] {
  %q0 = f32[100,4,8]{2,1,0} parameter(0)
  %q1 = f32[4,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,4,8]{2,1,0} bitcast(%q1)
  ROOT %new = f32[100,4,8]{2,1,0} dynamic-update-slice(%q0, %row, %q2, %zero, %zero)
}

%twice (r0: f32[100,4,8]) -> f32[100,4,8] {
  %r0 = f32[100,4,8]{2,1,0} parameter(0)
  ROOT %sum = f32[100,4,8]{2,1,0} add(%r0, %r0)
}

ENTRY %main (stack: f32[100,4,8], i: s32[]) -> f32[100,4,8] {
  %stack = f32[100,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %taken = f32[4,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take
  %put = f32[100,4,8]{2,1,0} fusion(%stack, %taken, %i), kind=kLoop, calls=%put_in
  ROOT %all = f32[100,4,8]{2,1,0} fusion(%put), kind=kLoop, calls=%twice
}
"""

# A loop of two turns: a part of an array that lies with the host is written beside a
# matmul, then a fusion reads one in place.
HOST = """HloModule jit_step, is_scheduled=true

%take (near: bf16[8,4], far: bf16[2,8,4], at: s32[]) -> bf16[8,4] {
  %near = bf16[8,4]{1,0} parameter(0)
  %at = s32[] parameter(2)
  %far = bf16[2,8,4]{2,1,0} parameter(1)
  %part = bf16[1,8,4]{2,1,0} dynamic-slice(%far, %at, %at, %at), \
dynamic_slice_sizes={1,8,4}
  %flat = bf16[8,4]{1,0} bitcast(%part)
  ROOT %sum = bf16[8,4]{1,0} add(%near, %flat)
}

%body.1 (p: (s32[], bf16[8,4], bf16[2,8,4])) -> (s32[], bf16[8,4], bf16[2,8,4]) {
  %p = (s32[], bf16[8,4]{1,0}, bf16[2,8,4]{2,1,0:S(5)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %away = bf16[2,8,4]{2,1,0:S(5)} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %go = ((bf16[2,8,4]{2,1,0:S(5)}, bf16[8,4]{1,0}, s32[]), bf16[2,8,4]{2,1,0:S(5)}, \
u32[]) fusion-start(%away, %x, %i), kind=kLoop, calls=%put
  %dot.1 = bf16[8,8]{1,0} convolution(%x, %x), \
backend_config={"estimated_cycles":"1000"}
  %gone = bf16[2,8,4]{2,1,0:S(5)} fusion-done(%go)
  %back = bf16[8,4]{1,0} fusion(%x, %gone, %i), kind=kLoop, calls=%take
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[8,4]{1,0}, bf16[2,8,4]{2,1,0:S(5)}) tuple(%next, %back, %gone)
}

%condition.1 (q: (s32[], bf16[8,4], bf16[2,8,4])) -> pred[] {
  %q = (s32[], bf16[8,4]{1,0}, bf16[2,8,4]{2,1,0:S(5)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant(2)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main.1 (x: bf16[8,4]) -> bf16[8,4] {
  %x.1 = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %room = bf16[2,8,4]{2,1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[], bf16[8,4]{1,0}, bf16[2,8,4]{2,1,0:S(5)}) tuple(%zero, %x.1, %room)
  %while.1 = (s32[], bf16[8,4]{1,0}, bf16[2,8,4]{2,1,0:S(5)}) while(%start), \
condition=%condition.1, body=%body.1
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""
