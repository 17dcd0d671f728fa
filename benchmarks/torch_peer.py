"""PyTorch's part of the benchmarks, in its own process; see `peer.Peer`."""

import importlib
import json
from pathlib import Path
import sys
import time
import types

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


def import_timm() -> types.ModuleType:
  """Imports timm, beside a CPU build of torch too.

  Those lack the operators that torchvision, which timm imports, describes.
  """
  register = torch.library.register_fake
  torch.library.register_fake = lambda name, *args, **kwargs: (
    (lambda function: function)
    if str(name).startswith("torchvision::")
    else register(name, *args, **kwargs)
  )
  try:
    return importlib.import_module("timm")
  finally:
    torch.library.register_fake = register


def main() -> None:
  """Answers requests, a JSON object a line, until standard input ends.

  {"load": FOLDER, "arrays": whether there are new ones}: the next work is that
  of FOLDER/work.json, on the arrays of FOLDER/work.npz. Its settings are 'mode'
  (of work.MODES), 'dtype', 'sizes' and 'activation' of a ConvMixer or 'timm',
  and 'channels', those of the results that are wanted (all by default).
  {"make": WAY}: compiles it, does the work once and writes the results to
  FOLDER/results.npz. {"time": WAY, "calls": N}: seconds of a call.
  """
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cudnn.benchmark = True  # Takes the fastest of its algorithms.
  facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
  print(json.dumps(facts | {"device": device}), flush=True)
  folder, work, tensors, runs = Path(), {}, {}, {}
  for line in sys.stdin:
    answer = {}
    match json.loads(line):
      case {"load": where, "arrays": new}:
        runs, folder = {}, Path(where)
        work = json.loads((folder / "work.json").read_text("utf-8"))
        if new:
          tensors = {
            name: torch.from_numpy(array).to(device)
            for name, array in np.load(folder / "work.npz").items()
          }
      case {"make": way}:
        try:
          runs[way], results = _faster_run(work, tensors, way, device, runs)
          if "channels" in work:
            results = [y[..., work["channels"]] for y in results]
          results = [y.detach().float().cpu().numpy() for y in results]
          np.savez(folder / "results.npz", *results)
          answer = {"precision": runs[way].precision}
        except Exception as e:  # Of the compiler, or out of memory.
          runs.pop(way, None)
          first = (str(e).strip().splitlines() or [""])[0]
          answer = {"error": f"{type(e).__name__}: {first}"}
      case {"time": way, "calls": calls}:
        answer = {"seconds": _seconds(runs[way], calls, device)}
    if device == "cuda" and "seconds" not in answer:
      torch.cuda.empty_cache()  # The other side may need it.
    print(json.dumps(answer), flush=True)


def _faster_run(work, tensors, way, device, runs):
  """A function that does the work once, and its first results.

  In bfloat16 a model runs either under autocast or with weights of bfloat16:
  the faster one, as the eager run in the same memory format tells.
  """
  if work["mode"] not in ("train", "infer") or work["dtype"] == "float32":
    precisions = [work["dtype"]]
  else:
    eager = runs.get(way.removesuffix(" compiled"))
    precisions = [eager.precision] if eager else ["autocast", "bfloat16"]
  made = []
  for precision in precisions:
    run = _make_run(work, tensors, way, device, precision)
    results = run()  # Compiles.
    run.precision = precision
    seconds = _seconds(run, 3, device) if precisions[1:] else 0.0
    made.append((seconds, run, results))
  return min(made, key=lambda x: x[0])[1:]


def _seconds(run, calls, device):
  """Seconds of one call, the mean over `calls`."""
  synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
  synchronize()
  start = time.perf_counter()
  for _ in range(calls):
    run()
  synchronize()
  return (time.perf_counter() - start) / calls


def _make_run(work, tensors, way, device, precision):
  """Returns a function that does the work once and returns the results."""
  torch._functorch.config.donated_buffer = False  # Each backward runs again.
  torch._dynamo.reset()  # Compile each way for its own layout.
  channels_last = way.startswith("channels_last")
  memory_format = (
    torch.channels_last if channels_last else torch.contiguous_format
  )
  compiled = torch.compile if way.endswith("compiled") else lambda f: f
  autocast = lambda: torch.autocast(
    device, torch.bfloat16, enabled=precision == "autocast"
  )
  dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
  image = lambda a: (
    a.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
  )
  x = image(tensors["x"])
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
    layer = compiled(layer.to(device, dtype))
    if mode != "depthwise_grad":

      def infer():
        with torch.inference_mode():
          return [layer(x).permute(0, 2, 3, 1)]

      return infer
    x.requires_grad_()
    y = layer(x)
    grad = image(tensors["grad"])

    def backward():
      wanted = x, conv.weight
      x_grad, kernel = torch.autograd.grad(y, wanted, grad, retain_graph=True)
      return [x_grad.permute(0, 2, 3, 1), kernel[:, 0].permute(1, 2, 0)]

    return backward

  if "timm" in work:
    name, options = work["timm"]
    # Only families beside ConvMixer need timm.
    model = import_timm().create_model(name, **options)
  else:
    act = {"gelu": nn.GELU, "relu": nn.ReLU}[work["activation"]]
    model = ConvMixer(*work["sizes"], act)
  weights = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
  missing = model.load_state_dict(weights, strict=False)
  assert all("num_batches" in name for name in missing.missing_keys), missing
  model = model.to(device, dtype).to(memory_format=memory_format).eval()
  forward = compiled(model)
  if mode == "infer":

    def infer():
      with torch.inference_mode(), autocast():
        return [forward(x)]

    return infer
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.01, fused=True
  )
  labels = tensors["labels"]

  def step():
    with autocast():
      loss = nn.functional.cross_entropy(forward(x).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return [loss]

  return step


if __name__ == "__main__":
  main()
