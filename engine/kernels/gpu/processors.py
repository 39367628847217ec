"""How many processors there are to share the work."""

from functools import cache

import torch


@cache
def count_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
