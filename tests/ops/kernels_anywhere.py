"""Fused kernels without their hardware: splash interpreted, cuDNN's to be traced."""

import functools

from jax._src.cudnn import fused_attention_stablehlo

from jaxinfra.ops import fused_attention

CUDNN_VERSION = 92000  # 9.20, newer than anything that is asked for


def allow(monkeypatch):
    splash = functools.partial(fused_attention.splash, interpret=True)
    monkeypatch.setattr(fused_attention, "splash", splash)
    found = lambda *_: CUDNN_VERSION
    for of_gpus in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(fused_attention_stablehlo, of_gpus, found)
