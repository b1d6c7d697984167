import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def run(library: str, check: str) -> subprocess.CompletedProcess:
    """One check of ``emulated*.py`` in a process of its own, with ASan loaded first."""
    from build import build

    build(library, "-shared", "-fPIC")
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    env = os.environ | {"LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0",
                        "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = HERE / f"{library.replace('kernels', 'emulated')}.py"
    return subprocess.run([sys.executable, str(script), check], env=env, capture_output=True,
                          text=True, timeout=900)  # fmt: skip


@pytest.fixture(scope="session")
def emulation(request):
    """Results of the selected checks; as many run at once as there are cores, each on one."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    wanted = [
        i.callspec.params
        for i in request.session.items
        if "emulation" in getattr(i, "fixturenames", ())
    ]
    jobs = {(p["library"], p["check"]): pool.submit(run, p["library"], p["check"]) for p in wanted}
    yield lambda library, check: jobs[library, check].result()
    pool.shutdown(cancel_futures=True)
