"""csrc/emulation against plain loops: what it lets pass on the host has to be what a device would do."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = Path("/usr/local/cuda/include")


@pytest.mark.timeout(300)
def test_warps_barriers_copies_and_products_behave_as_on_a_device(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not (HEADERS / "cuda_runtime.h").exists():
        pytest.skip("no g++ with CUDA's headers")
    program = tmp_path / "check"
    flags = [
        "-std=c++17",
        "-O1",
        "-w",
        "-DHELEXA_EMULATED_CUDA=1",
        f"-I{ROOT / 'csrc'}",
        f"-isystem{HEADERS}",
    ]
    sources = [str(ROOT / "tests/emulation/check.cpp"), str(ROOT / "csrc/emulation/fibers.cpp")]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
