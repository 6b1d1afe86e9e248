"""anybatch resume RUN"""

from anybatch.cli.options import AllowCode, Json, RunFolder, Set

__all__ = ["run"]


def run(
    folder: RunFolder, changes: Set = None, allow_code: AllowCode = False, as_json: Json = False
) -> None:
    """Continue a run from its newest good checkpoint."""
    from anybatch.cli.session import follow
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import reopen

    recipe, opened = reopen(folder, changes or [])
    follow(build(recipe, allow_code=allow_code), opened, as_json=as_json)
