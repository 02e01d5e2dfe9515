"""Train a large model on a GPU of 16 GB. It takes more time; the training is the same to rounding.

Only the moving average differs a little, because train.py updates it every 100 steps.
In float32, weights, gradients, two moments of AdamW and the moving average take 20 bytes for each
weight that trains: 15.8 GiB for sd-v1. What backward needs of a batch of 4 at 256 px comes on top.
"""

import warnings
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def is_too_small(device, trained):
    """Does a GPU lack the memory to train these parameters in the usual way?"""
    if device.type != "cuda":
        return False
    needed = 20 * sum(p.numel() for p in trained) + 5 * 2**30
    return needed > torch.cuda.get_device_properties(device).total_memory


def save_memory(model):
    """Keep less of a model in training on the GPU.

    - tau remembers the inputs of its levels only. Backward computes the rest again, image by image.
    - The allocator joins free pieces of memory.
    """
    for level in model.tau.encoder.down:
        level.forward = partial(image_by_image, level.forward)
    if model.device.type == "cuda":
        with warnings.catch_warnings():  # it has no public name yet
            warnings.simplefilter("ignore")
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        torch.cuda.empty_cache()


def image_by_image(forward, x):
    """forward(x), one image at a time, each computed once more in backward."""
    once_more = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([once_more(image) for image in x.split(1)])
