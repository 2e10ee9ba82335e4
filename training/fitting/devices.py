"""The device and the precision of a training run."""

import torch

from retrieval.errors import InputError


def pick_device(name: str) -> torch.device:
    """Returns the device of a name; "auto" is CUDA if available, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"There is no device {name} here; use `device='auto'` or `device='cpu'`.") from error
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Returns "bf16" or "fp32"; "auto" is bfloat16 on a GPU that supports it, else float32.

    bfloat16 has float32's range, so the loss needs no scaling. Parameters, their updates and batch
    normalisation's statistics stay float32.

    Raises:
        InputError: the device does not support bfloat16.
    """
    able = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if name == "bf16" and not able:
        raise InputError(f"The device {device} has no bfloat16; use `precision='fp32'`.")
    if name == "auto":
        return "bf16" if able and device.type == "cuda" else "fp32"
    return name


def in_software(precision: str, device: torch.device) -> bool:
    """Returns whether a precision is slower than float32: bfloat16 on a CPU without instructions for it."""
    plain = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    return precision == "bf16" and device.type == "cpu" and plain
