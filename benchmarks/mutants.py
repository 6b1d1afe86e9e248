"""Change the code in small seeded ways, and count the changes that no test notices.

    python benchmarks/mutants.py [--number 150] [--seed 0] [--tier fast] [--workers 1] [--write]

A mutant is the package with one mutation (benchmarks/mutations.py). A subject is a module or
package of src/anybatch; it has mutants in proportion to its lines, and at least one. The tests of
its subject run first (`SUBJECTS`). If they pass, the other tests of the tier follow: none
(subject), those of `make test` (fast) or of `make test-all` (all). A mutant is *killed* by a failed
test or by a time limit. One that no test kills *survives*: it shows a missing test, or it changes
nothing that can be observed.

The tests must pass on the unchanged code first; this also sets the time limit. Mutants run in
copies of the working tree, so that the tree itself never changes. Tools that put all mutants into
the source at once do not fit: many tests here start processes or read source files.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from machine import write
from mutations import KINDS, Mutation, find_mutations

__all__ = ["SUBJECTS", "Mutant", "choose_mutants", "list_modules", "select_tests"]

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/anybatch")
TIERS = {"subject": None, "fast": "test", "all": "test-all"}  # make targets of the other tests
NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
ENDED, TIMED_OUT = "a failed test", "the time limit"

SUBJECTS: dict[str, tuple[str, ...]] = {  # module or package: beginnings of the names of its tests
    "_torch": ("compiled", "foreign", "ledger_traces"),
    "advice": ("advise", "compare", "verdict"),
    "audit": ("audit", "layout_invariance", "strangers_code"),
    "batch": ("batch", "padding", "gradient_refusals", "wrong_arguments"),
    "batch_errors": ("pytree", "batch", "gradient_refusals"),
    "cli": ("cli", "package"),
    "compiled": ("compiled",),
    "data": ("data", "wrong_data", "cli_changed_data"),
    "distributed": ("gradient_ranks", "agreement", "hanging_rank", "fully_sharded"),
    "displays": ("displays",),
    "errors": ("cli_mistakes", "wrong"),
    "example_losses": ("objectives", "batch", "gradient_refusals"),
    "examples": ("training_batches", "data_sources", "pytree"),
    "extras": ("package", "trackers", "cli_mistakes"),
    "gradient": ("gradient", "accumulation", "buckets", "tree", "self_check", "same_bits"),
    "integrations": ("integrations",),
    "kernels": ("kernels",),
    "layout": ("layout", "gradient_layouts", "micro_batches", "wrong_arguments"),
    "ledger": ("ledger", "noise_scale"),
    "model_facts": ("gradient", "compiled"),
    "limits": ("security", "data_files", "cli_mistakes"),
    "objective": ("objectives", "penalty_and_reduction", "mean_total"),
    "optim": ("averages", "scaling_adascale", "sharded_optimizer", "precision"),
    "order": ("order",),
    "paths": ("paths", "security"),
    "penalties": ("penalties", "penalty_and_reduction"),
    "precision": ("precision",),
    "pytree": ("pytree", "batch"),
    "questions": ("questions", "wrong_ideas", "cli_demo"),
    "randomness": ("gradient_randomness", "training_draws"),
    "recipe": ("recipe", "scaling_adascale", "scaling_built", "scaling_carry", "scaling_con"),
    "reduction": ("reductions", "group_and_function_reductions"),
    "reductions": ("reductions", "group_and_function_reductions", "mean_total"),
    "reference": ("reference",),
    "report": ("explain",),
    "schedules": ("schedules",),
    "shipped": ("shipped_recipes", "cli_new"),
    "runs": ("checkpoint", "run_", "trackers", "training_resume", "training_record", "digest"),
    "training": ("training",),
    "workers": ("training_workers",),
    "zoo": ("zoo",),
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """Mutation of one file of the package."""

    path: str  # relative to the repository
    mutation: Mutation

    @property
    def subject(self) -> str:
        """Module or package of src/anybatch."""
        return Path(self.path).relative_to(PACKAGE).parts[0].removesuffix(".py")


@dataclass(frozen=True, slots=True)
class Result:
    """Fate of a mutant."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    killed_by: str | None  # None: it survives
    test: str | None  # the first that failed
    seconds: float


def list_modules(root: Path = ROOT) -> dict[str, list[Path]]:
    """Return the source files of each subject, relative to the repository."""
    modules: dict[str, list[Path]] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
        if not name.startswith("__"):
            modules.setdefault(name, []).append(path.relative_to(root))
    return modules


