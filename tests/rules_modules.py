"""The modules of benchmarks/rules, imported anew for each test: their constants follow the data."""

import sys
from importlib import import_module
from types import ModuleType

OURS = {"machine", "rules", "scaling_rules", "svg"}  # of benchmarks/


class Modules:
    """Modules of benchmarks/rules as attributes; document_NAME is document/NAME.py."""

    def __getattr__(self, name: str) -> ModuleType:
        return import_module("rules." + name.replace("document_", "document."))


def forget() -> None:
    """So that the next import runs them again."""
    for name in [n for n in sys.modules if n.partition(".")[0] in OURS]:
        sys.modules.pop(name)
