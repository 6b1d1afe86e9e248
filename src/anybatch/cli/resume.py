"""anybatch resume RUN"""

from anybatch.cli.options import AllowCode, Json, RunFolder, Set

__all__ = ["run"]


def run(
    folder: RunFolder, changes: Set = None, allow_code: AllowCode = False, as_json: Json = False
) -> None:
    """Continue a run from its newest good checkpoint.

    Only keys that leave the arithmetic as it is can be set, such as run.epochs.
    Stopped by Ctrl-C it saves, says how to continue, and ends with exit code 130.
    """
    from anybatch.cli.session import follow
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import changed, reopened

    built = build(changed(folder, changes or []), allow_code=allow_code, fresh=False)
    follow(built, reopened(built, folder), as_json=as_json)