def choose_mutants(number: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """Draw about `number` mutants: subjects in proportion to their lines, kinds equally often."""
    generator = random.Random(seed)
    pools: dict[str, dict[str, list[Mutant]]] = {}
    lines = {}
    for subject, paths in list_modules(root).items():
        pools[subject] = {kind: [] for kind in KINDS}
        lines[subject] = 0
        for path in paths:
            source = (root / path).read_bytes()
            lines[subject] += source.count(b"\n")
            for mutation in find_mutations(source):
                pools[subject][mutation.kind].append(Mutant(str(path), mutation))
    total = sum(lines.values())
    mutants = []
    for subject, pool in pools.items():
        kinds = [kind for kind in KINDS if pool[kind]]
        count = max(1, round(number * lines[subject] / total)) if kinds else 0
        for _ in range(min(count, sum(map(len, pool.values())))):
            kind = generator.choice([kind for kind in kinds if pool[kind]])
            mutant = pool[kind].pop(generator.randrange(len(pool[kind])))
            if mutant.mutation.parses((root / mutant.path).read_bytes()):
                mutants.append(mutant)
    generator.shuffle(mutants)  # an interrupted run is a sample too
    return mutants


def select_tests(subject: str, root: Path = ROOT) -> list[str]:
    """Return the test files of a subject."""
    return sorted(
        {
            str(path.relative_to(root))
            for name in SUBJECTS[subject]
            for path in (root / "tests").rglob(f"test_{name}*.py")
        }
    )


def read_tier(tier: str) -> list[str] | None:
    """Return the arguments of pytest in the make target of a tier; None without other tests."""
    target = TIERS[tier]
    if target is None:
        return None
    commands = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = [line for line in commands.splitlines() if "-m pytest" in line]
    return shlex.split(line.partition("-m pytest")[2])


@contextmanager
def copy_tree() -> Iterator[Path]:
    """Yield a copy of the working tree."""
    with tempfile.TemporaryDirectory(prefix="anybatch-mutants-") as folder:
        root = Path(folder, "anybatch")
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        yield root


def run_tests(root: Path, arguments: Sequence[str], limit: float) -> tuple[str | None, str | None]:
    """Run tests until the first fails.

    Returns:
        The reason why they ended early, and the test that failed; None where all pass.
    """
    environment = os.environ | {
        "PYTHONPATH": str(root / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",  # a file may change twice within the resolution of its time
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "--no-header", "--tb=no", "-rfE", *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its child processes end with it
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return TIMED_OUT, None
    if process.returncode in (0, 5):  # 5: no test was selected
        return None, None
    failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return ENDED, failures[0].split()[1] if failures else None


class Runner:
    """Run mutants in copies of the tree."""

    def __init__(self, tier: str, copies: SimpleQueue[Path]) -> None:
        self.rest = read_tier(tier)
        self.copies = copies
        self.limits: dict[str, float] = {}  # seconds, by subject; "" for the rest

    def measure(self, subject: str) -> None:
        """Run a subject's tests on unchanged code, and set their time limit."""
        arguments = select_tests(subject) if subject else self.rest
        if arguments is None:
            return
        root, start = self.copies.get(), time.monotonic()
        try:
            reason, test = run_tests(root, arguments, limit=3600)
        finally:
            self.copies.put(root)
        if reason is not None:
            place = (
                f"{test}, one of the tests of {subject!r}," if test else f"A test of {subject!r}"
            )
            raise SystemExit(f"{place} fails on the unchanged code. Mutants show nothing then.")
        self.limits[subject] = 30 + 5 * (time.monotonic() - start)

    def run(self, mutant: Mutant) -> Result:
        """Run the tests of the mutant's subject, and then the rest."""
        root, start = self.copies.get(), time.monotonic()
        path, mutation = root / mutant.path, mutant.mutation
        source = path.read_bytes()
        path.write_bytes(mutation.apply(source))
        tests = select_tests(mutant.subject)
        try:
            reason, test = run_tests(root, tests, self.limits[mutant.subject])
            if reason is None and self.rest is not None:
                rest = [*self.rest, *(f"--ignore={name}" for name in tests)]
                reason, test = run_tests(root, rest, self.limits[""])
        finally:
            path.write_bytes(source)
            self.copies.put(root)
        seconds = round(time.monotonic() - start, 1)
        place = (mutant.path, mutation.line, mutation.kind, mutation.before, mutation.after)
        return Result(*place, reason, test, seconds)


def summarize(args: argparse.Namespace, results: Sequence[Result]) -> dict[str, object]:
    """Return the record of the results so far."""
    survivors = [result for result in results if result.killed_by is None]
    return {
        "arguments": {"number": args.number, "seed": args.seed, "tier": args.tier},
        "mutants": len(results),
        "killed": len(results) - len(survivors),
        "survivors": [asdict(result) for result in survivors],
        "results": [asdict(result) for result in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=150, help="mutants, about")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--tier", choices=TIERS, default="fast", help="tests that run")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, help="only these subjects")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--write", action="store_true", help="write the record after each mutant")
    args = parser.parse_args()
    mutants = choose_mutants(args.number, args.seed)
    mutants = [mutant for mutant in mutants if mutant.subject in (args.only or SUBJECTS)]
    copies: SimpleQueue[Path] = SimpleQueue()
    results: list[Result] = []
    with ExitStack() as stack, ThreadPoolExecutor(args.workers) as pool:
        for _ in range(args.workers):
            copies.put(stack.enter_context(copy_tree()))
        runner = Runner(args.tier, copies)
        list(pool.map(runner.measure, ["", *sorted({mutant.subject for mutant in mutants})]))
        for result in pool.map(runner.run, mutants):
            results.append(result)
            fate = f"killed by {result.killed_by}" if result.killed_by else "SURVIVES"
            print(f"{result.path}:{result.line} {result.kind}: {fate}", flush=True)
            print(f"    {result.before!r} -> {result.after!r}  {result.test or ''}", flush=True)
            if args.write:
                write("mutants", summarize(args, results))
    killed = sum(result.killed_by is not None for result in results)
    print(f"{len(results)} mutants, {killed} killed, {len(results) - killed} survive")


if __name__ == "__main__":
    main()
