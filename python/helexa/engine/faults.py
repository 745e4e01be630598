"""What is left of a device after a fault."""

import threading

import torch


def is_lost(device: str, timeout_s: float = 5.0) -> bool:
    """Whether this process can use the device no more: it answers no call, or fails every one.

    The main memory and processor are never lost.
    """
    if not device.startswith("cuda"):
        return False
    works = threading.Event()

    def try_it() -> None:
        try:
            torch.zeros(1, device=device).add_(1).item()
            torch.cuda.synchronize(device)
        except Exception:  # whatever it is, the device does not work
            return
        works.set()

    threading.Thread(target=try_it, name=f"probe {device}", daemon=True).start()
    return not works.wait(timeout_s)
