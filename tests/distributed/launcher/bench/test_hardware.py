"""`biroute bench hardware` on two real processes: rates that are possible, in the right units."""

from __future__ import annotations

import math

from biroute.launcher.bench.hardware import measure_hardware, profile_of


def test_two_ranks_measure_possible_rates() -> None:
    """No core does 10^13 operations a second, or less than 10^8; no memory moves a terabyte a second."""
    measured = measure_hardware(2, 0.01)
    profile = profile_of(measured, 2)
    assert profile.cpu is not None
    rates = [value for value in profile.cpu.model_dump().values() if not isinstance(value, dict)]
    assert all(math.isfinite(rate) for rate in [*rates, *profile.cpu.tiles.model_dump().values()])
    # A tile's pair takes nanoseconds, and a row is gathered no faster than memory is read.
    assert 0.01 < profile.cpu.tiles.forward_pair_ns + 128 / profile.cpu.tiles.forward_gflops < 1e4
    assert 1e8 < measured.flops_per_second_bf16 < 1e13
    assert 1e8 < measured.flops_per_second_fp32 < 1e13
    assert 1e7 < measured.memory_bytes_per_second < 1e12
    assert 1e6 < measured.all_reduce_bytes_per_second < measured.memory_bytes_per_second
    assert measured.send_bytes_per_second > 1e6
    assert 1e-7 < measured.latency_seconds < 1
