"""Streamed text never splits a character or shows the beginning of a stop string, and adds up to the whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.engine.text import OutputText


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def run_stream(ids: list[int], stop: tuple[str, ...] = (), *, every: int = 1) -> tuple[list[str], str, bool]:
    """Pieces taken every ``every`` tokens, the whole text, and whether a stop string ended it."""
    stream, pieces = OutputText(decode, stop), []
    for count, token in enumerate(ids, 1):
        if stream.push(token):
            return [*pieces, stream.take(is_final=True)], stream.text, True
        if count % every == 0:
            pieces.append(stream.take(is_final=False))
    is_stopped = stream.finish()
    return [*pieces, stream.take(is_final=True)], stream.text, is_stopped


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 255), max_size=30), st.integers(1, 5))
def test_any_bytes_in_any_portions_add_up_to_the_lossy_decoding_of_all(ids: list[int], every: int) -> None:
    pieces, text, _ = run_stream(ids, every=every)
    assert text == decode(ids)
    assert "".join(pieces) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    stream = OutputText(decode)
    for token in text.encode():
        stream.push(token)
        assert "\ufffd" not in stream.take(is_final=False) or "\ufffd" in text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_text_ends_before_the_stop_string_completed_first_whatever_the_portions(
    text: str, stops: list[str], every: int
) -> None:
    pieces, shown, is_stopped = run_stream(list(text.encode()), tuple(stops), every=every)
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    assert is_stopped == bool(ends)
    expected = (
        min((text[: ends[0]].removesuffix(s) for s in stops if text[: ends[0]].endswith(s)), key=len) if ends else text
    )
    assert shown == expected
    assert "".join(pieces) == expected, "text was shown that the stop string takes back"


def test_a_held_back_beginning_of_a_stop_string_is_released_when_it_turns_out_otherwise() -> None:
    stream = OutputText(decode, ("\n\n",))
    shown = []
    for token in b"x\ny":
        stream.push(token)
        shown.append(stream.take(is_final=False))
    assert shown == ["x", "", "\ny"]


def test_a_character_of_four_tokens_appears_with_its_last() -> None:
    stream = OutputText(decode)
    shown = []
    for token in "😀!".encode():
        stream.push(token)
        shown.append(stream.take(is_final=False))
    assert shown == ["", "", "", "😀", "!"]
