"""What is kept between runs is what was found, and nothing fails where nothing can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.cache import cache_folder, kept
from stages.init import config_keys, config_problems


def test_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []

    def find() -> dict[str, int]:
        asked.append(1)
        return {"a": len(asked)}

    assert kept("x-1", find) == kept("x-1", find) == {"a": 1} and kept("x-2", find) == {"a": 2}
    (cache_folder() / "x-1.json").write_text('{"a"')  # torn
    assert kept("x-1", find) == {"a": 3} == kept("x-1", find)
    assert sorted(path.name for path in cache_folder().iterdir()) == ["x-1.json", "x-2.json"]


def test_no_place_to_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "file" / "below"))
    assert [kept("x", lambda: 1), kept("x", lambda: 2)] == [1, 2]


def test_keys_of_a_config_are_the_same_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path))
    first = config_keys("llama")
    assert config_keys("llama") == first and {"hidden_size", "rope_theta"} <= set(first["known"])
    assert config_problems({"hiden_size": 8}) == {
        "hiden_size": "unknown key of a llama config; did you mean hidden_size?"
    }
    for _ in range(2):
        assert "did you mean llama?" in config_problems({"model_type": "lama"})["model_type"]
    assert "no model type '../x'" in config_problems({"model_type": "../x"})["model_type"]
