"""GPUs by a part of their name: what they compute and hold, as their makers give it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of GPU."""

    tflops: float
    """Dense bf16 (V100: fp16) tensor-core peak in TFLOP/s."""
    memory_gib: float
    """Memory that a process can have, in GiB."""


DEVICES: dict[str, Device] = {
    "B200": Device(2250.0, 178.0),
    "H200": Device(989.0, 139.8),
    "H100 PCIe": Device(756.0, 79.1),
    "H100": Device(989.0, 79.1),
    "H800": Device(989.0, 79.1),
    "A100": Device(312.0, 79.2),
    "A800": Device(312.0, 79.2),
    "L40S": Device(362.0, 44.4),
    "A10G": Device(70.0, 22.0),
    "L4": Device(121.0, 22.0),
    "V100": Device(125.0, 31.7),
}
"""By a part of the device's name, the first match wins."""


def device(name: str) -> Device | None:
    """The kind of GPU called ``name``, e.g. ``NVIDIA H200``; None where it is not known."""
    return next((device for part, device in DEVICES.items() if part in name), None)


def peak_tflops(name: str) -> float | None:
    """Peak TFLOP/s of the GPU called ``name``; None where it is not known."""
    known = device(name)
    return None if known is None else known.tflops
