"""Named cases, their data, the float64 oracle and the comparison: what tests and benchmarks share.

- `cases`: shapes and cases by name
- `batches`, `logits`, `inputs`: their data
- `oracle`, `device_oracle`: the exact result, on the host and on the device
- `compare`: whether a result is good enough
- `checking`: all of it in one call, as the GPU tests use it
"""
