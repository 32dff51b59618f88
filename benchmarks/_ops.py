"""All ops that `gpu` and `cpu` measure, what matters most first."""

from benchmarks import _ops_basis, _ops_linear, _ops_mamba, _ops_sequence

_ORDER = (
    "selective_scan",
    "basis_linear:spline",
    "rational",
    "normalized_residual",
    "aptx_linear",
    "nmu_product",
    "paon_linear",
    "kron_linear",
    "capsule_routing",
    "bpu_recurrence",
    "ssd",
    "wavelet_linear",
)
_KNOWN = {op.name: op for module in (_ops_mamba, _ops_basis, _ops_linear, _ops_sequence) for op in module.OPS}
OPS = (*(_KNOWN[name] for name in _ORDER), *(op for name, op in _KNOWN.items() if name not in _ORDER))
