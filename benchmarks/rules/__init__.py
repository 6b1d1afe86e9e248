"""Parts of benchmarks/scaling_rules.py, one question each, and their tables and plots."""
