"""The clock of ``faults.py``: one that a process and its children read, and that can be set while they run.

A library is laid over libc's clock by LD_PRELOAD. libfaketime would be the one to take, but with its 0.9.10 the ``time.sleep`` of
Python 3.11 fails (EINVAL) as soon as the monotonic clock is left alone, which setting a clock does not touch. File times are the
kernel's, and stay right.
"""

import os
import shutil
import subprocess
from pathlib import Path

CLOCK = "ROB_FAULTS_CLOCK"
"""In the environment: the file with the seconds by which the clock is wrong."""

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long wrong_by(void) {
    char text[32] = {0};
    int file = open(getenv("ROB_FAULTS_CLOCK"), O_RDONLY);
    if (file < 0) return 0;
    long size = read(file, text, 31);
    close(file);
    return size > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong_by();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    if (!failed) now->tv_sec += wrong_by();
    return failed;
}

time_t time(time_t *now) {
    time_t (*real)(time_t *) = dlsym(RTLD_NEXT, "time");
    time_t found = real(NULL) + wrong_by();
    if (now) *now = found;
    return found;
}
"""


def environment(folder: Path) -> dict[str, str] | None:
    """What a process is started with to have such a clock, which is right at first; None: there is no Linux or no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not Path("/proc").exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    library, clock = folder / "clock.so", folder / "clock"
    words = [compiler, "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(words, input=SOURCE, text=True, check=True)
    clock.write_text("0\n")
    return {"LD_PRELOAD": str(library), CLOCK: str(clock)}


def set_clock(wrong_by: int) -> None:
    """Seconds, from now on."""
    clock = Path(os.environ[CLOCK])
    clock.with_suffix(".new").write_text(f"{wrong_by}\n")
    clock.with_suffix(".new").replace(clock)
