"""Peak rates of accelerators: what a perfect program would do."""

# JAX's device_kind -> the type of a model's computation -> dense FLOP/s, a
# multiply-add being two, without sparsity. Products of float32 are those of
# jax's default precision: bfloat16 on TPUs, TF32 on GPUs. A source is named
# once, above its lines; data sheets of NVIDIA that give only rates "with
# sparsity" give twice the dense ones.
PEAKS: dict[str, dict[str, float]] = {
  # cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, November 2026.
  "TPU v4": {"bfloat16": 275e12, "float32": 275e12},
  "TPU v5 lite": {"bfloat16": 197e12, "float32": 197e12},
  "TPU v5": {"bfloat16": 459e12, "float32": 459e12},
  "TPU v6 lite": {"bfloat16": 918e12, "float32": 918e12},
  # NVIDIA A100 data sheet.
  "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12, "float32": 156e12},
  "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12, "float32": 156e12},
  "NVIDIA A100-PCIE-40GB": {"bfloat16": 312e12, "float32": 156e12},
  "NVIDIA A100 80GB PCIe": {"bfloat16": 312e12, "float32": 156e12},
  # NVIDIA H100 whitepaper (SXM5), H100 data sheet (PCIe), H200 data sheet.
  "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4e12, "float32": 494.7e12},
  "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float32": 378e12},
  "NVIDIA H200": {"bfloat16": 989.4e12, "float32": 494.7e12},
  # NVIDIA L4 data sheet.
  "NVIDIA L4": {"bfloat16": 121e12, "float32": 60e12},
  # NVIDIA Ada GPU architecture whitepaper, appendix A.
  "NVIDIA GeForce RTX 4090": {"bfloat16": 165.2e12, "float32": 82.6e12},
}
