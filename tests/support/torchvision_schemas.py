"""Lets torchvision import beside a CPU build of torch.

torchvision's wheel registers fake kernels for two operators that only its compiled part, built for
CUDA, defines; without them `import torchvision`, and so `import timm`, dies with "operator
torchvision::nms does not exist". The tests call neither.
"""

_SCHEMAS = (
  'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
  'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
_libraries = []  # torch forgets the schemas when the Library object goes


def define() -> None:
  """Defines the schemas once, where torch is installed and torchvision needs them."""
  if _libraries:
    return
  try:
    import torch
  except ImportError:
    return
  try:
    import torchvision  # noqa: F401
  except (ImportError, RuntimeError):
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for schema in _SCHEMAS:
      library.define(schema)
    _libraries.append(library)
