"""What is made of Slurm's answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lcbench.runs.queue import last_incarnation

# As sacct answers for an array's id: an element has that id too, was requeued after its node failed, and then cancelled.
ANSWER = """\
2|COMPLETED
3|FAILED
1|NODE_FAIL
1|CANCELLED by 0
"""


@pytest.mark.parametrize(("job", "restarts", "word"), [("1", 1, "NODE_FAIL"), ("1", 2, "CANCELLED"), ("4", 1, "")])
def test_a_requeued_job_knows_how_it_ended_before(tmp_path: Path, job: str, restarts: int, word: str) -> None:
    sacct = tmp_path / "sacct"
    sacct.write_text(f"#!/bin/sh\ncat <<'END'\n{ANSWER}END\n")
    sacct.chmod(0o755)
    assert last_incarnation(job, restarts, {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}) == word
