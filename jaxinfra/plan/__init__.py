"""What a training step will cost on hardware that is not here.

    python scripts/plan.py --config llama3_8b --target v5p:2x2x2
    python scripts/plan.py --config llama3_8b --target h100:1x8 --analytic

The real compilers of TPUs and GPUs need no hardware: `compilers` gives them a topology
(`targets` reads its name) and the step as `experiment.build` makes it, donated and with
the options of `compiler_options`, and gets the program that would run. From that come

- memory, exactly: arguments, temporaries and their peak on a device, against its HBM;
  of a step that a TPU's compiler refuses, since it does not fit, the bytes that it says
  the step needs, and what is known without a program;
- what travels: `program` reads the compiled text, `cost` plays it on one core, one
  link, the network between nodes and the way to the host's memory, loops multiplied
  out, and tells for each collective its kind, mesh axes, bytes on the wire, and how
  long the core waits for it; what is offloaded is of kind "copy", over "host", what
  leaves a TPU's slice, of which mesh.slices are compiled for, goes over "slices";
- the time of a step: on a TPU the compiler's own cycles of every fusion, plus that
  waiting, plus the kernels that carry no cycles: attention at a stated share of peak,
  grouped matmuls at peak; on a GPU, whose compiler tells no time, a roofline of every
  other kernel; matmuls, grouped ones too, at the share of peak that was measured. In a
  pipeline time is what any stage makes all wait for, and FLOPs, bytes and calls of
  kernels are those of the mean stage.

`analytic` says the same memory figures from the tree of parameter specs and the mesh
alone, in a second or two, for choosing a mesh before anything is compiled; it is a
model, fitted to compiled programs, where the rest is read from them.

A prediction orders programs: it tells which of two is better and where the time goes.
It is not a measurement, and says nothing of stragglers or of data.

Limits: the GPU's compiler, where no GPU is, cannot be told which arguments rest in the
host's memory. With optimizer.offload it lets the update read the state there, where on
a GPU copies bring it in, some parameters' at a time: of a Llama of 1.2 billion
parameters on one H100 13.2 GB are foretold, where the same compiler, told so through
jax's inner functions, says 15.3 (`analytic`: 15.3).
"""
