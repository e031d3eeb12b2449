"""Six meshes, 200 steps on the shipped text: one line.

    python scripts/mesh_curves.py [--secs N]

Trains the model of `bench.py meshes` with a quarter of its layers from the same first
parameters on one CPU device and on five meshes of eight. Writes the losses to
results/mesh_curves.json, where a mesh that is there is not trained again, and draws
results/mesh_curves.svg.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from jaxinfra import config as c
from jaxinfra import launcher

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"
STEPS = 200
# Name -> (mesh, other choices), all of which give the same losses.
MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one device": ({}, {}),
    "fsdp 8": ({"fsdp": 8}, {}),
    "data 2 x fsdp 2 x tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    "pipeline 4 x tensor 2, 1f1b": (
        {"pipeline": 4, "tensor": 2},
        {"schedule": "1f1b"},
    ),
    "pipeline 2 x fsdp 4, zero bubble": (
        {"pipeline": 2, "fsdp": 4},
        {"schedule": "zero_bubble"},
    ),
    "context 4 x data 2, ring": ({"context": 4, "data": 2}, {"context": "ring"}),
}
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--secs", type=float, default=1e9, help="start no mesh after")
    args = parser.parse_args(argv)
    devices = c.RuntimeConfig(cpu_devices=8)
    launcher.prepare_process(c.Config(name="meshes", runtime=devices))
    path = RESULTS / "mesh_curves.json"
    losses = json.loads(path.read_text())["losses"] if path.exists() else {}
    began = time.monotonic()
    for name, choice in MESHES.items():
        if name in losses or time.monotonic() - began > args.secs:
            continue
        losses[name] = trained(*choice)
        found = {"largest_difference": largest_difference(losses), "losses": losses}
        path.write_text(json.dumps(found) + "\n")
        print(f"{name}: {losses[name][0]:.4f} to {losses[name][-1]:.4f}", flush=True)
    path.with_suffix(".svg").write_text(drawn(losses))
    print(f"largest difference from one device: {largest_difference(losses):.2e}")
    return 0


def trained(sizes: dict[str, int], choice: dict[str, Any]) -> list[float]:
    """The loss of every step."""
    import meshes  # beside this file

    base = meshes.config_of(None, "dense")
    changes = {
        "model": dataclasses.replace(base.model, repeats=4),
        "mesh": c.MeshConfig(**{"data": 1} | sizes),
        "parallel": c.ParallelConfig(**choice),
        "train": dataclasses.replace(
            base.train,
            steps=STEPS,
            batch_size=32,
            microbatches=4 if "pipeline" in sizes else 1,
        ),
    }
    return meshes.trained(dataclasses.replace(base, **changes)).losses


def largest_difference(losses: dict[str, list[float]]) -> float:
    expected = losses["one device"]
    return max(
        abs(a - b)
        for found in losses.values()
        for a, b in zip(found, expected, strict=True)
    )


def drawn(losses: dict[str, list[float]]) -> str:
    """The curves as SVG; each is dashed, at a phase of its own, so that all of them
    show where they lie on one another."""
    width, height, left, top = 720, 400, 60, 20
    low = min(map(min, losses.values())) - 0.1
    high = max(map(max, losses.values())) + 0.1

    def at(step: int, loss: float) -> str:
        x = left + (width - left - 20) * step / (STEPS - 1)
        y = top + (height - top - 50) * (high - loss) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in range(int(low) + 1, int(high) + 1):
        x1, y = at(0, tick).split(",")
        x2 = at(STEPS - 1, tick).split(",")[0]
        parts.append(f'<line x1="{x1}" y1="{y}" x2="{x2}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 24}" y="{float(y) + 4:.1f}">{tick}</text>')
    for step in (0, 50, 100, 150, STEPS - 1):
        x = at(step, low).split(",")[0]
        label = f'x="{x}" y="{height - 30}" text-anchor="middle"'
        parts.append(f"<text {label}>{step}</text>")
    dash = 12
    for i, (name, values) in enumerate(losses.items()):
        points = " ".join(at(step, loss) for step, loss in enumerate(values))
        gap = dash * (len(MESHES) - 1)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[i]}"'
            f' stroke-width="2.5" stroke-dasharray="{dash} {gap}"'
            f' stroke-dashoffset="{-dash * i}"/>'
        )
        y = top + 16 + 18 * i
        parts.append(
            f'<line x1="{width - 290}" y1="{y - 4}" x2="{width - 262}" y2="{y - 4}"'
            f' stroke="{COLOURS[i]}" stroke-width="2.5"/>'
        )
        parts.append(f'<text x="{width - 254}" y="{y}">{name}</text>')
    told = f"at most {largest_difference(losses):.0e} apart in {STEPS} steps"
    parts.append(
        f'<text x="{left}" y="{height - 8}">loss in nats a byte by step, float32;'
        f" {told}</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
