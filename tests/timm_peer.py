"""timm's side of a comparison, in a process without jax and tensorflow.

  python tests/timm_peer.py NAME FOLDER

Reads FOLDER/photo.jpg; writes input.npy, as timm's evaluation transform has it,
and makes a model: init.pth as it starts; weights.pth and logits.npy of random
weights and statistics. If FOLDER/ours.safetensors is there, loads that instead,
strictly.
"""

import pathlib
import sys

import numpy as np
from PIL import Image
import safetensors.torch
import torch

# torch's CPU builds lack the operators that torchvision wants to describe.
register = torch.library.register_fake
torch.library.register_fake = lambda name, *args, **kwargs: (
  (lambda function: function)
  if str(name).startswith("torchvision::")
  else register(name, *args, **kwargs)
)
import timm  # noqa: E402

name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
torch.manual_seed(0)
model = timm.create_model(name).eval()
torch.save(model.state_dict(), folder / "init.pth")
for parameter in model.parameters():
  if not parameter.any():  # Such as the heads of MLP-Mixers.
    torch.nn.init.normal_(parameter, std=0.02)
for module in model.modules():
  if isinstance(module, torch.nn.BatchNorm2d):
    module.running_mean.normal_(0, 0.1)
    module.running_var.uniform_(0.5, 1.5)
ours = folder / "ours.safetensors"
if ours.exists():
  tensors = safetensors.torch.load_file(ours)
  counts = {k: v for k, v in model.state_dict().items() if "num_batches" in k}
  model.load_state_dict(tensors | counts, strict=True)
else:
  torch.save(model.state_dict(), folder / "weights.pth")
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings)
photo = Image.open(folder / "photo.jpg").convert("RGB")
images = transform(photo)[None]
with torch.no_grad():
  logits = model(images)
np.save(folder / "input.npy", images.numpy())
np.save(folder / "logits.npy", logits.numpy())
