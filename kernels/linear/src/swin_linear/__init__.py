"""The operators of namespace ``swin_linear``; importing this package loads them.

``kernels/linear/__init__.py`` of the repository calls them, and says what they take. Their last argument, the number of
lanes, chooses the code of an instruction set; 0 takes the best that the processor runs.
"""

from pathlib import Path

import torch

_library = next(Path(__file__).parent.glob("_C.*"), None)
if _library is None:
    raise ImportError(f"{Path(__file__).parent} holds no compiled library")
torch.ops.load_library(_library)
