"""Change the code in small seeded ways, and count the changes that no test notices.

    python benchmarks/mutants.py [--number 150] [--seed 0] [--tier fast] [--write] [--resume]

A mutant is the package with one mutation (benchmarks/mutations.py). A subject is a module or
package of src/anybatch; it has mutants in proportion to its lines, and at least one. The tests of
its subject (`SUBJECTS`) that `make test` runs come first; the tier "quick" has no others. If they
pass, the slow tests of the subject follow (subject), and then all tests of `make test` (fast) or of
`make test-all` (all). A mutant is *killed* by a failed test or by a time limit. One that no test
kills *survives*: it shows a missing test, or it changes nothing that can be observed.

With --resume, mutants that the record kills do not run again: after new tests, only the others do.
A test that kills a mutant must pass on the unchanged code; it runs again to show this. Mutants run
in copies of the working tree, so that the tree itself never changes. Tools that put all mutants
into the source at once do not fit: many tests here start processes or read source files.
"""

import argparse
import json
import os
import random
import re
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
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from queue import SimpleQueue

from machine import RESULTS, write
from mutations import KINDS, Mutation, find_mutations

__all__ = ["SUBJECTS", "Mutant", "choose_mutants", "list_modules", "select_tests"]

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/anybatch")
TIERS = ("quick", "subject", "fast", "all")
TARGETS = {"quick": "test", "fast": "test", "all": "test-all"}  # of make
LIMIT = 1800  # seconds; a mutant may never end
NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
ENDED, TIMED_OUT = "a failed test", "the time limit"

