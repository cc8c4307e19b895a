"""The prototype cross-entropy: every implementation exact in every case, then the time of each, size by size."""

from rob.benchmarks.gpu_check.section import Section
from rob.benchmarks.loss_cases import check_losses
from rob.benchmarks.loss_sizes import LIMIT, SIZES, measure_losses

OURS = ("triton", "chunked")


def run(section: Section) -> None:
    """The sizes most wanted, then every case, then the other sizes: a kernel is compiled when it is first met, and the time may
    end."""
    cuda = section.device.type == "cuda"

    def said(row: dict) -> None:
        kept = {name: value for name, value in row.items() if name != "errors"}
        section.rows.append(kept | ({"limit": bound(row)} if "ms" in row else {}))
        if row.get("impl") in OURS:
            off = max(row["errors"]) if "errors" in row else float("nan")
            section.check(f"K {row['prototypes']}, D {row['width']}, {row['impl']}: error against float64", off, LIMIT)
        section.said(section)

    images = section.size(4, 256, 256)
    sizes = section.size([(64, 16)], SIZES[:2], SIZES)
    measure_losses(sizes[:3], 0.5 * section.left(), section.device, images, said)
    if cuda:
        section.attempt("every implementation in every case", lambda: _exact(section))
    measure_losses(sizes[3:], max(0.0, section.left()), section.device, images, said)
    if cuda:
        section.settings["loss"] = fastest(section.rows)


def _exact(section: Section) -> None:
    failed = check_losses(section.device)
    section.notes += failed
    section.check("implementations and cases that are not exact", len(failed), 0)


def bound(row: dict) -> str:
    """Which limits a call: the host where it takes as long to launch it, and then the row tells nothing of the kernels."""
    return "host" if row["host_ms"] > 0.9 * row["ms"] else "device"


def fastest(rows: list[dict]) -> dict[str, str]:
    """By size, "65536x256", which of our fused forms is fastest, by its fastest call: others tell how busy the host was."""
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row.get("impl") in OURS and "fastest_ms" in row and row.get("exact"):
            size = f"{row['prototypes']}x{row['width']}"
            best[size] = min(best.get(size, (float("inf"), "")), (row["fastest_ms"], row["impl"]))
    return {size: impl for size, (_, impl) in best.items()}
