"""LoCoMo's dialogues as documents: whole sessions up to a length, and the questions that these answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import locomo
from benchmarks.quality.sources import Sources


def question(category: int, *evidence: str) -> dict[str, Any]:
    return {"question": f"{category} {evidence}?", "answer": 7, "evidence": list(evidence), "category": category}


def test_a_dialogue_has_whole_sessions_up_to_a_length_and_the_questions_that_these_answer(tmp_path: Path) -> None:
    conversation = {
        f"session_{number}{part}": [{"speaker": "Ann", "text": f"Word {number}"}] if not part else f"{number} May, 2023"
        for number in (1, 2, 3)
        for part in ("", "_date_time")
    }
    asked = [question(1, "D1:1; D2:1"), question(2, "D3:1"), question(3, "D1:1"), question(5, "D1:1"), question(4)]
    dialogue = {"sample_id": "d", "conversation": conversation, "qa": asked}
    (tmp_path / locomo.FILE).write_text(json.dumps([dialogue, dialogue]))
    sources = Sources(tmp_path, lambda text: len(text.split()))
    short, long = locomo.records(sources, [12, 100], 1)
    assert short["context"] == "1 May, 2023\nAnn: Word 1\n\n2 May, 2023\nAnn: Word 2"
    assert [(each["q"], each["a"]) for each in short["qa"]] == [("1 ('D1:1; D2:1',)?", ["7"])]
    assert (short["file"], long["file"]) == ("locomo-12", "locomo-whole")
    assert "Word 3" in long["context"]
    assert [each["q"][0] for each in long["qa"]] == ["1", "2"]
