"""PyTorch's part of `benchmarks.throughput`, in its own process.

Reads FOLDER/work.npz and work.json, and writes the result of each way to
FOLDER/WAY.npy. Then it reads the name of a way from each line of standard
input, runs it once, and prints the seconds.
"""

import json
from pathlib import Path
import sys
import time

import numpy as np
import torch
from torch import nn
import torch._functorch.config


class Residual(nn.Module):
  """x + fn(x)."""

  def __init__(self, fn: nn.Module):
    super().__init__()
    self.fn = fn

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x + self.fn(x)


class ConvMixer(nn.Module):
  """The paper's model, with timm's names."""

  def __init__(self, dim, depth, patch_size, kernel_size, num_classes, act):
    super().__init__()
    norm = lambda: [act(), nn.BatchNorm2d(dim)]
    self.stem = nn.Sequential(
      nn.Conv2d(3, dim, patch_size, stride=patch_size), *norm()
    )
    depthwise = lambda: nn.Conv2d(
      dim, dim, kernel_size, groups=dim, padding="same"
    )
    self.blocks = nn.Sequential(
      *[
        nn.Sequential(
          Residual(nn.Sequential(depthwise(), *norm())),
          nn.Conv2d(dim, dim, 1),
          *norm(),
        )
        for _ in range(depth)
      ]
    )
    self.head = nn.Linear(dim, num_classes)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def _timm_model(name, options):
  """timm's model; only families beside ConvMixer need timm."""
  # torch's CPU builds lack the operators that torchvision wants to describe.
  register = torch.library.register_fake
  torch.library.register_fake = lambda name, *args, **kwargs: (
    (lambda function: function)
    if str(name).startswith("torchvision::")
    else register(name, *args, **kwargs)
  )
  import timm

  return timm.create_model(name, **options)


def main(folder: Path) -> None:
  """Serves requests until standard input ends."""
  work = json.loads((folder / "work.json").read_text("utf-8"))
  arrays = dict(np.load(folder / "work.npz"))
  device = "cuda" if torch.cuda.is_available() else "cpu"
  tensors = {
    name: torch.from_numpy(array).to(device) for name, array in arrays.items()
  }
  runs = {}
  for way in work["ways"]:
    runs[way] = _make_run(work, tensors, way, device)
    result = runs[way]()  # Compiles.
    np.save(folder / f"{way}.npy", result.detach().float().cpu().numpy())
    runs[way]()
  print(json.dumps({"torch": torch.__version__, "threads":
                    torch.get_num_threads()}), flush=True)  # fmt: skip
  for line in sys.stdin:
    _synchronize(device)
    start = time.perf_counter()
    runs[line.strip()]()
    _synchronize(device)
    print(time.perf_counter() - start, flush=True)


def _synchronize(device):
  if device == "cuda":
    torch.cuda.synchronize()


def _make_run(work, tensors, way, device):
  """Returns a function that does the work once and returns the result."""
  torch._functorch.config.donated_buffer = False  # Each backward runs again.
  torch._dynamo.reset()  # Compile each way for its own layout.
  channels_last = way.startswith("channels_last")
  memory_format = (
    torch.channels_last if channels_last else torch.contiguous_format
  )
  compiled = torch.compile if way.endswith("compiled") else lambda f: f
  autocast = lambda: torch.autocast(
    device, torch.bfloat16, enabled=work["dtype"] == "bfloat16"
  )
  x = tensors["x"].permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
  mode = work["mode"]
  if mode in ("depthwise", "depthwise_grad", "pointwise"):
    dim = x.shape[1]
    if mode == "pointwise":
      layer = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU())
      weight = tensors["kernel"].permute(1, 0)[:, :, None, None]
      layer[0].bias = nn.Parameter(tensors["bias"])
      conv = layer[0]
    else:
      k = tensors["kernel"].shape[0]
      layer = conv = nn.Conv2d(
        dim, dim, k, groups=dim, padding="same", bias=False
      )
      weight = tensors["kernel"].permute(2, 0, 1)[:, None]
    conv.weight = nn.Parameter(weight.contiguous(memory_format=memory_format))
    layer = compiled(layer.to(device))
    if mode != "depthwise_grad":

      def infer():
        with torch.inference_mode(), autocast():
          return layer(x).permute(0, 2, 3, 1)

      return infer
    x.requires_grad_()
    with autocast():
      y = layer(x)
    grad = tensors["grad"].permute(0, 3, 1, 2)
    grad = grad.contiguous(memory_format=memory_format)

    def backward():
      wanted = x, conv.weight
      return torch.autograd.grad(y, wanted, grad, retain_graph=True)[0].permute(
        0, 2, 3, 1
      )

    return backward

  if "timm" in work:
    model = _timm_model(*work["timm"])
  else:
    act = {"gelu": nn.GELU, "relu": nn.ReLU}[work["activation"]]
    model = ConvMixer(*work["sizes"], act)
  weights = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
  missing = model.load_state_dict(weights, strict=False)
  assert all("num_batches" in name for name in missing.missing_keys), missing
  model = model.to(device).to(memory_format=memory_format).eval()
  forward = compiled(model)
  if mode == "infer":

    def infer():
      with torch.inference_mode(), autocast():
        return forward(x)

    return infer
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.01, fused=True
  )
  labels = tensors["labels"]

  def step():
    with autocast():
      loss = nn.functional.cross_entropy(forward(x), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss

  return step


if __name__ == "__main__":
  main(Path(sys.argv[1]))
