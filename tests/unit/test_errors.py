"""Errors: each code becomes its class, keeps its facts, and reads as a sentence."""

from __future__ import annotations

import pickle  # noqa: TID251 - what others do to our errors

import pytest

from zrmq import errors
from zrmq.errors import Code, InvalidArgumentError, RequestRefusedError, ZrmqError, refused
from zrmq.protocol.limits import check_number

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ZrmqError)]


@pytest.mark.parametrize("code", Code)
def test_a_code_keeps_its_number_and_becomes_its_class(code: Code) -> None:
    error = refused(code, "The sentence.", {"topic": "meters"})
    assert isinstance(error, RequestRefusedError)
    assert (error.code, error.message, error.facts) == (code, "The sentence.", {"topic": "meters"})
    assert str(error) == f"The sentence. [{code:d} {code.name}]"


REFUSALS = [kind for kind in CLASSES if RequestRefusedError in kind.__mro__[1:]]


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_each_refusal_comes_back_as_what_it_was(kind: type[ZrmqError]) -> None:
    assert type(refused(kind.code, "x")) is kind


def test_a_code_of_the_future_is_kept() -> None:
    error = refused(69_999, "Something new.", {"topic": "meters"})
    assert type(error) is RequestRefusedError
    assert error.code is Code.INTERNAL_ERROR
    assert error.facts == {"topic": "meters", "unknown_code": 69_999}


@pytest.mark.parametrize("name", ["message", "code", "self", "args", "not a name"])
def test_a_peer_may_name_its_facts_as_it_likes(name: str) -> None:
    error = refused(40402, "x", {name: 1})
    assert error.facts == {name: 1}
    assert (error.message, error.code) == ("x", Code.TOPIC_NOT_FOUND)


def test_the_facts_are_a_copy() -> None:
    facts: dict[str, object] = {}
    refused(69_999, "x", facts)
    assert facts == {}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_survive_a_process_boundary(kind: type[ZrmqError]) -> None:
    """concurrent.futures and pytest-xdist hand exceptions over pickled."""
    error = pickle.loads(pickle.dumps(kind("The sentence.", code=Code.FORBIDDEN, topic="meters")))  # noqa: S301 - our own bytes
    assert (type(error), error.message, error.code, error.facts) == (kind, "The sentence.", Code.FORBIDDEN, {"topic": "meters"})


def test_errors_are_caught_by_the_names_python_users_know() -> None:
    assert issubclass(errors.RequestTimeoutError, TimeoutError)
    assert issubclass(errors.InvalidArgumentError, ValueError)


def test_a_sentence_about_a_long_argument_is_short_and_ends_with_what_to_do() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_number("timeout_ms", "x" * 5_000_000, 1)  # type: ignore[type-var]
    assert len(caught.value.message) < 2_100
    assert caught.value.message.endswith("; give a whole number, 1 or more.")


def test_each_number_has_one_name() -> None:
    assert len(Code.__members__) == len(set(Code))
