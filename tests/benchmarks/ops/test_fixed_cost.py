"""The fixed cost of each public function by pytest-benchmark and its own clock, one function at a time.

With pytest-xdist a function is called once and not timed. bench_ops.py times them in turns, and has the targets.
"""

import pytest
import torch

from benchmarks.ops.loss_cases import FIXED, fixed_calls
from benchmarks.ops.sides import kernels


@pytest.mark.parametrize("function", FIXED)
def test_fixed_cost(function, benchmark):
    if not kernels():
        pytest.skip("no compiled backend")
    backend = kernels()[0].partition("-")[0]
    result = benchmark(fixed_calls(backend)[function])
    if function == "draw_seed":
        assert result.dtype == torch.int64
    elif function not in ("elle_loss-adaptive", "AdaptiveLambda.update"):  # whose lam depends on the calls before
        expected = fixed_calls("reference")[function]()
        torch.testing.assert_close(result, expected, rtol=64 * torch.finfo(torch.float32).eps, atol=1e-6)
