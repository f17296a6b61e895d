"""What the kinds of findings compare with; docs/tools.md says how these were chosen."""

THRESHOLDS: dict[str, dict[str, float]] = {
    "never_updated": {"untrained_scale": 0.15},
    "not_converged": {"share_of_initial": 0.05},
    "variance_below_eps": {"share_of_channels": 0.5},
    "dead_channels": {"share_of_largest": 1e-6, "share_of_channels": 0.5},
    "momentum_convention": {"rate_from": 0.9, "other_rate_to": 0.1},
    "float32_cancellation": {"rounding": 6e-8, "relative_error": 1e-2},
    "half_precision_statistics": {"smallest_float16": 6e-5, "stds_bfloat16": 50},
    "drift": {
        "batches": 2,
        "stds": 0.5,
        "standard_errors": 4,
        "ratio": 2,
        "severe_stds": 3,
        "severe_ratio": 10,
    },
    "noisy_batches": {"batches": 8, "stds": 0.5},
}
