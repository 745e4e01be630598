"""The pool of threads under the ops, where its owner asks for more than there is."""

import subprocess
import sys

_SCRIPT = """
import resource
import torch
from helexa import ops

x = torch.randn(64, 1024)
expected = ops.silu_mul_reference(x)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)  # room for the stacks of some threads
ops.set_num_threads(1000)
assert 1 < ops.num_threads() < 1000, ops.num_threads()
assert torch.allclose(ops.silu_mul(x), expected, atol=1e-5)
"""


def test_where_the_system_refuses_more_threads_those_that_there_are_do_the_work():
    ended = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
