"""How much a conversion computes: three efforts, and less for a large model on a CPU."""

import pytest
from helpers import gpt2

from sqa_convert import Calibration, convert
from sqa_convert.conversion import fitting
from sqa_convert.conversion.fitting import EFFORTS, Fitting, effort_of
from sqa_convert.errors import RecipeError

SMALL, GPT2_SIZE = (2_000_000, 300_000), (124_000_000, 18_900_000)


def of(effort, **changes):
    kind = EFFORTS[effort]
    given = {
        "text": None,
        "tokens": kind.tokens,
        "refit": True,
        "refine_steps": kind.refine_steps,
        "text_column": "text",
    }
    given |= {"length": None, "prompts": None, "columns": None, "effort": kind}
    given |= {"refine_steps": kind.refine_steps, "polish_steps": kind.polish_steps}
    return Fitting(**given | changes)


def test_what_nobody_asked_for_is_less_for_a_large_model_on_a_cpu():
    asked = of("default", needed=10_260)
    assert asked.affordable(*SMALL, on_cpu=True) == asked == asked.affordable(*GPT2_SIZE, on_cpu=False)
    large, light = asked.affordable(*GPT2_SIZE, on_cpu=True), of("light", needed=10_260).affordable(*GPT2_SIZE, True)
    for name in ("tokens", "refine_steps", "polish_steps"):
        assert getattr(light, name) <= getattr(large, name) < getattr(asked, name)
    assert light.tokens >= 10_260 and large.polish_steps == 0 and light.refine_steps >= fitting.LEAST_REFINE
    assert of("best").affordable(*GPT2_SIZE, on_cpu=True) == of("best")


def test_what_was_asked_for_is_done():
    given = frozenset({"tokens", "refine_steps", "polish_steps"})
    assert of("default", asked=given).affordable(*GPT2_SIZE, on_cpu=True) == of("default", asked=given)
    named = of("default", text="corpus.txt").affordable(*GPT2_SIZE, on_cpu=True)
    assert named.tokens == EFFORTS["default"].tokens


def test_an_effort_sets_what_is_not_given():
    report = convert(gpt2(), 6, 3, "svd", calibration=Calibration(tokens=600, effort="light", polish_steps=2)).report
    told = report["calibration"]
    assert (told["refine_steps"], told["polish"]["steps"]) == (EFFORTS["light"].refine_steps, 2)


def test_an_effort_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="effort quick: choose one of light, default, best"):
        effort_of("quick")
    with pytest.raises(RecipeError, match="choose one of light, default, best"):
        convert(gpt2(), 6, 3, calibration=Calibration(effort="quick"))
