"""The parts of benchmarks/scaling_rules.py, each with its question, and what they share."""
