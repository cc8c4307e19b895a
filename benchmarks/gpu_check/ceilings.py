"""What the device can do at best: the rates that the other sections' figures are shares of."""

import torch

from rob.benchmarks.gpu_check.section import Section


def run(section: Section) -> None:
    device, toy = section.device, section.toy
    count = section.size(1 << 16, 1 << 30, 1 << 30)
    source, target = torch.ones(2, count, dtype=torch.uint8, device=device)
    seconds = section.device_seconds_of(lambda a=source, b=target: b.copy_(a))
    section.figures["copy_gb_per_second"] = 2 * count / seconds / 1e9
    del source, target

    side = section.size(64, 8192, 8192)
    kept = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype, tf32 in (
            ("bf16", torch.bfloat16, False),
            ("tf32", torch.float32, True),
            ("fp32", torch.float32, False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = torch.randn(2, side, side, device=device, dtype=dtype)
            seconds = section.device_seconds_of(lambda: torch.mm(a, b), 3 if name == "fp32" else 10)  # noqa: B023
            section.figures[f"{name}_tflops"] = 2 * side**3 / seconds / 1e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept

    count = section.size(1 << 16, 1 << 28, 1 << 28)
    on_device = torch.empty(count, dtype=torch.uint8, device=device)
    for name in ("pinned", "pageable"):
        host = torch.ones(count, dtype=torch.uint8, pin_memory=name == "pinned" and device.type == "cuda")
        seconds = section.seconds_of(lambda: on_device.copy_(host, non_blocking=True), 3, 1)  # noqa: B023
        section.figures[f"{name}_to_device_gb_per_second"] = count / seconds / 1e9

    small, launches = torch.zeros(1, device=device), section.size(10, 2000, 2000)

    def launch() -> None:
        for _ in range(launches):
            small.add_(1)

    section.figures["launch_microseconds"] = section.seconds_of(launch, 3, 1) / launches * 1e6
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        section.figures["multiprocessors"] = properties.multi_processor_count
        section.figures["memory_gb"] = properties.total_memory / 1e9
        section.figures["shared_memory_kib"] = getattr(properties, "shared_memory_per_block_optin", 0) / 1024
    for name, value in section.figures.items():
        if not toy:
            section.rows.append({"ceiling": name.replace("_", " "), "value": value})
