"""Benchmarks that anyone can run; dated figures lie in results/."""
