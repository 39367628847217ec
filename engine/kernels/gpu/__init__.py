"""
Triton kernels. Imported on a GPU only; what each means stands with its twin, one folder up.

House rules: offsets into anything that grows with tokens or KV rows are int64; every load and store
is masked; sums are float32; nothing is autotuned, so nothing is measured while others wait.
"""
