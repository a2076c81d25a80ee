"""The layer check runs every arrangement of the verified tokens, and sees one that changes a bit."""

from __future__ import annotations

import json

import pytest

from nextn.backend import DSABackend
from nextn.bench import gpu_layer

SCENARIO = gpu_layer.make_scenario((70, 129, 0), 3, heads=8, index_heads=32, topk=64)


def test_the_references_pass_in_every_arrangement():
    rows = list(gpu_layer.check(SCENARIO, "cpu"))
    assert {row["case"] for row in rows} >= {"again", "one token at a time", "mixed depths", "two halves"}
    assert all(row["passed"] for row in rows), rows


@pytest.mark.parametrize("method", ["attend", "get_topk_paged"])
def test_a_result_that_depends_on_the_batch_is_seen(monkeypatch, method):
    original = getattr(DSABackend, method)

    def shifted(self, cache, metadata, **tensors):
        result = original(self, cache, metadata, **tensors)
        return result + 1 if metadata.batch.num_rows == len(SCENARIO.prefix_lens) else result

    monkeypatch.setattr(DSABackend, method, shifted)
    rows = {row["case"]: row for row in gpu_layer.check(SCENARIO, "cpu")}
    assert rows["again"]["passed"]
    assert not rows["one token at a time"]["passed"]


def test_the_command_prints_and_stores_every_row_and_fails_with_any(monkeypatch, capsys, tmp_path):
    rows = [{"case": "one", "passed": True}, {"case": "two", "passed": False}]
    monkeypatch.setattr(gpu_layer, "list_scenarios", lambda: (SCENARIO,))
    monkeypatch.setattr(gpu_layer, "check", lambda *_: iter(rows))
    file = tmp_path / "rows.jsonl"
    assert gpu_layer.main(["--device", "cpu", "--out", str(file)]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["case"] for line in printed.out.splitlines()] == ["one", "two"]
    assert file.read_text() == printed.out
    assert "1 rows failed" in printed.err
    rows.pop()
    assert gpu_layer.main(["--device", "cpu"]) == 0
