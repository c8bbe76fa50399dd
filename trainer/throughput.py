"""How much arithmetic a token costs, and what part of the device's peak a run reaches."""

from __future__ import annotations

import torch

# Dense bf16 matrix products without sparsity, FLOP/s, from the makers' data sheets. An unknown device has no MFU:
# a guessed peak would make a wrong number look right.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of one device for this precision; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def training_flops_per_token(forward_flops: float) -> float:
    """Backward costs twice the forward; recomputation does not count."""
    return 3 * forward_flops