SUBJECTS: dict[str, tuple[str, ...]] = {  # module or package: beginnings of the names of its tests
    "_torch": ("compiled", "foreign", "ledger_traces", "private_torch", "torch_names"),
    "advice": ("advise", "compare", "verdict"),
    "audit": ("audit", "layout_invariance", "strangers_code"),
    "batch": ("batch", "padding", "gradient_refusals", "wrong_arguments"),
    "batch_errors": ("pytree", "batch", "gradient_refusals"),
    "cli": ("cli", "package", "recipe_observe"),
    "compiled": ("compiled",),
    "data": ("data", "wrong_data", "cli_changed_data"),
    "distributed": ("gradient_ranks", "agreement", "hanging_rank", "fully_sharded"),
    "displays": ("displays",),
    "errors": ("cli_mistakes", "wrong"),
    "example_losses": ("objectives", "batch", "gradient_refusals", "training_evaluation"),
    "examples": ("training_batches", "data_sources", "pytree"),
    "extras": ("package", "trackers", "cli_mistakes"),
    "gradient": (
        *("gradient", "accumulation", "buckets", "tree", "self_check", "same_bits", "own_loop"),
        *("repeated_passes", "sum_and_mean", "bitwise", "narrow_zeros", "example_outputs"),
        "wrong_arguments",
    ),
    "integrations": ("integrations",),
    "kernels": ("kernels",),
    "layout": ("layout", "gradient_layouts", "micro_batches", "wrong_arguments"),
    "ledger": ("ledger", "noise_scale"),
    "model_facts": ("gradient", "compiled"),
    "limits": ("security", "data_files", "cli_mistakes"),
    "objective": ("objectives", "penalty_and_reduction", "mean_total", "example_outputs"),
    "optim": ("averages", "scaling_adascale", "sharded_optimizer", "precision"),
    "order": ("order",),
    "paths": ("paths", "security"),
    "penalties": ("penalties", "penalty_and_reduction"),
    "precision": ("precision",),
    "pytree": ("pytree", "batch", "micro_batches", "padding"),
    "questions": ("questions", "answers", "wrong_ideas", "cli_demo"),
    "randomness": ("gradient_randomness", "training_draws", "keys"),
    "recipe": (
        *("recipe", "scaling_adascale", "scaling_b", "scaling_c", "scaling_exact"),
        *("cli_changed_data", "changed_states", "cli_user_code", "cli_consent"),
    ),
    "reduction": ("reductions", "group_and_function_reductions"),
    "reductions": ("reductions", "group_and_function_reductions", "mean_total", "sum_and_mean"),
    "reference": ("reference",),
    "report": ("explain",),
    "schedules": ("schedules",),
    "shipped": ("shipped_recipes", "cli_new"),
    "runs": (
        *("checkpoint", "run_", "trackers", "training_resume", "training_record", "digest"),
        *("changed_states", "interrupted_files", "records_on_disk", "similar_examples"),
        *("environment_refused", "training_environment", "data_fingerprint", "training_user"),
        *("training_body", "own_loop"),
    ),
    "training": ("training", "compiled", "spikes", "evaluation", "order_in_training", "elastic"),
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

    @property
    def place(self) -> tuple[str, int, str, str, str]:
        """First five fields of a result."""
        mutation = self.mutation
        return self.path, mutation.line, mutation.kind, mutation.before, mutation.after


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


def select_tests(subject: str, path: str = "", root: Path = ROOT) -> list[str]:
    """Return the test files of a subject: quick ones first, those with words of a path before."""

    def rank(test: str) -> tuple[bool, int]:
        words = (set(re.findall("[a-z]+", text)) for text in (path, Path(test).stem))
        return "/unit/" in test and "compiled" not in test, len(set.intersection(*words))

    tests = {
        str(test.relative_to(root))
        for name in SUBJECTS[subject]
        for test in (root / "tests").rglob(f"test_{name}*.py")
    }
    return sorted(sorted(tests), key=rank, reverse=True)


def read_tier(tier: str) -> list[str]:
    """Return the arguments of pytest in the make target of a tier."""
    commands = subprocess.run(
        ["make", "--dry-run", TARGETS[tier]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = [line for line in commands.splitlines() if "-m pytest" in line]
    return shlex.split(line.partition("-m pytest")[2])


def list_stages(mutant: Mutant, tier: str) -> list[list[str]]:
    """Return the arguments of each run of pytest that a mutant goes through."""
    tests, quick = select_tests(mutant.subject, mutant.path), read_tier("quick")
    fast = quick[quick.index("-m") + 1]
    stages = [[*quick, "-n", "0", *tests], ["-m", f"not ({fast})", *tests]]
    if tier in ("fast", "all"):
        stages.append(read_tier(tier))
    return stages[:1] if tier == "quick" else stages


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
    if not failures:
        return ENDED, None
    test = failures[0].partition(" ")[2].partition(" - ")[0]
    return ENDED, test if test.endswith("]") else test.partition("[")[0]


def run_mutant(mutant: Mutant, tier: str, copies: SimpleQueue[Path]) -> Result:
    """Run the tests of the mutant's subject, and then those of the tier."""
    root, start = copies.get(), time.monotonic()
    path, mutation = root / mutant.path, mutant.mutation
    source = path.read_bytes()
    path.write_bytes(mutation.apply(source))
    reason = test = None
    try:
        for arguments in list_stages(mutant, tier):
            reason, test = run_tests(root, arguments, LIMIT)
            if reason is not None:
                break
        path.write_bytes(source)
        # The name of a case can hold a number that the mutation changes; then all cases run.
        names = [[test], [test.partition("[")[0]]] if test else [arguments]
        if reason == ENDED and all(run_tests(root, name, LIMIT)[0] for name in names):
            raise SystemExit(f"{names[-1]} fails on the unchanged code.")
    finally:
        path.write_bytes(source)
        copies.put(root)
    seconds = round(time.monotonic() - start, 1)
    return Result(*mutant.place, reason, test, seconds)


def name_record(seed: int) -> str:
    """Name the record of a draw: mutants.json for the first, mutants-1.json for the second."""
    return f"mutants-{seed}" if seed else "mutants"


def read_killed(seed: int) -> dict[tuple[object, ...], Result]:
    """Read the results that a record has of killed mutants, by their places."""
    record = json.loads((RESULTS / f"{name_record(seed)}.json").read_text())
    results = [Result(**result) for result in record["results"] if result["killed_by"]]
    return {astuple(result)[:5]: result for result in results}


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
    parser.add_argument("--resume", action="store_true", help="take killed ones from the record")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--write", action="store_true", help="write the record after each mutant")
    args = parser.parse_args()
    mutants = choose_mutants(args.number, args.seed)
    mutants = [mutant for mutant in mutants if mutant.subject in (args.only or SUBJECTS)]
    killed = read_killed(args.seed) if args.resume else {}
    results = [killed[mutant.place] for mutant in mutants if mutant.place in killed]
    mutants = [mutant for mutant in mutants if mutant.place not in killed]
    copies: SimpleQueue[Path] = SimpleQueue()
    with ExitStack() as stack, ThreadPoolExecutor(args.workers) as pool:
        for _ in range(args.workers):
            copies.put(stack.enter_context(copy_tree()))
        for result in pool.map(lambda mutant: run_mutant(mutant, args.tier, copies), mutants):
            results.append(result)
            fate = f"killed by {result.killed_by}" if result.killed_by else "SURVIVES"
            print(f"{result.path}:{result.line} {result.kind}: {fate}", flush=True)
            print(f"    {result.before!r} -> {result.after!r}  {result.test or ''}", flush=True)
            if args.write:
                write(name_record(args.seed), summarize(args, results))
    survivors = sum(result.killed_by is None for result in results)
    print(f"{len(results)} mutants, {len(results) - survivors} killed, {survivors} survive")


if __name__ == "__main__":
    main()
