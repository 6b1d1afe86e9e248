"""Five questions that practitioners ask about mini-batches, answered by measurement.

`ask()` gives the short answers, `wrong_ideas()` measures what common mistakes do.
docs/answers.md has the long answers.
"""

from anybatch.questions.answers import Answer, ask, compute_worked_batch
from anybatch.questions.ideas import WrongIdea, wrong_ideas

__all__ = ["Answer", "WrongIdea", "ask", "compute_worked_batch", "wrong_ideas"]
