"""docs/scaling-rules.md and its plots, section by section, from a raw result."""
